"""Triton's interpreter for tests on machines without a GPU: kernels are then Python.

No registry has Triton's CPU backend. A process of its own, because the interpreter must be chosen
before Triton is imported, and no other test wants Triton.
"""

import importlib.util
import os
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
