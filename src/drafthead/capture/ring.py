"""A ring of rows in memory that two processes share: one fills it, the other empties it."""

import mmap
import os

import torch

from drafthead.states.format import Encoding, encode
from drafthead.states.layout import Place, lay_out


class Ring:
    """Numbers of free rows, handed out and given back in order, in runs of at most half of all."""

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
    """The memory of a ring, without a name in any file system: it is gone with the last process
    that has it, and no limit of /dev/shm binds it.

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
        """Makes the memory; returns its file descriptor, to be closed once all have mapped it."""
        fd = os.memfd_create("drafthead-rows")
        _, size = _places(rows, layers, hidden, encoding)
        os.ftruncate(fd, size)
        return fd

    def pin(self) -> None:
        """Let the GPU copy into it while this process goes on.

        Raises:
            torch.cuda.CudaError: CUDA does not take it.
        """
        cuda = torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(self._raw.data_ptr(), self._raw.nbytes, 0))
        self._pinned = True

    def close(self) -> None:
        """Nothing is copied into it any more."""
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._raw.data_ptr()))
            self._pinned = False


def _places(
    rows: int, layers: int, hidden: int, encoding: Encoding
) -> tuple[dict[str, Place], int]:
    """Where what ``encode`` makes of states [rows, layers, hidden] lies, and the bytes of it."""
    row = encode(torch.zeros(1, layers, hidden), encoding)
    return lay_out({name: (x.dtype, (rows, *x.shape[1:])) for name, x in row.items()})
