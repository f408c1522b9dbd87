"""Who serves a head is told whether what is served was proved."""

import json
import os

import pytest
from rich.console import Console

from drafthead.fsio import read_json, write_json
from drafthead.plan import Plan, Setting
from drafthead.prove.proof import command_line, proof_path, seal, why_unproved
from drafthead.prove.verify import Outcome, Plans, verify
from drafthead.targets import load_target
from tests.prove import made_run


def altered(run, **changes):
    record = read_json(proof_path(run), "") | changes
    write_json(proof_path(run), record | {"seal": seal(record)})


def test_a_command_with_a_path_that_is_not_utf8_can_be_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["drafthead", "verify", os.fsdecode(b"caf\xe9 1.yaml")])
    write_json(tmp_path / "record.json", {"command": command_line()})
    assert read_json(tmp_path / "record.json", "")["command"] == "drafthead verify 'caf? 1.yaml'"


def test_a_verify_ended_before_it_signs_off_leaves_no_proof_of_another_outcome(
    tmp_path, monkeypatch
):
    """Hashing a large target takes minutes, in which the new outcome is on disk already."""
    recipe, run = made_run.make(tmp_path)
    runs = read_json(run.verify_json, "")["runs"]

    def ended(*_):
        assert read_json(run.verify_json, "")["lossless"] is False
        raise KeyboardInterrupt

    name = "drafthead.prove.verify"
    monkeypatch.setattr(f"{name}.many_prompts", lambda *_: [])
    plan = Plan([Setting("model", "m", "")], {})
    monkeypatch.setattr(f"{name}.verify_plans", lambda *_: Plans({(1, "greedy"): plan}, plan, plan))
    failed = Outcome([one | {"lossless": False} for one in runs])
    monkeypatch.setattr(f"{name}.prove_lossless", lambda *_: failed)
    monkeypatch.setattr(f"{name}.write_proof", ended)
    with pytest.raises(KeyboardInterrupt):
        verify(recipe, run, console=Console(quiet=True))
    assert "was not proved" in why_unproved(run, 1)


def test_a_k_that_was_not_proved_is_doubted(tmp_path):
    _, run = made_run.make(tmp_path)
    assert why_unproved(run, 1) is None
    assert (
        "k = 2 was not proved (k = 1, 3, 5 was): `drafthead verify RECIPE --k 2`"
        in why_unproved(run, 2)
    )
    altered(run, served={"10": {"command": "c"}, "2": {"command": "c"}})
    assert "(k = 2, 10 was)" in why_unproved(run, 3)
    assert "drafts were not proved" in why_unproved(run, 2, "probabilistic")
    both = {"command": "c", "draft_sample_methods": ["greedy", "probabilistic"]}
    altered(run, served={"10": {"command": "c"}, "2": both})
    assert why_unproved(run, 10, "probabilistic") is None
    assert why_unproved(run, 10, by_load=[[1, 8, 10]])
    given = {"speculative_config": {"num_speculative_tokens_per_batch_size": [[1, 8, 10]]}}
    altered(run, served={"10": {"command": "c", "engine_args": given}})
    assert why_unproved(run, 10)  # proved with other drafts by load
    assert why_unproved(run, 10, by_load=[[1, 8, 10]]) is None
    altered(run, lossless=False)
    assert "not lossless" in why_unproved(run, 10)
    (run.head / "more.json").write_text("{}")
    assert "another head" in why_unproved(run, 10)
    proof_path(run).unlink()
    assert "k = 3 was not proved" in why_unproved(run, 3)


def test_a_target_that_changed_since_is_doubted(tmp_path):
    recipe, run = made_run.make(tmp_path)
    target = load_target(recipe.target.path)
    assert why_unproved(run, 1, target=target) is None
    (target.path / "generation_config.json").write_text("{}")
    assert str(target.path) in why_unproved(run, 1, target=target)


@pytest.mark.parametrize(("named", "proved"), [(None, True), (2, False), (1, True)])
def test_serve_says_so(named, proved, tmp_path, monkeypatch, drafthead):
    """Of a k that the recipe names; what drafthead recommends was always proved."""
    recipe, run = made_run.make(tmp_path, proved=(1, 5))
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    data["serve"] = {} if named is None else {"num_speculative_tokens": named}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    monkeypatch.setattr("drafthead.serve.check_fit", lambda *_: ([], []))  # crafted, with zeros
    monkeypatch.setattr("os.execvpe", lambda *_: None)
    words = f"k = {named or 5} was not proved"
    for how in ("--print",), ():
        code, out, err = drafthead("serve", str(path), "--runs", str(run.root.parent), *how)
        assert code == 0, err
        assert (words in err) is not proved
        assert ("num_speculative_tokens" in out) is bool(how)
    _, out, _ = drafthead("serve", str(path), "--runs", str(run.root.parent), "--print", "--json")
    assert (words in (json.loads(out)["not_proved"] or "")) is not proved
