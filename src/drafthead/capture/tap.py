"""Collects hidden states step by step as an engine computes them, without ever blocking it.

Each engine step computes states for rows of several sequences at once. On a GPU a step adds its
rows to a stage on the device: one small kernel. A full stage is encoded and copied on a stream of
its own into a ring of pinned memory, and from there by a thread into ordinary memory, while steps
fill the other stage. Only when the ring is full does the engine wait. What row belongs to which
position of which sequence is noted as numbers and resolved at the end.
"""

import queue
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from drafthead.errors import DraftheadError
from drafthead.states import memory
from drafthead.states.format import Encoding, encode
from drafthead.states.writer import on_few_cores

KEY = "drafthead"
"""`SamplingParams.extra_args[KEY]` names a sequence whose states are wanted."""
SEGMENT_ROWS = 8192
"""Rows of one piece of the host's memory: large enough to copy in bulk, small enough to grow by."""
_GATHERED_ROWS = 512
"""Rows gathered at once on their way to their sequences: few enough to stay in a core's cache."""


class Captured:
    """The rows of finished steps, encoded. Row r of position p is the last one noted for it: a
    preempted sequence computes its positions again."""

    def __init__(self) -> None:
        self.segments: list[list[torch.Tensor]] = []
        """Pieces of ``SEGMENT_ROWS`` rows: the tensors that ``append`` was given."""
        self.rows = 0
        self._notes: list[tuple[int, int, int, int]] = []
        self._complete = threading.Event()
        self._failed: Exception | None = None

    def complete(self, failed: Exception | None = None) -> None:
        """Nothing more will come, or something was lost."""
        self._failed = failed
        self._complete.set()

    def wait(self) -> None:
        """Wait until everything has come; raises if something was lost."""
        self._complete.wait()
        if self._failed is not None:
            raise self._failed

    def append(self, *tensors: torch.Tensor) -> None:
        """Add n rows of the host's memory, copied: what ``encode`` made of states."""
        n, done = len(tensors[0]), 0
        while done < n:
            at = self.rows % SEGMENT_ROWS
            if at == 0:
                self.segments.append(
                    [memory.empty((SEGMENT_ROWS, *t.shape[1:]), t.dtype) for t in tensors]
                )
            count = min(SEGMENT_ROWS - at, n - done)
            for segment, tensor in zip(self.segments[-1], tensors, strict=True):
                segment[at : at + count] = tensor[done : done + count]
            done += count
            self.rows += count

    def note(self, key: int, row: int, start: int, count: int) -> None:
        """Rows ``row`` and on are positions ``start`` and on of sequence ``key``."""
        self._notes.append((key, row, start, count))

    def resolve(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Which row holds each position of each sequence, given all their token ids.

        What an engine found in its prefix cache was computed for an earlier sequence with the same
        first tokens: those rows are that one's.

        Returns:
            For each sequence of T tokens int64 [T - 1]: the last token is never an input.

        Raises:
            DraftheadError: a position was never computed for any of them.
        """
        found = self._own_rows({key: len(ids) - 1 for key, ids in sequences.items()})
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

    def _own_rows(self, lengths: Mapping[int, int]) -> dict[int, np.ndarray]:
        """The row of each position as noted, -1 where there is none."""
        notes = np.array(self._notes, np.int64).reshape(-1, 4)
        notes = notes[np.argsort(notes[:, 0], kind="stable")]
        found = {}
        for key, length in lengths.items():
            _, row, start, count = notes[slice(*np.searchsorted(notes[:, 0], (key, key + 1)))].T
            step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            position = np.repeat(start, count) + step
            known = position < length
            rows = np.full(length, -1, np.int64)
            rows[position[known]] = (np.repeat(row, count) + step)[known]  # the last one stays
            found[key] = rows
        return found

    def take(self, rows: np.ndarray) -> list[torch.Tensor]:
        """The given rows of each tensor that ``append`` was given, copied. In large pieces,
        whoever's rows they are: each small operation would hold up the engine's thread, which
        shares the interpreter."""
        out = [memory.empty((len(rows), *t.shape[1:]), t.dtype) for t in self.segments[0]]
        order = np.argsort(rows // SEGMENT_ROWS, kind="stable")
        ends = np.searchsorted(rows[order] // SEGMENT_ROWS, np.arange(len(self.segments) + 1))
        for segment, first, end in zip(self.segments, ends[:-1], ends[1:], strict=True):
            for start in range(first, end, _GATHERED_ROWS):
                places = order[start : min(start + _GATHERED_ROWS, end)]
                here = torch.from_numpy(places)
                index = torch.from_numpy(rows[places] % SEGMENT_ROWS)
                for target, tensor in zip(out, segment, strict=True):
                    _wide(target).index_copy_(0, here, _wide(tensor).index_select(0, index))
        return out


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] as [n, m] of the widest numbers that fit: PyTorch scatters one after the other."""
    flat = rows.flatten(1).view(torch.uint8)
    return flat if flat.shape[1] % 8 else flat.view(torch.int64)


class Ring:
    """Numbers of free rows, handed out and given back in order, in runs of at most half of all."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._head = 0
        self._used: list[tuple[int, int]] = []
        self._change = threading.Condition()
        self.waits = 0

    def take(self, n: int) -> tuple[int, int]:
        """A free run of ``n`` rows as (start, stop); waits while there is none."""
        with self._change:
            waited = False
            while True:
                oldest = self._used[0][0] if self._used else None
                if oldest is None:
                    self._head = 0
                    start = 0
                elif self._head > oldest:
                    start = self._head if self._head + n <= self.capacity else 0
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
        encoding: what to keep them as.
        device: where they lie.
        max_rows: the most rows of one step.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        encoding: Encoding,
        device: torch.device,
        max_rows: int,
    ):
        self.encoding = encoding
        self._captured, self._rows = Captured(), 0
        self._cuda = device.type == "cuda"
        if self._cuda:
            shape = (max_rows, num_layers, hidden_size)
            self._stages = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
            self._copied: list[torch.cuda.Event | None] = [None, None]
            self._at, self._staged = 0, 0
            self._ring = Ring(2 * max_rows)
            self._pinned = [
                torch.empty(2 * max_rows, *t.shape[1:], dtype=t.dtype, pin_memory=True)
                for t in encode(self._stages[0][:1], encoding).values()
            ]
            self._stream = torch.cuda.Stream(device)
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            threading.Thread(target=self._drain, name="tap", daemon=True).start()

    @property
    def waits(self) -> int:
        """Times that the engine had to wait for room in pinned memory."""
        return self._ring.waits if self._cuda else 0

    @property
    def device_bytes(self) -> int:
        """Memory of the device that the stages take."""
        return sum(stage.nbytes for stage in self._stages) if self._cuda else 0

    def record(
        self, layers: Sequence[torch.Tensor], sequences: Sequence[tuple[int | None, int, int]]
    ) -> None:
        """One step: ``layers`` are L tensors [>= n, Ht]; ``sequences`` lists, in the order of
        their rows, (key or None, first position, rows); n is the sum of the last."""
        row = self._rows
        for key, start, count in sequences:
            if key is not None:
                self._captured.note(key, row, start, count)
            row += count
        n = row - self._rows
        self._rows = row
        rows = [layer[:n] for layer in layers]
        if not self._cuda:
            self._captured.append(*encode(torch.stack(rows, dim=1), self.encoding).values())
            return
        if self._staged + n > len(self._stages[0]):
            self._send(self._captured)
        # The step's own tensors lie in CUDA graph memory that the next step overwrites.
        torch.stack(rows, dim=1, out=self._stages[self._at][self._staged : self._staged + n])
        self._staged += n

    def take(self) -> Captured:
        """What was recorded since the last call. Its rows may still be on their way to the host:
        ``wait`` for them where the engine does not wait too."""
        done, self._captured, self._rows = self._captured, Captured(), 0
        if self._cuda:
            self._send(done)
            self._queue.put((None, 0, 0, done))
        else:
            done.complete()
        return done

    def _send(self, captured: Captured) -> None:
        """Start the stage on its way to ``captured``, and go on with the other one."""
        n, stage = self._staged, self._stages[self._at]
        if n == 0:
            return
        start, stop = self._ring.take(n)
        steps = torch.cuda.current_stream()
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            encoded = encode(stage[:n], self.encoding).values()
            for pinned, tensor in zip(self._pinned, encoded, strict=True):
                pinned[start:stop].copy_(tensor, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
            done.record(self._stream)
        self._queue.put((done, start, stop, captured))
        self._copied[self._at] = done
        self._at, self._staged = 1 - self._at, 0
        before = self._copied[self._at]
        if before is not None:
            steps.wait_event(before)  # the GPU waits, should it be so far ahead; the host does not

    def _drain(self) -> None:
        on_few_cores()
        failed: Exception | None = None
        while True:
            done, start, stop, captured = self._queue.get()
            if done is None:
                captured.complete(failed)
                failed = None
                continue
            try:
                done.synchronize()
                captured.append(*(pinned[start:stop] for pinned in self._pinned))
            except Exception as error:  # the host is out of memory
                failed = error
            self._ring.give()
