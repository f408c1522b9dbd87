"""Measured points of a grid, each on disk as soon as it is known: a bench that was ended goes on
with the points that are missing."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from drafthead.fsio import fingerprint, read_json, write_json
from drafthead.prove.pairing import Point
from drafthead.prove.records import Cell


class Cells:
    """The points measured so far with the same inputs.

    Args:
        folder: where they are kept.
        inputs: JSON-able; everything that they depend on.
    """

    def __init__(self, folder: Path, inputs: Any):
        self.path = folder / f"cells-{fingerprint(inputs)}.json"
        self._cells: dict[str, dict] = {}
        if self.path.exists():
            self._cells = read_json(
                self.path, "the points of an unfinished bench", dict[str, Cell], "delete it"
            )

    @staticmethod
    def _key(point: Point) -> str:
        return fingerprint(asdict(point))

    def __contains__(self, point: Point) -> bool:
        return self._key(point) in self._cells

    def __getitem__(self, point: Point) -> dict:
        return self._cells[self._key(point)]

    def add(self, point: Point, cell: dict) -> None:
        """Keep a point."""
        self._cells[self._key(point)] = cell
        write_json(self.path, self._cells)


def forget(folder: Path) -> None:
    """Drop what was kept, once the result that it went into is written."""
    for path in folder.glob("cells-*.json"):
        path.unlink(missing_ok=True)
