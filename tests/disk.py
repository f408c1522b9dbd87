"""A disk that is full, for tests."""

import os


def fill(monkeypatch, name):
    """From now on no file whose path holds ``name`` can be brought to disk."""
    real = os.fsync

    def full(fd):
        if name in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
