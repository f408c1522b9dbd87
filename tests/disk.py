"""A disk that is full, for tests."""

import os
from pathlib import Path

import psutil


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
    for child in psutil.Process().children():
        path.with_name(f".{path.name}.{child.pid}.tmp").symlink_to("/dev/full")
