"""An engine's process and what it started, however its parent or it itself ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from drafthead.capture.child import Child
from drafthead.errors import DraftheadError
from tests.processes import ended, wait_for

MODULE = """
import os, signal, subprocess, time
from multiprocessing.shared_memory import SharedMemory

from drafthead.capture.child import child_main


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
        with pytest.raises(DraftheadError, match=r"a test: the vLLM process died \(exit code -9\)"):
            next(messages)
    child.close()
    wait_for(lambda: ended([started]))
    wait_for(lambda: not Path("/dev/shm", made["memory"]).exists())


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
