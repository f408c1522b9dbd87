"""Taking turns on one machine: benchmarks start side by side and measure one after the other."""

import argparse
import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


def add_turn(parser: argparse.ArgumentParser) -> None:
    """The option that names the file of the turn."""
    parser.add_argument(
        "--turn", type=Path, help="file locked while measuring; who shares it takes turns"
    )


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Hold the lock of `path` while the block runs, waiting for it first; None is no lock."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
