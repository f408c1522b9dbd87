"""Capture's own pass over finished answers: killed, out of disk, and started again."""

import os
import signal
from datetime import UTC, datetime

import pytest
from rich.console import Console

from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import generate_units, prefill_units
from drafthead.capture.plan import make_plan
from drafthead.fsio import sweep
from drafthead.process import Child
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states.check import check_store
from drafthead.states.index import shard_name, unit_path
from drafthead.states.writer import open_store
from tests import disk
from tests.processes import wait_for, writers
from tests.refused import refused
from tests.vllm.runs import recipe_for

QUIET = Console(quiet=True)

UNITS, MOST = 20, 10


@pytest.fixture(scope="module")
def captured(llama, tmp_path_factory):
    """A run captured by prefill, its engine still on, and the bytes of its store."""
    folder = tmp_path_factory.mktemp("prefill")
    recipe = recipe_for(llama, folder, 2 * UNITS, 2, capture={"mode": "prefill"})
    plan, run = make_plan(parse_recipe(recipe, "test")), RunDir(folder / "t")
    open_store(run.states, plan.meta)
    engine = CaptureEngine(plan.recipe, plan.target, plan.meta, run.states)
    close, engine.close = engine.close, lambda: None
    generate_units(plan, run.answers, None, range(UNITS), lambda: engine, lambda _: None)
    prefill(plan, run, engine)
    yield plan, run, engine, files(run)
    close()


def prefill(plan, run, engine):
    prefill_units(plan, run.answers, run.states, range(UNITS), lambda: engine, lambda _: None)


def files(run):
    return {p.name: p.read_bytes() for p in run.states.glob("[!.]*")}


def test_killed_it_goes_on_and_ends_with_the_same_bytes(captured):
    plan, run, engine, whole = captured
    for path in run.states.glob("unit-*"):
        path.unlink()
    now = datetime.now(UTC).isoformat()
    order = {"stage": "capture", "recipe": plan.recipe.model_dump(mode="json"), "now": now}
    child = Child(
        "capture", "drafthead.capture.stages", order | {"run": str(run.root)}, run.root / "log"
    )
    wait_for(lambda: child.process.poll() is not None or writers(child.process.pid))
    (writer,) = writers(child.process.pid)
    for unit in (MOST, MOST + 1):  # which is all that it writes at a time
        disk.stop(run.states / shard_name(unit, 0), writer.pid)
    wait_for(unit_path(run.states, 0).exists)
    os.killpg(child.process.pid, signal.SIGKILL)
    child.close()
    done = [n for n in range(UNITS) if unit_path(run.states, n).exists()]
    assert 0 in done
    assert max(done) < MOST
    first = min(set(range(UNITS)) - set(done))  # two are written at a time, and either may be first
    assert {fault.unit for fault in check_store(run.states, QUIET)} == {first}  # only missing ones
    sweep(run.root)  # as a run does before it goes on
    written = {name: (run.states / name).stat().st_mtime_ns for name in files(run)}
    prefill(plan, run, engine)
    assert files(run) == whole
    kept = [unit_path(run.states, n).name for n in done]
    assert all((run.states / n).stat().st_mtime_ns == written[n] for n in kept)  # not done twice


def test_a_full_disk_stops_it_and_what_was_finished_counts(captured):
    plan, run, engine, whole = captured
    for number in (3, 4, 5):
        unit_path(run.states, number).unlink()
    disk.fill_for_children(run.states / shard_name(4, 0))
    with refused("unit-000004"):
        prefill(plan, run, engine)
    engine.flush()  # unit 3 may still be under way in the writer's other thread
    assert not list(run.states.glob(".*.tmp"))
    assert unit_path(run.states, 3).exists()
    assert not unit_path(run.states, 4).exists()
    prefill(plan, run, engine)
    assert files(run) == whole
