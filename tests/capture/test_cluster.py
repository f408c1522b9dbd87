"""The parts of a cluster's work that need no cluster."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from drafthead.capture.cluster import (
    ATTEMPTS,
    Worker,
    WorkQueue,
    _connected,
    _describe,
    _order,
    _room,
    _scratch,
    check_address,
    on_cluster,
    spread,
)
from drafthead.capture.plan import make_plan
from drafthead.data.answers import part_path, read_left_out, write_part
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StateReader, StateWriter, StoreMeta
from drafthead.states.remote import Location, fetch_store, publish_unit
from tests.refused import refused
from tests.states.test_store import META, make_sample
from tests.vllm.runs import recipe_for

QUIET = Console(quiet=True)


def test_units_of_a_lost_worker_are_given_out_first_and_none_twice():
    queue = WorkQueue([0, 1, 2, 3, 4])
    assert [queue.take("a"), queue.take("b"), queue.take("a")] == [0, 1, 2]
    queue.finish("a", 0)
    assert queue.worker_died("a") is None  # it held 2
    assert queue.poll()[:2] == (3, 1)
    assert [queue.take("b") for _ in range(4)] == [2, 3, 4, None]
    for unit in (3, 1, 4, 2):
        queue.finish("b", unit)
    assert queue.worker_died("b") is None
    assert sorted(queue.done) == [0, 1, 2, 3, 4]
    assert queue.poll()[:2] == (0, 0)


def test_a_worker_that_was_lost_is_given_nothing_more():
    queue = WorkQueue([0, 1])
    assert queue.take("a") == 0
    queue.worker_died("a")
    assert queue.take("a") is None  # it asked before it died: nobody would ever do that unit
    assert [queue.take("b"), queue.take("b")] == [0, 1]


def test_answers_are_counted_since_the_last_look():
    queue = WorkQueue([])
    queue.count(1, 30)
    queue.count(2, 50)
    assert queue.poll() == (0, 0, 3, 80)
    assert queue.poll() == (0, 0, 0, 0)


def test_what_kills_every_worker_is_named():
    queue = WorkQueue([7, 8])
    for worker in range(ATTEMPTS):
        assert queue.take(str(worker)) == 7
        found = queue.worker_died(str(worker))
    assert found == "unit 7"
    queue = WorkQueue([7])
    assert [queue.worker_died(str(w)) for w in range(ATTEMPTS)][-1] == "starting an engine"


@pytest.mark.parametrize("scheme", ["file://{}/there", "memory://{}/there"])
def test_a_store_goes_to_a_location_and_comes_back(tmp_path, scheme):
    store, copy = tmp_path / "store", tmp_path / "copy"
    with StateWriter(store, META, shard_bytes=1 << 11) as writer:
        for unit in range(3):
            writer.submit(unit, [make_sample(unit * 3 + i, tokens=9) for i in range(3)])
    there = Location(scheme.format(tmp_path))
    assert there.names("states") == set()
    there.put(store / "meta.json", "states/meta.json")
    for unit in (2, 0):
        publish_unit(store, META, unit, there, "states")
    assert fetch_store(there, "states", copy, QUIET)["units"] == 2
    assert len(StateReader(copy, partial=True)) == 6
    publish_unit(store, META, 1, there, "states")
    publish_unit(store, META, 1, there, "states")  # again, as a worker that was thought lost
    assert fetch_store(there, "states", copy, QUIET)["units"] == 1  # and only what was missing
    files = {p.name for p in store.iterdir()}
    assert there.names("states") == files
    assert {p.name for p in copy.iterdir()} == files
    assert all((copy / name).read_bytes() == (store / name).read_bytes() for name in files)


@pytest.mark.parametrize("scheme", ["file://{}/there", "memory://{}/there"])
def test_what_is_half_there_is_swept(tmp_path, scheme, monkeypatch):
    (tmp_path / "a").write_bytes(b"whole")
    there = Location(scheme.format(tmp_path))
    there.put(tmp_path / "a", "states/a")

    def half(fs, local, final):
        with fs.open(final, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    kind = type(there._fs)
    with monkeypatch.context() as patched:
        patched.setattr(kind, "put_file", half)
        patched.setattr(kind, "mv", pytest.fail)
        with pytest.raises(KeyboardInterrupt):
            there.put(tmp_path / "a", "states/b")
    assert len(there.names("states")) == 2
    there.sweep("states")
    there.sweep("answers")  # not there
    assert there.names("states") == {"a"}


@pytest.mark.parametrize("mode", ["generate", "prefill", "online"])
def test_a_location_with_the_answers_of_another_run_is_refused(llama, tmp_path, mode):
    """However whole they are: `--overwrite` clears this run's folder, not the location."""

    def plan(generate=None, engine=None):
        given = {"generate": generate or {}, "engine": engine or {}}
        recipe = recipe_for(llama, tmp_path, 8, 4, capture={"mode": mode}, **given)
        there = f"file://{tmp_path}/there"
        return make_plan(on_cluster(parse_recipe(recipe, "test"), "local", None, there))

    first, there = plan(), Location(f"file://{tmp_path}/there")
    _describe(first, there)
    for unit in range(len(first.units)):
        write_part(tmp_path, unit, [], {})
        there.put(part_path(tmp_path, unit), f"answers/{part_path(tmp_path, unit).name}")
    run, quiet = RunDir(tmp_path / "run"), Console(quiet=True)
    spread("generate", first, run, quiet)  # all is there
    other = {"extra": {"hf_overrides": {"id2label": {0: "a"}}}}
    for what, changed in (
        ("generate", plan(generate={"temperature": 0.7})),
        ("engine.extra", plan(engine=other)),
    ):
        with refused("there", what):
            spread("generate", changed, run, quiet)
    for _ in range(2):  # its own is not another's
        _describe(changed, Location(f"file://{tmp_path}/elsewhere"))
    assert "engine.extra" not in first.meta.inputs  # else a store from before would be another's


