"""Generation and capture on a local Ray cluster, one of whose workers is killed."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.cluster import on_cluster
from drafthead.capture.plan import make_plan
from drafthead.capture.work import work
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from tests.vllm.runs import recipe_for

QUIET = Console(quiet=True)
UNITS = 6


@pytest.fixture
def cluster(monkeypatch):
    """Two CPU workers' worth of Ray on this machine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(stages.__file__).parents[2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def files(run):
    return {
        path.relative_to(run.root): path.read_bytes()
        for folder in (run.answers, run.states)
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def workers():
    """Ray's workers that have an engine, each with its children."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = process.children() if "ray::Hand" in " ".join(process.cmdline()) else []
            if any("drafthead.capture.cluster" in child.cmdline() for child in children):
                found.append((process, children))
    return found


def kill_a_worker_that_works(location, killed):
    """SIGKILLs a worker while its engine runs, once the first unit has arrived."""
    while not (found := workers()):  # looked for early: what is left to do then takes a second
        time.sleep(0.05)
    while not list(Path(location).glob("answers/part-*")):
        time.sleep(0.01)
    process, children = found[0]
    os.kill(process.pid, signal.SIGKILL)
    killed += [child.pid for child in children]


def test_the_store_is_the_same_though_a_worker_is_killed(cluster, llama, tmp_path):
    alone = parse_recipe(recipe_for(llama, tmp_path, UNITS * 4, 4), "test")
    one = RunDir(tmp_path / "one")
    plan = make_plan(alone)
    assert len(plan.units) == UNITS
    work("generate", plan, one, range(UNITS), lambda _: None)
    location = tmp_path / "there"
    recipe = on_cluster(alone, "auto", 2, f"file://{location}")
    many, killed = RunDir(tmp_path / "many"), []
    killer = threading.Thread(target=kill_a_worker_that_works, args=(location, killed), daemon=True)
    killer.start()
    summary = stages.generate(recipe, many, console=QUIET)
    killer.join(timeout=10)
    assert summary["conversations"] == UNITS * 4
    assert killed
    assert not any(psutil.pid_exists(pid) for pid in killed)  # the engine died with its worker
    captured = stages.capture(recipe, many, console=QUIET)
    assert captured["greedy_agreement"] == 1.0
    assert files(one).keys() == files(many).keys()
    assert [name for name, body in files(one).items() if files(many)[name] != body] == []
