"""The script that trains with several numbers of processes: what it compares, what it shares."""

import argparse
import json

import yaml

from benchmarks.train import processes as train_processes
from drafthead.fsio import write_json
from drafthead.rundir import RunDir


def test_each_optimizer_has_one_process_first_and_the_killed_run_another_number():
    made = train_processes.cases([2, 1, 4])
    for optimizer in ("muon", "adamw"):
        own = [case for case in made if case.train["optimizer"] == optimizer]
        assert own[0].processes == [1]
        assert any(case.processes == [4] for case in own)
    assert [4, 1] in [case.processes for case in made]
    assert all(case.train["optimizer"] == "adamw" for case in made if case.train.get("shard"))


def test_a_case_shares_what_came_before_training_and_nothing_else(tmp_path):
    given = RunDir(tmp_path / "runs" / "r")
    for folder in (given.states, given.answers, given.vocab, given.train, given.root / ".stages"):
        folder.mkdir(parents=True)
    for stage in ("capture", "vocab", "train"):
        write_json(given.root / ".stages" / f"{stage}.done.json", {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "train": {"row_tokens": 64, "ttt_steps": 5}}))
    options = argparse.Namespace(
        recipe=recipe, runs=tmp_path / "runs", out=tmp_path / "out", rows_per_step=4, ttt=3
    )
    path, run = train_processes.prepare(train_processes.Case("c", [1], {"shard": True}), options)
    assert yaml.safe_load(path.read_text())["train"] == {
        "row_tokens": 64, "ttt_steps": 3, "rows_per_step": 4, "shard": True
    }  # fmt: skip
    assert run.states.resolve() == given.states
    assert not run.train.exists()
    records = {record.name for record in (run.root / ".stages").iterdir()}
    assert records == {"capture.done.json", "vocab.done.json"}


def test_of_a_step_gone_through_twice_the_last_counts(tmp_path):
    run = RunDir(tmp_path)
    assert train_processes.metrics(run) == []
    run.train.mkdir()
    rows = [
        {"step": 10, "loss": 3.0},
        {"step": 10, "accepted_length": 1.5},
        {"step": 10, "loss": 2.0},
    ]
    (run.train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_processes.metrics(run) == [rows[2], rows[1]]
