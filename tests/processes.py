"""Processes of other processes, for tests."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable

import psutil


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds. pytest's own time limit (pyproject.toml) is the only one: a busy machine may
    take minutes for what is usually done in one second."""
    while not condition():
        time.sleep(0.01)


def ended(processes: Iterable[psutil.Process]) -> bool:
    """Whether all have ended. One whose parent ended before stays a zombie where nothing reaps it,
    as in many a container."""

    def runs(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    return not any(map(runs, processes))


def below(parent: int, module: str) -> list[psutil.Process]:
    """The processes that the process ``parent`` and those below it have started with a module."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    found.append(process)
    return found


def writers(parent: int | None = None) -> list[psutil.Process]:
    """The processes that write states for this process, or for another's engine."""
    return below(parent or os.getpid(), "drafthead.capture.writer_process")
