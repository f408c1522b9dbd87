"""The process that writes states, with a recorder on the CPU in the engine's place."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from drafthead import process as process_module
from drafthead.capture import assemble, writer_process
from drafthead.capture.checks import ALL_ZERO, MISSING, NOT_FINITE
from drafthead.capture.recorder import StateRecorder
from drafthead.capture.shared_memory import PAGE, PagePool
from drafthead.capture.writer_process import WriterProcess
from drafthead.states import StateReader, StoreMeta, buffer_pool
from drafthead.states.check import check_store
from drafthead.states.index import shard_name, unit_path
from tests import disk
from tests.processes import ended, wait_for

L, H, CAPACITY = 3, 64, 32
QUIET = Console(quiet=True)
META = StoreMeta((1, 3), 4, H, "fp32", 4, {})
OPTIONS = {
    "shard_bytes": 1 << 20,
    "greedy": False,
    "strict": True,
    "trust_remote_code": False,
    "hf_overrides": None,
}
SHAPE = (CAPACITY, L, H, "fp32")


class Engine:
    """What an engine's worker does with it; sequence ``key`` is one unit's."""

    def __init__(self, process, sink, target, meta=META):
        self.process = process
        self.recorder = StateRecorder(torch.float32, torch.device("cpu"), self.process)
        self.trouble = self.process.open(sink, asdict(meta), str(target), OPTIONS)

    def run(self, key, tokens=40, *, factor=1.0):
        """A sequence, two rows a step."""
        states = states_of(key, tokens) * factor
        for start in range(0, len(states), 2):
            rows = states[start : start + 2]
            self.recorder.record(list(rows.unbind(1)), [(key, start, len(rows))])

    def save(self, key, place, tokens=40):
        return self.save_all([key], place, tokens)

    def save_all(self, keys, place, tokens=40):
        self.recorder.end_unit()
        sequences = {key: list(range(tokens)) for key in keys}
        self.process.send_unit(place, sequences, [wanted(key, 5) for key in keys])
        return self.process.trouble()


def wanted(key, prompt=2):
    about = {"conversation": f"c{key}", "split": "train"}
    return {"key": key, "prompt_len": prompt, "prompt_mask": [False] * prompt, **about}


def states_of(key, tokens):
    return torch.randn(tokens - 1, L, H, generator=torch.Generator().manual_seed(key))


@pytest.fixture(scope="module")
def process():
    process = WriterProcess(*SHAPE)
    yield process
    process.close()


@pytest.fixture
def engine(process, llama, tmp_path):
    engine = Engine(process, {"store": str(tmp_path)}, llama)
    assert engine.trouble is None
    return engine


def test_units_of_more_rows_than_the_ring_has_arrive_whole(engine, tmp_path):
    for key in range(4):
        engine.run(key)
        assert engine.save(key, key) is None
    assert engine.process.flush() is None
    reader = StateReader(tmp_path)
    assert [reader[key].conversation for key in range(4)] == ["c0", "c1", "c2", "c3"]
    for key in range(4):
        assert torch.equal(reader[key].states, states_of(key, 40))


def test_a_smaller_unit_lies_in_the_memory_of_a_larger_one(monkeypatch):
    monkeypatch.setattr(buffer_pool, "_free", {})
    for module in (assemble, writer_process):
        monkeypatch.setattr(module, "SEGMENT_ROWS", 8)
    real, made = buffer_pool.mmap.mmap, []
    monkeypatch.setattr(buffer_pool.mmap, "mmap", lambda *a, **k: made.append(a) or real(*a, **k))
    sizes = []
    for tokens in (9, 6, 4, 3):
        rows, sequences = (
            assemble.SequenceAssembler(),
            {key: list(range(tokens)) for key in range(6)},
        )
        for key in sequences:
            rows.note(np.array([[key, rows.rows, 0, tokens - 1]]))
            rows.append(states_of(key, tokens))
        found = list(writer_process._samples(rows, sequences, [*map(wanted, sequences)], META))
        states = [sample.states for _, sample in found]
        assert all(torch.equal(s, states_of(k, tokens)) for k, s in enumerate(states))
        sizes.append(len(made))
        del found, states
    assert sizes[0] == sizes[-1]


def test_states_reach_pages(process, llama):
    pages = PagePool.create(3)
    engine = Engine(process, {"pages": pages.path}, llama)
    engine.run(0)
    engine.save(0, [[2]])
    assert engine.process.flush() is None
    raw = pages.take([2], 39 * L * H * 4)
    assert torch.equal(raw.view(torch.float32).view(39, L, H), states_of(0, 40))
    pages.close()


def test_unusable_samples_are_left_out_of_their_unit(engine, tmp_path):
    engine.run(0, factor=float("nan"))
    engine.run(1)
    engine.run(2, factor=0)
    engine.run(3, 20)  # the other half was computed elsewhere
    assert engine.save_all([3, 2, 1, 0], 1) is None
    assert engine.save(0, 0) is None  # of no row at all
    assert engine.process.flush() is None
    reader = StateReader(tmp_path, partial=True)
    assert [sample.conversation for sample in map(reader.__getitem__, range(len(reader)))] == ["c1"]
    assert torch.equal(reader[0].states, states_of(1, 40))
    left_out = [unit.checks["left_out"] for unit in reader.units]
    assert left_out == [
        {MISSING: ["c0"]},
        {MISSING: ["c3"], ALL_ZERO: ["c2"], NOT_FINITE: ["c0"]},
    ]


def test_pages_of_an_unusable_sample_are_zero(process, llama):
    pages = PagePool.create(3)
    pages.put([0, 1, 2], [torch.ones(3 * PAGE, dtype=torch.uint8)])
    engine = Engine(process, {"pages": pages.path}, llama)
    engine.run(0, factor=float("inf"))
    engine.run(1)
    engine.save_all([0, 1], [[2], [0]])
    assert engine.process.flush() is None
    assert not pages.take([2], PAGE).any()
    assert pages.take([0], PAGE).any()
    pages.close()


def test_what_is_wrong_with_a_unit_is_said_once_and_the_next_one_counts(engine, tmp_path):
    disk.fill_for_children(tmp_path / shard_name(0, 0))
    engine.run(0)
    engine.save(0, 0)
    assert "the disk is full" in engine.process.flush()
    disk.fill_for_children(tmp_path / shard_name(1, 0))
    engine.run(1)
    engine.save(1, 1)
    assert "the disk is full" in engine.process.flush()
    assert engine.process.flush() is None
    engine.run(2)
    assert engine.save(2, 2) is None
    assert engine.process.flush() is None
    assert not unit_path(tmp_path, 0).exists()
    assert not unit_path(tmp_path, 1).exists()
    assert unit_path(tmp_path, 2).exists()


def test_a_fault_is_told_to_an_engine_that_only_goes_on(engine, tmp_path):
    disk.fill_for_children(tmp_path / shard_name(0, 0))
    engine.run(0)
    engine.save(0, 0)
    key = 1

    def told():
        nonlocal key
        engine.run(key)
        key += 1
        return "disk is full" in (engine.process.trouble() or "")

    wait_for(told)


def test_a_store_of_something_else_is_refused(engine, llama, tmp_path):
    meta = StoreMeta((1, 3), 4, H, "fp32", 9, {})
    other = Engine(engine.process, {"store": str(tmp_path)}, llama, meta)
    assert "holds states of another run" in other.trouble


def test_it_keeps_off_the_engines_cores_and_gpu(process):
    environment = psutil.Process(process._process.pid).environ()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 1 << 20  # what it freed, it keeps
    cores = len(os.sched_getaffinity(0))
    assert 1 <= int(environment["OMP_NUM_THREADS"]) <= max(1, cores // 4)
    with open(f"/proc/{process._process.pid}/maps") as maps:
        assert not [line for line in maps if "/vllm/" in line]


def test_a_process_that_stands_still_holds_the_engine_up_and_loses_nothing(engine, tmp_path):
    child = psutil.Process(engine.process._process.pid)
    child.suspend()
    running = threading.Thread(target=engine.run, args=(1,))
    running.start()
    wait_for(lambda: engine.process.waits)
    child.resume()
    running.join()
    engine.save(1, 1)
    assert engine.process.flush() is None
    assert torch.equal(StateReader(tmp_path, partial=True)[0].states, states_of(1, 40))


def test_a_process_that_stands_still_for_long_is_named(llama, tmp_path, monkeypatch):
    engine = Engine(WriterProcess(*SHAPE), {"store": str(tmp_path)}, llama)
    pid = engine.process._process.pid
    psutil.Process(pid).suspend()
    for module in (process_module, writer_process):
        monkeypatch.setattr(module, "TICK_S", 0.01)
    engine.process._standstill.limit = 0.05
    engine.run(1, 2 * CAPACITY)
    for said in (engine.save(1, 1), engine.process.flush()):
        assert f"process {pid} is stuck" in said
    engine.process.close()


def block_shards(engine, store):
    """Who writes the shards of the first two units waits for ever; a third is not begun then."""
    for unit in (0, 1):
        disk.stop(store / shard_name(unit, 0), engine.process._process.pid)


def test_a_disk_that_stands_still_holds_the_engine_up_and_its_death_frees_it(llama, tmp_path):
    engine = Engine(WriterProcess(*SHAPE), {"store": str(tmp_path)}, llama)
    block_shards(engine, tmp_path)
    for key in range(3):
        engine.run(key, 9)
        assert engine.save(key, key, 9) is None
    running = threading.Thread(target=engine.run, args=(3, 2 * CAPACITY))
    running.start()  # more rows than the ring has
    wait_for(lambda: engine.process.waits)
    assert running.is_alive()
    os.kill(engine.process._process.pid, signal.SIGKILL)
    running.join()
    for said in (engine.save(3, 3), engine.process.flush()):
        assert "died (exit code -9, killed: out of memory?)" in said


def test_it_dies_with_an_engine_that_is_killed_whatever_it_waits_for(llama, tmp_path):
    code = (
        "import sys, threading, time; from pathlib import Path\n"
        "from tests.capture.test_writer_process import Engine, block_shards\n"
        "from drafthead.capture.writer_process import WriterProcess\n"
        "store, process = Path(sys.argv[1]), WriterProcess(32, 3, 64, 'fp32')\n"
        "engine = Engine(process, {'store': str(store)}, sys.argv[2])\n"
        "engine.run(0); engine.save(0, 2); engine.process.flush(); block_shards(engine, store)\n"
        "for key in range(3): engine.run(key, 9); engine.save(key, key % 2, 9)\n"
        "threading.Thread(target=engine.run, args=(3, 64)).start()\n"
        "while not engine.process.waits: time.sleep(0.01)\n"
        "print(engine.process._process.pid, flush=True)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(llama)]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    wait_for(lambda: ended([child]))
    assert {fault.unit for fault in check_store(tmp_path, QUIET)} == {0}  # only missing ones
    assert torch.equal(StateReader(tmp_path, partial=True)[0].states, states_of(0, 40))


def test_a_fault_of_its_own_ends_it_and_is_said(llama, tmp_path):
    engine = Engine(WriterProcess(*SHAPE), {"store": str(tmp_path)}, llama)
    block_shards(engine, tmp_path)
    engine.run(0)
    engine.save(0, 0)
    engine.process.send_unit(1, {}, [{}])
    assert "died (exit code 1)" in engine.process.flush()
    engine.process.close()
