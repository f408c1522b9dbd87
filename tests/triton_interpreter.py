"""Triton's interpreter for tests on machines without a GPU: kernels are then Python.

No registry has Triton's CPU backend. A process of its own, because the interpreter must be chosen
before Triton is imported, and no other test wants Triton.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Where tools/setup.sh puts it on a machine without a GPU.
_APART = Path(sys.prefix) / "share" / "triton"


def environment(**more: str) -> dict[str, str]:
    """Environment variables of a process that interprets its Triton kernels."""
    there = _APART.is_dir() or importlib.util.find_spec("triton")
    assert there, f"no Triton; tools/setup.sh puts it into {_APART}"
    path = f"{REPO / 'src'}:{REPO}:{_APART}"
    return os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path} | more


def run_tests(*arguments: str, first: str = "") -> None:
    """Run pytest with its kernels interpreted, after the code ``first``; all tests that it chooses
    must run and pass."""
    code = f"import sys, pytest; {first} sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *arguments],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout, done.stdout[-500:]
    assert "skipped" not in done.stdout, done.stdout[-500:]
