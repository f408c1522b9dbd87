"""Processes of other processes, for tests."""

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil

PATIENCE = 240
"""Seconds that a loaded machine of two slow cores may take for what is usually done in one."""


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(processes: Iterable[psutil.Process]) -> bool:
    """Whether all have ended. One whose parent ended before stays a zombie where nothing reaps it,
    as in many a container."""

    def runs(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    return not any(map(runs, processes))
