"""Batches: documents packed into rows without padding, the same for the same seed and step.

A row is what one pass through the head takes: documents one after the other, as many as fit. What
of a document is in it, and where, says `packing.py`.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from drafthead.drafters.base import Batch
from drafthead.machine import usable_cores

OPEN_ROWS = 16  # rows that packing fills at once: more fill better and mix less
MOST_AHEAD, AHEAD_BYTES = 16, 128 << 20  # rows that are made ahead of their use, if small


def pack(lengths: np.ndarray, order: Iterable[int], tokens: int) -> list[list[int]]:
    """Put documents of `lengths`, taken in `order`, into rows of at most `tokens` positions.

    First fit into a few open rows; a document longer than a row fills one alone (and is cut when it
    is packed). Documents without a position to train on (length < 1) are left out.
    """
    done: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []
    for index in order:
        length = min(int(lengths[index]), tokens)
        if length < 1:
            continue
        for place, (used, row) in enumerate(rows):
            if used + length <= tokens:
                rows[place] = used + length, [*row, int(index)]
                break
        else:
            rows.append((length, [int(index)]))
            if len(rows) > OPEN_ROWS:
                fullest = max(range(len(rows)), key=lambda place: rows[place][0])
                done.append(rows.pop(fullest)[1])
    return done + [row for _, row in rows]


def prefetch(
    make: Callable[[int], Batch | None], numbers: Iterable[int], device: torch.device
) -> Generator[Batch | None, None, None]:
    """`make(number)`, which is on the device, for each number in order.

    On a GPU they are made ahead of their use. On a CPU they are not: the step's OpenMP threads wait
    for each other by spinning, so that a thread beside them makes a step of 115 ms one of 200, to
    save the few that packing takes.
    """
    if device.type == "cuda":
        return made_ahead(make, numbers, torch.cuda.Stream(device))
    return (make(number) for number in numbers)


def made_ahead(
    make: Callable[[int], Batch | None],
    numbers: Iterable[int],
    stream: torch.cuda.Stream | None,
    depth: int = 3,
) -> Generator[Batch | None, None, None]:
    """`make(number)` for each number in order, made ahead on `stream`, or on a CPU if it is None.

    `depth` are ahead, of small ones more: a dozen steps of 5 ms outlast a row whose states the disk
    was slow to give, three do not. Threads make them, since a row of 8192 states is 130 MB to be
    read and packed, and what they start runs on the stream beside the computation.
    """
    ahead = depth

    def load(number: int) -> tuple[Batch | None, torch.cuda.Event | None]:
        with torch.cuda.stream(stream):
            return make(number), stream and stream.record_event()

    def ready(future: Future) -> Batch | None:
        nonlocal ahead
        batch, copied = future.result()
        if batch is None:
            return None
        ahead = max(depth, min(MOST_AHEAD, AHEAD_BYTES // batch.bytes))
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(copied)
            batch.map(functools.partial(_used_on, current))
        return batch

    threads = min(depth, max(1, usable_cores() // 4))
    with ThreadPoolExecutor(threads, thread_name_prefix="batches") as pool:
        waiting: deque[Future] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(load, number))
                while len(waiting) > ahead:
                    yield ready(waiting.popleft())
            while waiting:
                yield ready(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()


def _used_on(stream: torch.cuda.Stream, x: Tensor) -> Tensor:
    """Keep x's memory until `stream` is done with it: it was allocated on another one."""
    x.record_stream(stream)
    return x
