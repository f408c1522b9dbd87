"""Generation and capture on a local Ray cluster, one of whose workers is killed."""

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.cluster import _here, on_cluster
from drafthead.capture.generate import work
from drafthead.capture.plan import make_plan
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from tests.processes import below, ended, wait_for
from tests.vllm.runs import recipe_for

QUIET = Console(quiet=True)
UNITS = 6


@pytest.fixture
def cluster(monkeypatch):
    """Two CPU workers' worth of Ray on this machine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(stages.__file__).parents[2]))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else what runs beside it starves the engines
    # Not a cluster that happens to run on this machine.
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


def files(run):
    return {
        path.relative_to(run.root): path.read_bytes()
        for folder in (run.answers, run.states)
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def starting():
    """A worker of Ray's whose engine is starting, with a unit in its hands, and the engine."""
    for engine in below(os.getpid(), "drafthead.capture.cluster"):
        worker = engine.parent()
        logs = Path(tempfile.gettempdir()).glob(f"drafthead-worker-{worker.pid}-*/logs/*.log")
        if any(log.stat().st_size for log in logs):
            return worker, engine
    return None


def kill_a_worker_that_works(location, killed):
    """Stops a worker's engine and SIGKILLs the worker once another has done a unit."""
    while not (found := starting()):
        time.sleep(0.05)
    worker, engine = found
    engine.suspend()  # else all might be done before the worker is killed
    while not list(Path(location).glob("answers/part-*")):
        time.sleep(0.01)
    worker.kill()
    engine.resume()
    killed.append(engine)


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
    killer.join()
    assert summary["conversations"] == UNITS * 4
    assert killed
    wait_for(lambda: ended(killed))  # the engine dies with its worker
    captured = stages.capture(recipe, many, console=QUIET)
    assert captured["greedy_agreement"] == 1.0
    assert files(one).keys() == files(many).keys()
    assert [name for name, body in files(one).items() if files(many)[name] != body] == []


def test_the_board_is_not_lost_with_a_workers_machine():
    class Where:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    machines = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        machines.add_node(num_cpus=1)
        ray.init(machines.address, log_to_driver=False, logging_level="error")
        kind = ray.remote(**_here(ray))(Where)
        nodes = ray.get([kind.remote().node.remote() for _ in range(3)])
        assert set(nodes) == {machines.head_node.node_id}
    finally:
        ray.shutdown()
        machines.shutdown()
