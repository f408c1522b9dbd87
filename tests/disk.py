"""A disk that is full, for tests."""

import os
from pathlib import Path

from tests.processes import writers


def fill(monkeypatch, name):
    """From now on no file whose path holds ``name`` can be brought to disk."""
    real = os.fsync

    def full(fd):
        if name in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)


def fill_for_children(path: Path):
    """The next time that a child of this process writes the shard ``path``, the disk is full."""
    for writer in writers():
        _temporary(path, writer.pid).symlink_to("/dev/full")


def stop(path: Path, pid: int):
    """Whoever writes ``path`` in the process ``pid`` waits for ever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(_temporary(path, pid))


def _temporary(path: Path, pid: int) -> Path:
    return path.with_name(f".{path.name}.{pid}.tmp")
