"""A new kind of head is one class and one entry in a table: nothing else knows its name."""

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.drafters.base import TargetSide
from drafthead.drafters.inspect import inspect_head
from drafthead.kinds import each_kind
from drafthead.prove.served import default_ks
from drafthead.recipe import with_options
from drafthead.serve import engine_plan
from drafthead.states.reader import StateReader
from drafthead.targets import load_target
from drafthead.train.evaluate import evaluate
from drafthead.train.stage import from_head, make_task, train
from tests.drafters.medusa import HEADS, MedusaDrafter
from tests.refused import refused
from tests.train.test_stage import CONSOLE, prepared  # noqa: F401 (a fixture)


def test_a_third_kind_is_trained_and_drafts_by_its_own_file_alone(prepared, monkeypatch, tmp_path):  # noqa: F811
    recipe, run = prepared
    monkeypatch.setitem(DRAFTERS, "medusa", MedusaDrafter())
    recipe = with_options(recipe, "head", {"kind": "medusa"})
    recipe = with_options(recipe, "train", {"epochs": 40, "learning_rate": 0.01})
    (own, _) = each_kind(recipe, tmp_path)["medusa"]
    assert own is recipe
    summary = train(recipe, run, console=CONSOLE)
    assert [entry["k"] for entry in summary["heldout"]] == list(range(1, HEADS + 1))
    best, target = run.train / "best", load_target(recipe.target.path)
    assert drafter_of(best).kind == "medusa"
    # It has learned the answers that it was trained on by heart.
    head, _ = DRAFTERS["medusa"].load(best)
    reader = StateReader(run.states)
    samples = [reader[int(i)] for i in reader.indices("train")]
    (found,) = evaluate(DRAFTERS["medusa"], head, TargetSide(target.embedding()), samples, HEADS)
    (before,) = evaluate(
        DRAFTERS["medusa"],
        make_task(recipe, run, target).head,
        TargetSide(target.embedding()),
        samples,
        HEADS,
    )
    assert found.accepted[0] > before.accepted[0]
    assert inspect_head(best, target)["config"]["draft_vocab_size"] == 128
    assert default_ks(recipe) == [HEADS]
    plan = engine_plan(recipe, head=best, target=target)
    assert plan.args["speculative_config"]["method"] == "medusa"
    with refused("train/best"):
        make_task(from_head(recipe, best), run, target)
