"""What a prediction beside served figures may be over: the text that is served, or none."""

import numpy as np
import pytest
import torch

from drafthead.data.answers import Answer, write_part
from drafthead.fsio import write_json
from drafthead.prove.paired_timing import Point
from drafthead.prove.prediction import predicted_acceptance, predicted_sampling
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.targets import load_target
from tests.prove import crafted


def _recipe(**sections):
    base = {
        "name": "r",
        "target": {"path": "somewhere"},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        "generate": {"max_new_tokens": 64},
    }
    return parse_recipe(base | sections, "recipe")


POINT = Point(3, 1, 0.0, 64)
BY_TRAINING = {1: [0.6], 2: [0.5, 0.2], 3: [0.5, 0.2, 0.1]}


@pytest.fixture
def trained(tmp_path):
    """A run that training evaluated at three k, without states."""
    run = RunDir(tmp_path)
    heldout = [{"k": k, "acceptance_by_position": rates} for k, rates in BY_TRAINING.items()]
    write_json(run.train / "best.json", {"heldout": heldout})
    return run


def test_without_states_it_is_what_training_evaluated(trained, tmp_path):
    found = predicted_acceptance(_recipe(), trained, None, POINT, [1, 3, 5], {"c"})
    assert found == {1: [0.6], 3: [0.5, 0.2, 0.1], 5: [0.5, 0.2, 0.1]}  # the nearest k
    nowhere = RunDir(tmp_path / "nowhere")
    assert predicted_acceptance(_recipe(), nowhere, None, POINT, [3], {"c"}) == {3: None}


@pytest.mark.parametrize(
    ("point", "bench"),
    [
        (Point(3, 1, 0.5, 64), {}),
        (POINT, {"sources": [{"path": "code.jsonl"}]}),
    ],
)
def test_no_prediction_of_other_text(trained, point, bench):
    recipe = _recipe(bench=bench)
    assert predicted_acceptance(recipe, trained, None, point, [3], {"c"}) == {3: None}


def test_the_head_drafts_over_what_is_served(trained, tmp_path):
    """The crafted head repeats what it reads: every draft of an answer of one token is right."""
    folder = crafted.target(tmp_path / "target")
    target, run = load_target(folder), trained
    crafted.head(run.head, folder)
    meta = StoreMeta((1, 2, 3), target.num_layers, crafted.HIDDEN, "fp32", 1, {"target": "t"})
    samples = []
    for name, tokens in (("repeats", [50] * 20), ("rings", [200, 201, 202] * 7), ("word", [50])):
        ids = torch.tensor([1, 7, *tokens], dtype=torch.int32)
        states = torch.zeros(len(ids) - 1, 4, crafted.HIDDEN)
        states[:, 0] = target.embedding().float()[ids[:-1].long()]
        mask = torch.arange(len(ids)) >= 2
        samples.append(Sample(ids, mask, states, 3, 2, name, "heldout"))
    with StateWriter(run.states, meta) as writer:
        writer.submit(0, samples, {})
    none, prompt = np.zeros(0, np.int32), np.array([1, 7], np.int32)
    answers = [
        Answer(s.conversation, "s", "heldout", prompt, none > 0, none, "stop", "") for s in samples
    ]
    write_part(run.answers, 0, answers, {})
    recipe = _recipe(target={"path": str(folder)})

    def predicted(conversations, new=64, **sections):
        point = Point(3, 1, 0.0, new)
        changed = recipe.model_copy(update=sections)
        return predicted_acceptance(changed, run, target, point, [1, 3], conversations)

    # Six steps: the first repeats the prompt's end, the last reaches past the answer.
    assert predicted({"repeats"})[3] == pytest.approx([5 / 6, 5 / 6, 4 / 6])
    assert predicted({"rings"})[1] == [0.0]
    mixed = predicted({"repeats", "rings"})[3]
    assert 0 < mixed[0] < 5 / 6
    # Cut at nine tokens: eight after the first, three steps.
    assert predicted({"repeats"}, new=9)[3] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    # Nothing is drafted for one token, and of a conversation that is not there nothing is known.
    assert predicted({"word"}) == predicted({"other"}) == {1: None, 3: None}
    # Longer answers than the target wrote, or sampled ones, are other text.
    by_training = {k: BY_TRAINING[k] for k in (1, 3)}
    assert predicted({"repeats"}, new=65) == by_training
    warm = recipe.generate.model_copy(update={"temperature": 0.7})
    assert predicted({"repeats"}, generate=warm) == by_training
    # Sampled requests keep fewer likeliest drafts the hotter they are.
    expected = predicted_sampling(recipe, run, target, POINT, 3, {"repeats", "rings"})
    at = {(e["temperature"], e["draft_sample_method"]): e["accepted_length"] for e in expected}
    assert sorted({heat for heat, _ in at}) == [0.0, 0.7, 1.0]
    walked = 1 + sum(predicted({"repeats", "rings"})[3])
    assert at[0.0, "greedy"] == at[0.0, "probabilistic"] == pytest.approx(walked)
    assert at[1.0, "greedy"] <= at[0.7, "greedy"]
    assert predicted_sampling(recipe, run, target, POINT, 3, {"other"}) == []
