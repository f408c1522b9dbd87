"""No engine outlives whoever started it."""

import contextlib
import signal
import subprocess
import sys

import psutil
import pytest

from tests.processes import ended, wait_for

_PARENT = """
import sys, time
from pathlib import Path
from drafthead.prove.engine import EngineProcess
engine = EngineProcess({}, env={}, log=Path(sys.argv[1]), name="target alone").start()
print(engine._child.process.pid, flush=True)
time.sleep(86_400)
"""


def test_killed_parent_leaves_no_engine(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: "engine_worker" in " ".join(child.cmdline()))
    parent.kill()
    parent.wait()
    wait_for(lambda: ended([child]))


_SERVED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from drafthead.prove.server import ServerProcess
plan = SimpleNamespace(command=["sh", "-c", "sleep 86400; true"], environment={})
with ServerProcess(plan, log=Path(sys.argv[1]), name="server"):
    pass
"""


def test_killed_parent_leaves_no_server(tmp_path):
    command = [sys.executable, "-c", _SERVED, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    served = lambda: [p for p in psutil.Process(parent.pid).children() if p.name() == "sh"]
    wait_for(lambda: served() and served()[0].children())
    processes = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    wait_for(lambda: ended(processes))


_STARTING = """
import contextlib, signal, sys
from pathlib import Path
from rich.console import Console
from drafthead.prove.engine import EngineProcess
from drafthead.prove.grid import running, start
from drafthead.prove.server import ServerProcess
from drafthead.plan import Plan

class Hanging(Plan):
    command = ["sh", "-c", "sleep 86400; true"]

def waiting(engine, wait):
    print("all are started", flush=True)
    return wait(engine)

for kind in (EngineProcess, ServerProcess):
    kind.wait_ready = lambda self, wait=kind.wait_ready: waiting(self, wait)
# Whoever starts the suite in the background has it ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
over, log, python = sys.argv[1:]
if over == "engine":
    sys.executable = python  # never ready
with contextlib.ExitStack() as stack:
    engines = [running(Hanging([], {}), over, Path(log), name) for name in "abc"]
    start(engines, stack, Console(quiet=True))
"""


@pytest.mark.parametrize("over", ["engine", "http"])
def test_ctrl_c_ends_engines_that_start_and_waits_for_none(tmp_path, over):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 86400\n")
    python.chmod(0o755)
    command = [sys.executable, "-c", _STARTING, over, str(tmp_path / "log"), str(python)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen(command, text=True, **pipes)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "all are started\n"
    below = lambda: psutil.Process(parent.pid).children(recursive=True)
    wait_for(lambda: sum(process.name() == "sleep" for process in below()) == 3)
    processes = below()
    parent.send_signal(signal.SIGINT)
    try:
        _, err = parent.communicate()
        assert err.endswith("KeyboardInterrupt\n")
        assert ended(processes)
    finally:
        for process in (parent, *processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
