"""An engine's process and what it started, however its parent or it itself ends."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from drafthead import process
from drafthead.process import Child, memory_fault
from tests.processes import ended, wait_for
from tests.refused import refused

MODULE = """
import os, signal, subprocess, time
from multiprocessing.shared_memory import SharedMemory

from drafthead.process import child_main


def work(order, report):
    memory = SharedMemory(create=True, size=4096)
    started = subprocess.Popen(["sleep", "86400"])
    report({"started": started.pid, "memory": memory.name})
    if order["then"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while order["then"] == "wait":
        time.sleep(1)


child_main(work)
"""


@pytest.fixture
def child(tmp_path):
    (tmp_path / "worker.py").write_text(MODULE)
    path = os.pathsep.join(sys.path)
    return lambda then: Child(
        "a test",
        "worker",
        {"then": then},
        tmp_path / "logs" / "log",
        {"PYTHONPATH": f"{tmp_path}{os.pathsep}{path}"},
    )


@pytest.mark.parametrize("then", ["die", "end", "wait"])
def test_what_a_child_started_ends_with_it(child, then):
    child = child(then)
    messages = child.messages()
    made = next(messages)
    started = psutil.Process(made["started"])
    if then == "die":
        with refused("a test", "signal 9", "engine.kv_cache_memory_bytes"):
            next(messages)
    child.close()
    wait_for(lambda: ended([started]))
    wait_for(lambda: not Path("/dev/shm", made["memory"]).exists())


def test_a_child_that_stands_still_is_named_while_something_is_due(child, monkeypatch):
    child = child("wait")
    child.receive()
    monkeypatch.setattr(process, "TICK_S", 0.01)
    child._standstill.limit = 0.05
    asked = itertools.count()
    due = lambda: next(asked) >= 20
    with refused(child.process.pid, child.log):
        child.receive(due=due)
    assert next(asked) > 20
    child.close()


def test_what_works_or_writes_to_its_log_is_not_stuck(tmp_path, monkeypatch):
    log, used = tmp_path / "log", 0.0
    log.touch()
    monkeypatch.setattr(process, "_used_s", lambda pid: used)
    standstill = process.Standstill("a test", 1, log, 10 * process.TICK_S)
    for step in range(40):
        standstill.tick()
        if step % 9 == 0:
            log.write_text(log.read_text() + "loading\n")
    for _ in range(40):
        standstill.tick()
        used += 0.02 * process.TICK_S
    with refused():
        for _ in range(12):
            standstill.tick()


def test_a_parent_that_is_killed_amid_a_message_takes_its_child_along(tmp_path):
    (tmp_path / "worker.py").write_text(MODULE)
    child = subprocess.Popen(
        [sys.executable, tmp_path / "worker.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child.stdin.write(json.dumps({"then": "wait"}) + '\n{"half": ')
    child.stdin.flush()
    made = json.loads(child.stdout.readline())
    started = psutil.Process(made["started"])
    child.stdin.close()
    child.wait()
    wait_for(lambda: ended([started]))
    wait_for(lambda: not Path("/dev/shm", made["memory"]).exists())


# As vLLM 0.32 and PyTorch 2.11 print them.
LOGS = {
    "ValueError: Free memory on device cuda:0 (35.2/79.2 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 71.3 GiB). Decrease": "engine.gpu_memory_utilization",
    "ValueError: Available memory on node 0 (20.1/23.4 GiB) on kv cache allocation is less than "
    "requested memory for kv (1024.0 GiB).": "engine.kv_cache_memory_bytes",
    "ValueError: No available memory for the cache blocks. Try": "serve.tensor_parallel_size",
    "ValueError: To serve at least one request with the model's max seq len (8192), (2.0 GiB KV "
    "cache is needed": "engine.max_model_len",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB": "engine.max_num_seqs",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1099511627776 bytes.": "engine.kv_cache_memory_bytes",
}


@pytest.mark.parametrize("line", LOGS)
def test_memory_that_ran_out_is_named_with_the_key_to_change(tmp_path, line):
    log = tmp_path / "log"
    before = "torch.OutOfMemoryError: of an engine before\n"
    log.write_text(f"{before}(EngineCore pid=7) ERROR {line}\nRuntimeError: see root cause above\n")
    assert LOGS[line] in memory_fault(log, len(before))


def test_other_faults_are_not_blamed_on_memory(tmp_path):
    log = tmp_path / "log"
    free = "Free memory on device (70/79 GiB) on startup. Desired GPU memory utilization is (0.9)\n"
    log.write_text(f"{free}KeyError: 'layers.0.norm'\n")
    assert memory_fault(log, 0) == ""