def published(folder):
    """A store of one unit, and a location that has the unit too."""
    store, there = folder / "store", Location(f"file://{folder}/there")
    with StateWriter(store, StoreMeta((1, 2), 4, 16, "fp32", 1, {})) as writer:
        writer.submit(0, [make_sample(0)])
    publish_unit(store, StoreMeta.load(store), 0, there, "states")
    return store, there


def test_what_a_killed_fetch_left_goes_with_the_next(tmp_path, monkeypatch):
    store, there = published(tmp_path)
    there.put(store / "meta.json", "states/meta.json")
    copy = tmp_path / "copy"
    (copy / ".incoming").mkdir(parents=True)
    (copy / ".incoming" / ".unit-000000.json.1.tmp").write_bytes(b"half")
    fetch_store(there, "states", copy, QUIET)
    assert {p.name for p in copy.iterdir()} == {p.name for p in store.iterdir()}


def test_killed_while_a_unit_is_published_again_it_counts_as_missing(tmp_path, monkeypatch):
    """Its shards may be another engine's by then: the old index does not fit them."""
    store, there = published(tmp_path)
    real = Location.put

    def put(self, local, name):
        if name.endswith(".json"):
            raise KeyboardInterrupt
        real(self, local, name)

    monkeypatch.setattr(Location, "put", put)
    with pytest.raises(KeyboardInterrupt):
        publish_unit(store, StoreMeta.load(store), 0, there, "states")
    assert there.names("states") == {"unit-000000-00.safetensors"}


@pytest.mark.parametrize("name", ["unit-000000.json", "unit-000000-00.safetensors"])
def test_a_unit_that_is_not_whole_there_is_not_brought(tmp_path, name):
    store, there = published(tmp_path)
    there.put(store / "meta.json", "states/meta.json")
    copy = tmp_path / "copy"
    altered = tmp_path / "there" / "states" / name
    altered.write_bytes(altered.read_bytes().replace(b"c0", b"c9") + b" ")
    with refused(f"{there.url}/states/unit-000000.json"):
        fetch_store(there, "states", copy, QUIET)
    assert not (copy / "unit-000000.json").exists()


