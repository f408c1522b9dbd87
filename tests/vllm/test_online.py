"""Training on a running engine's states: the head is the very one that a store gives."""

import shutil

import psutil
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import generate_units, prefill_units
from drafthead.capture.plan import make_plan
from drafthead.fsio import sha256_file
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states.writer import open_store
from drafthead.train.stage import train
from drafthead.vocab import vocab
from tests.vllm.runs import recipe_for

QUIET = Console(quiet=True)
TRAIN = {"epochs": 2, "row_tokens": 128, "eval_every": 4, "ttt_steps": 2, "learning_rate": 1e-3}


def test_online_gives_the_head_that_a_store_gives(llama, tmp_path):
    sections = {"vocab": {"size": 300}, "train": TRAIN}
    stored, online = (
        parse_recipe(
            recipe_for(llama, tmp_path, 24, 12, **sections, capture={"mode": mode}), "test"
        )
        for mode in ("prefill", "online")
    )
    first, second = RunDir(tmp_path / "stored"), RunDir(tmp_path / "online")
    plan = make_plan(stored)
    open_store(first.states, plan.meta)
    engine = CaptureEngine(plan.recipe, plan.target, plan.meta, first.states)
    close, engine.close = engine.close, lambda: None
    try:
        units = range(len(plan.units))
        generate_units(plan, first.answers, None, units, lambda: engine, lambda _: None)
        prefill_units(plan, first.answers, first.states, units, lambda: engine, lambda _: None)
    finally:
        close()
    shutil.copytree(first.answers, second.answers)
    summaries = []
    for recipe, run in ((stored, first), (online, second)):
        captured = stages.capture(recipe, run, console=QUIET)
        vocab(recipe, run, console=QUIET)
        trained = train(recipe, run, console=QUIET)
        assert trained["steps"] > 8
        summaries.append((captured, trained))
    assert summaries[1][0]["bytes"] == 0 < summaries[0][0]["bytes"]
    assert summaries[1][0]["tokens"] == summaries[0][0]["tokens"]
    assert not second.states.exists()
    times = {"train_seconds", "waiting"}
    ours, theirs = ({k: v for k, v in t.items() if k not in times} for _, t in summaries)
    assert ours == theirs
    heads = [sha256_file(run.train / "best" / "model.safetensors") for run in (first, second)]
    assert heads[0] == heads[1]
    assert not psutil.Process().children(recursive=True)  # the engine has ended
