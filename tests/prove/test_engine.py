"""No engine outlives whoever started it."""

import subprocess
import sys

import psutil

from tests.processes import ended, wait_for

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
    wait_for(lambda: "engine_worker" in " ".join(child.cmdline()))
    parent.kill()
    parent.wait()
    wait_for(lambda: ended([child]))


_SERVED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from drafthead.prove.server import running_server
plan = SimpleNamespace(command=["sh", "-c", "sleep 600; true"], environment={})
with running_server(plan, log=Path(sys.argv[1]), name="server"):
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