def test_a_worker_brings_the_answers_of_a_unit_that_it_is_to_prefill(tmp_path):
    write_part(tmp_path / "there" / "answers", 3, [], {"too long": ["c3"]})
    order = {"stage": "capture", "run": str(tmp_path / "run")}
    worker = Worker("000", order, {3: []}, None, f"file://{tmp_path}/there")
    try:
        assert worker._asked(3) == (3, [])
        assert read_left_out(worker.run.answers) == {"too long": ["c3"]}
        assert worker._asked(None) is None
        assert str(os.getpid()) in worker.scratch.name
    finally:
        shutil.rmtree(worker.scratch)


def test_workers_find_a_target_that_is_named_from_here(llama, tmp_path, monkeypatch):
    """Theirs is the folder that `ray start` was called in."""
    monkeypatch.chdir(llama.parent)
    plan = make_plan(parse_recipe(recipe_for(f"./{llama.name}", tmp_path, 8, 4), "test"))
    order = _order("generate", plan, RunDir(Path("run")))
    assert order["recipe"]["target"]["path"] == str(llama)
    assert order["run"] == str(llama.parent / "run")


def test_workers_are_as_many_as_machines_have_room_for():
    class Ray:
        def nodes(self):
            kinds = ((3, True), (3, True), (0, True), (8, False))
            return [{"Alive": up, "Resources": {"CPU": 4.0, "GPU": n}} for n, up in kinds]

    assert [_room(Ray(), {"num_gpus": n}) for n in (1, 2, 3)] == [6, 2, 2]
    assert _room(Ray(), {"num_cpus": 1}) == 12
    with refused("engine.tensor_parallel_size", 4, 3):
        _room(Ray(), {"num_gpus": 4})  # Ray would wait for ever


def test_what_killed_workers_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"drafthead-worker-{pid}-x").mkdir()
    made = _scratch()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"drafthead-worker-{os.getpid()}-x", made.name}


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_wrong_address_is_told_before_ray_tries_it_for_a_minute(tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address("{}{}:{}".format(scheme, *server.getsockname()))
    recipe = parse_recipe(recipe_for("target", tmp_path, 4, 2), "test")
    with socket.socket() as mute:  # nobody else can listen there meanwhile
        mute.bind(("127.0.0.1", 0))
        address = "{}{}:{}".format(scheme, *mute.getsockname())
        recipe = on_cluster(recipe, address, None, None)
        with refused("cluster.address", address, "`auto`"):
            _connected(recipe).__enter__()
    for name in (None, "auto", "local"):
        check_address(name)
    for wrong in ("head", "head:port", "head:99999", ":6379", "[::1"):
        with refused("cluster.address", "HOST:PORT"):
            check_address(scheme + wrong)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no keys"), PermissionError("no keys"), ConnectionRefusedError(111, "no keys")],
)
def test_what_a_location_says_is_told_with_its_name(tmp_path, monkeypatch, error):
    """Each kind of it has errors of its own; what S3 denies has no number."""

    def failing(*_, **__):
        raise error

    there = Location("memory://bucket/run")
    (tmp_path / "a").touch()
    for name in ("ls", "exists", "put_file", "get_file"):
        monkeypatch.setattr(type(there._fs), name, failing)
    for ask in (
        lambda: there.names("states"),
        lambda: there.exists("states/a"),
        lambda: there.put(tmp_path / "a", "states/a"),
        lambda: there.get("states/a", tmp_path / "b"),
    ):
        with refused("memory://bucket/run/states", "no keys"):
            ask()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_locations_that_cannot_be():
    with refused("nowhere://x"):
        Location("nowhere://x")
    with refused("memory://empty/states/meta.json"):
        Location("memory://empty").get("states/meta.json", Path("x"))
