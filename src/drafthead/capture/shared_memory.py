"""Memory that two processes share: a ring of rows and a pool of pages.

An engine fills the ring and the process that writes its states empties it. Training reads from the
pool: it hands out free pages with each request, so memory is bounded, nothing has to be found and
the engine never waits for room.
"""

import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from drafthead.states.format import Encoding, encode
from drafthead.states.tensor_layout import Place, lay_out

PAGE = 1 << 18
"""Bytes: small beside a sample of a hundred tokens, large beside the cost of a copy."""


class RingBuffer:
    """Hands out runs of free row numbers and takes them back in the same order. A run is at most
    half of all rows."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._head = 0
        self._used: list[tuple[int, int]] = []

    def take(self, n: int) -> tuple[int, int] | None:
        """A free run of ``n`` rows as (start, stop); None while there is none."""
        oldest = self._used[0][0] if self._used else None
        if oldest is None:
            start = 0
        elif self._head <= oldest:
            start = self._head if self._head + n < oldest else -1
        elif self._head + n <= self.capacity:
            start = self._head
        else:
            start = 0 if n < oldest else -1
        if start < 0:
            return None
        self._head = start + n
        self._used.append((start, start + n))
        return start, start + n

    def give(self) -> None:
        """Free the run handed out first."""
        self._used.pop(0)


class SharedRows:
    """The memory of a ring. It has no name in a file system, so it goes with the last process that
    maps it, and the size of /dev/shm does not limit it.

    Args:
        fd: of the memory, from ``create`` in this process or another; closed by the caller.
        rows, layers, hidden, encoding: it holds what ``encode`` makes of states
            [rows, layers, hidden].
    """

    def __init__(self, fd: int, rows: int, layers: int, hidden: int, encoding: Encoding):
        self._raw = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8)
        places, _ = _places(rows, layers, hidden, encoding)
        self.tensors = [place.of(self._raw) for place in places.values()]
        """In the order of ``encode``'s, each [rows, ...]."""
        self._pinned = False

    @staticmethod
    def create(rows: int, layers: int, hidden: int, encoding: Encoding) -> int:
        """Make the memory. Returns its file descriptor, to be closed once all have mapped it."""
        fd = os.memfd_create("drafthead-rows")
        _, size = _places(rows, layers, hidden, encoding)
        os.ftruncate(fd, size)
        return fd

    def pin(self) -> None:
        """Pin the memory, so that the GPU copies into it asynchronously.

        Raises:
            torch.cuda.CudaError: CUDA refuses.
        """
        cuda = torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(self._raw.data_ptr(), self._raw.nbytes, 0))
        self._pinned = True

    def close(self) -> None:
        """Unpin the memory."""
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._raw.data_ptr()))
            self._pinned = False


def _places(
    rows: int, layers: int, hidden: int, encoding: Encoding
) -> tuple[dict[str, Place], int]:
    """Where each tensor that ``encode`` makes of states [rows, layers, hidden] lies, and the bytes
    of all."""
    row = encode(torch.zeros(1, layers, hidden), encoding)
    return lay_out({name: (x.dtype, (rows, *x.shape[1:])) for name, x in row.items()})


class PagePool:
    """Memory in pages of one size. It has no name in a file system, so it goes with the last
    process that maps it, and the size of /dev/shm does not limit it. Until it is closed here,
    another process of the same user can open it by ``path``."""

    def __init__(self, fd: int):
        self._fd = fd
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self._pages = np.frombuffer(mmap.mmap(fd, 0), np.uint8).reshape(-1, PAGE)
        self.count = len(self._pages)

    @classmethod
    def create(cls, count: int) -> "PagePool":
        """``count`` new pages."""
        fd = os.memfd_create("drafthead-states")
        os.ftruncate(fd, count * PAGE)
        return cls(fd)

    @classmethod
    def open(cls, path: str) -> "PagePool":
        """Map the pages of another process."""
        return cls(os.open(path, os.O_RDWR))

    def close(self) -> None:
        """Keep others from opening it. The memory goes with the last process that maps it."""
        os.close(self._fd)

    def put(self, places: Sequence[int], tensors: Iterable[torch.Tensor]) -> None:
        """Copy the tensors' bytes, one after the other, into the pages ``places``."""
        parts = [t.contiguous().flatten().view(torch.uint8).numpy() for t in tensors]
        data = np.concatenate(parts)
        for number, start in zip(places, range(0, len(data), PAGE), strict=True):
            piece = data[start : start + PAGE]
            self._pages[number, : len(piece)] = piece

    def clear(self, places: Sequence[int]) -> None:
        """Zero the pages ``places``."""
        self._pages[list(places)] = 0

    def take(self, places: Sequence[int], size: int) -> torch.Tensor:
        """uint8 [size]: a copy of what ``put`` left there."""
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy()
        for number, start in zip(places, range(0, size, PAGE), strict=True):
            piece = view[start : start + PAGE]
            piece[:] = self._pages[number, : len(piece)]
        return data


def pages_needed(size: int) -> int:
    """Pages that ``size`` bytes take."""
    return -(-size // PAGE)
