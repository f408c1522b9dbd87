"""Sort the rows that an engine computed by sequence and position, once a unit is complete."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from drafthead.states import buffer_pool

SEGMENT_ROWS = 8192
"""Rows of one piece of memory: large enough to copy in bulk, small enough to grow by."""


class SequenceAssembler:
    """Collects encoded rows of finished steps. If a position was noted twice, the last row counts:
    a preempted sequence computes its positions again."""

    def __init__(self) -> None:
        self.segments: list[list[torch.Tensor]] = []
        """Pieces of ``SEGMENT_ROWS`` rows: the tensors that ``append`` was given."""
        self.rows = 0
        self._notes: list[np.ndarray] = []

    def append(self, *tensors: torch.Tensor) -> None:
        """Copy n rows of host memory. ``tensors``: each [n, ...], as ``encode`` returns them."""
        n, done = len(tensors[0]), 0
        while done < n:
            at = self.rows % SEGMENT_ROWS
            if at == 0:
                self.segments.append(
                    [buffer_pool.empty((SEGMENT_ROWS, *t.shape[1:]), t.dtype) for t in tensors]
                )
            count = min(SEGMENT_ROWS - at, n - done)
            for segment, tensor in zip(self.segments[-1], tensors, strict=True):
                segment[at : at + count] = tensor[done : done + count]
            done += count
            self.rows += count

    def note(self, notes: np.ndarray) -> None:
        """Say whose rows they are. ``notes``: int64 [n, 4], each (key, row, start, count): the
        ``count`` rows from ``row`` on are the positions from ``start`` on of sequence ``key``."""
        self._notes.append(notes)

    def resolve(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Find the row of each position of each sequence, given all their token ids.

        A position that the engine took from its prefix cache was computed for another sequence with
        the same first tokens; its row is that sequence's.

        Returns:
            For each sequence of T tokens int64 [T - 1]: the last token is never an input. -1 where
            no sequence computed the position.
        """
        rows_of = self._own_rows({key: len(ids) - 1 for key, ids in sequences.items()})
        lacking = {key: int((rows < 0).sum()) for key, rows in rows_of.items()}
        depth = max(lacking.values(), default=0)
        if depth == 0:
            return rows_of
        # A trie of first tokens, as deep as the longest cached prefix; node -> row.
        children: dict[tuple[int, int], int] = {}
        paths: dict[int, list[int]] = {}
        row_of: dict[int, int] = {}
        for key, ids in sequences.items():
            node, path = 0, []
            for position in range(min(depth, len(rows_of[key]))):
                node = children.setdefault((node, int(ids[position])), len(children) + 1)
                path.append(node)
                if rows_of[key][position] >= 0:
                    row_of.setdefault(node, int(rows_of[key][position]))
            paths[key] = path
        for key, count in lacking.items():
            rows = rows_of[key]
            for position in range(count):
                if rows[position] < 0:
                    rows[position] = row_of.get(paths[key][position], -1)
        return rows_of

    def _own_rows(self, lengths: Mapping[int, int]) -> dict[int, np.ndarray]:
        """The row of each position as noted, -1 where there is none."""
        notes = np.concatenate([np.zeros((0, 4), np.int64), *self._notes])
        notes = notes[np.argsort(notes[:, 0], kind="stable")]
        rows_of = {}
        for key, length in lengths.items():
            _, row, start, count = notes[slice(*np.searchsorted(notes[:, 0], (key, key + 1)))].T
            step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            position = np.repeat(start, count) + step
            within = position < length
            rows = np.full(length, -1, np.int64)
            rows[position[within]] = (np.repeat(row, count) + step)[within]  # the last one stays
            rows_of[key] = rows
        return rows_of

    def take(self, rows: np.ndarray) -> list[torch.Tensor]:
        """The given rows of each tensor that ``append`` was given, copied. Up to ``SEGMENT_ROWS``
        rows lie in memory of that size: segments and units of all sizes then share it in turn."""
        size, first = max(SEGMENT_ROWS, len(rows)), self.segments[0]
        out = [buffer_pool.empty((size, *t.shape[1:]), t.dtype)[: len(rows)] for t in first]
        number, index = np.divmod(rows, SEGMENT_ROWS)
        # Positions were computed in their order: a sequence's rows are few runs, each of a segment.
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            here = torch.from_numpy(index[start:end])
            for target, tensor in zip(out, self.segments[number[start]], strict=True):
                torch.index_select(_wide(tensor), 0, here, out=_wide(target[start:end]))
        return out


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] as [n, m] of the widest numbers that fit: PyTorch scatters one after the other."""
    flat = rows.flatten(1).view(torch.uint8)
    return flat if flat.shape[1] % 8 else flat.view(torch.int64)
