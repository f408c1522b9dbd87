"""A pool of large tensors that reuses their memory.

New memory costs: the operating system finds, clears and maps it page by page, and in a virtual
machine its host does so too. With the pool the process that writes states takes 2.8 s of CPU a GB,
without it 3.6 (SmolLM2's shape on two cores, `benchmarks.capture.writer_cost`).
"""

import mmap
import weakref
from collections.abc import Sequence
from math import prod

import torch

_free: dict[int, list[mmap.mmap]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As ``torch.empty``, aligned to a page. The memory comes back for another tensor, of at most
    the next power of two of bytes, once the last tensor that views it is gone; a process keeps the
    most that it ever used at a time."""
    size = prod(shape) * dtype.itemsize
    room = 1 << max(12, (size - 1).bit_length())
    free = _free.setdefault(room, [])
    try:
        memory = free.pop()
    except IndexError:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    lease = memoryview(memory)  # which the tensor's storage holds
    weakref.finalize(lease, free.append, memory).atexit = False
    return torch.frombuffer(lease, dtype=torch.uint8)[:size].view(dtype).view(*shape)
