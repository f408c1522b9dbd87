"""Collects hidden states step by step as an engine computes them, without ever blocking it.

Each engine step computes states for rows of several sequences at once. On a GPU a step's rows are
staged in a fresh device tensor, copied on a stream of their own into a ring of pinned memory, and
from there by a thread into ordinary memory. Only when the ring is full does the engine wait. What
row belongs to which position of which sequence is noted as numbers and resolved at the end.
"""

import queue
import threading
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch

from drafthead.errors import DraftheadError

KEY = "drafthead"
"""`SamplingParams.extra_args[KEY]` names a sequence whose states are wanted."""
SEGMENT_ROWS = 8192
"""Rows of one piece of the host's memory: large enough to copy in bulk, small enough to grow by."""


class Captured:
    """The rows of finished steps, by sequence. Row r of position p is the last one recorded for
    it: a preempted sequence computes its positions again."""

    def __init__(self, num_layers: int, hidden_size: int, dtype: torch.dtype):
        self.shape, self.dtype = (num_layers, hidden_size), dtype
        self.segments: list[torch.Tensor] = []
        self.rows = 0
        self._layout: dict[Hashable, list[tuple[int, int, int]]] = {}

    def append(self, rows: torch.Tensor) -> None:
        """Add rows [n, L, Ht] of the host's memory, copied."""
        done = 0
        while done < len(rows):
            at = self.rows % SEGMENT_ROWS
            if at == 0:
                self.segments.append(torch.empty(SEGMENT_ROWS, *self.shape, dtype=self.dtype))
            n = min(SEGMENT_ROWS - at, len(rows) - done)
            self.segments[-1][at : at + n] = rows[done : done + n]
            done += n
            self.rows += n

    def note(self, key: Hashable, row: int, start: int, count: int) -> None:
        """Rows ``row`` and on are positions ``start`` and on of sequence ``key``."""
        self._layout.setdefault(key, []).append((row, start, count))

    def resolve(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Which row holds each position of each sequence, given all their token ids.

        What an engine found in its prefix cache was computed for an earlier sequence with the same
        first tokens: those rows are that one's.

        Returns:
            For each sequence of T tokens int64 [T - 1]: the last token is never an input.

        Raises:
            DraftheadError: a position was never computed for any of them.
        """
        found = {key: self._own_rows(key, len(ids) - 1) for key, ids in sequences.items()}
        lacking = {key: int((rows < 0).sum()) for key, rows in found.items()}
        depth = max(lacking.values(), default=0)
        if depth == 0:
            return found
        # A trie of first tokens, as deep as the longest cached prefix; node -> row.
        children: dict[tuple[int, int], int] = {}
        paths: dict[int, list[int]] = {}
        row_of: dict[int, int] = {}
        for key, ids in sequences.items():
            node, path = 0, []
            for position in range(min(depth, len(found[key]))):
                node = children.setdefault((node, int(ids[position])), len(children) + 1)
                path.append(node)
                if found[key][position] >= 0:
                    row_of.setdefault(node, int(found[key][position]))
            paths[key] = path
        for key, count in lacking.items():
            rows = found[key]
            for position in range(count):
                if rows[position] < 0:
                    rows[position] = row_of.get(paths[key][position], -1)
            if len(rows) and rows.min() < 0:
                raise DraftheadError(
                    f"sequence {key}: the engine computed no states at position "
                    f"{int(rows.argmin())} of {len(rows)}, nor for a sequence that begins alike"
                )
        return found

    def _own_rows(self, key: Hashable, length: int) -> np.ndarray:
        rows = np.full(length, -1, np.int64)
        for row, start, count in self._layout.get(key, ()):
            n = min(count, length - start)
            if n > 0:
                rows[start : start + n] = np.arange(row, row + n)
        return rows

    def states(self, rows: np.ndarray) -> torch.Tensor:
        """[n, L, Ht]: the given rows, copied."""
        out = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        for number in np.unique(rows // SEGMENT_ROWS):
            here = rows // SEGMENT_ROWS == number
            index = torch.from_numpy(rows[here] % SEGMENT_ROWS)
            out[torch.from_numpy(here)] = self.segments[number].index_select(0, index)
        return out


class Ring:
    """Rows [capacity, L, Ht] of pinned memory, handed out and given back in order. No run may be
    longer than half the capacity."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self._head = 0
        self._used: list[tuple[int, int]] = []
        self._change = threading.Condition()
        self.waits = 0

    def take(self, n: int) -> tuple[int, int]:
        """A free run of ``n`` rows as (start, stop); waits while there is none."""
        capacity = len(self.rows)
        with self._change:
            waited = False
            while True:
                oldest = self._used[0][0] if self._used else None
                if oldest is None:
                    self._head = 0
                    start = 0
                elif self._head > oldest:
                    start = self._head if self._head + n <= capacity else 0
                    if start == 0 and n >= oldest:
                        start = -1
                else:
                    start = self._head if self._head + n < oldest else -1
                if start >= 0:
                    break
                self.waits += not waited
                waited = True
                self._change.wait()
            self._head = start + n
            self._used.append((start, start + n))
            return start, start + n

    def give(self) -> None:
        """Free the run handed out first."""
        with self._change:
            self._used.pop(0)
            self._change.notify()


class Tap:
    """Records the states of every step of one engine.

    Args:
        num_layers: L, tensors that each step hands over.
        hidden_size: Ht.
        dtype: of those tensors.
        device: where they lie.
        max_rows: the most rows of one step.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
    ):
        self._new = lambda: Captured(num_layers, hidden_size, dtype)
        self._current = self._new()
        self._rows = 0
        self._cuda = device.type == "cuda"
        if self._cuda:
            pinned = torch.empty(
                2 * max_rows, num_layers, hidden_size, dtype=dtype, pin_memory=True
            )
            self._ring = Ring(pinned)
            self._stream = torch.cuda.Stream(device)
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            self._idle = threading.Semaphore(0)
            self._failed: Exception | None = None
            threading.Thread(target=self._drain, name="tap", daemon=True).start()

    @property
    def waits(self) -> int:
        """Times that the engine had to wait for room in pinned memory."""
        return self._ring.waits if self._cuda else 0

    def record(
        self, layers: Sequence[torch.Tensor], sequences: Sequence[tuple[Hashable, int, int]]
    ) -> None:
        """One step: ``layers`` are L tensors [>= n, Ht]; ``sequences`` lists, in the order of
        their rows, (key or None, first position, rows); n is the sum of the last."""
        row = self._rows
        for key, start, count in sequences:
            if key is not None:
                self._current.note(key, row, start, count)
            row += count
        n = row - self._rows
        self._rows = row
        stacked = torch.stack([layer[:n] for layer in layers], dim=1)
        if not self._cuda:
            self._current.append(stacked)
            return
        # The step's own tensors live in CUDA graph memory that the next step overwrites; the
        # stacked copy is ours, so the way to the host can take its time.
        start, stop = self._ring.take(n)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._ring.rows[start:stop].copy_(stacked, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        stacked.record_stream(self._stream)
        self._queue.put((done, start, stop, self._current))

    def take(self) -> Captured:
        """What was recorded since the last call, once all of it has reached the host."""
        if self._cuda:
            self._queue.put(None)
            self._idle.acquire()
            if self._failed is not None:
                raise self._failed
        done, self._current, self._rows = self._current, self._new(), 0
        return done

    def _drain(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                self._idle.release()
                continue
            done, start, stop, captured = item
            try:
                done.synchronize()
                captured.append(self._ring.rows[start:stop])
            except Exception as error:  # the host is out of memory: `take` says so
                self._failed = error
            self._ring.give()
