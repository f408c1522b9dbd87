"""No engine outlives whoever started it."""

import os
import signal
import subprocess
import sys
import time

import psutil

_PARENT = """
import sys, time
from pathlib import Path
from drafthead.prove.engine import EngineProcess
engine = EngineProcess({}, env={}, log=Path(sys.argv[1]), name="target alone").start()
print(engine._process.pid, flush=True)
time.sleep(600)
"""


def test_killed_parent_leaves_no_engine(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 60
    while "engine_worker" not in " ".join(child.cmdline()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.is_running()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
