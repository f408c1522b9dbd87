"""Shared memory between an engine's worker and training, in pages of one size.

Who reads also says where: the reader hands out free pages with each request, so memory is bounded,
nothing has to be found and the engine never waits for room.
"""

import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from drafthead.capture.checks import CHECKED, Checker, unusable
from drafthead.states import Sample, StoreMeta

PAGE = 1 << 18
"""Bytes: small beside a sample of a hundred tokens, large beside the cost of a copy."""


class SharedPages:
    """Memory without a name in any file system: it is gone with the last process that has it, and
    no limit of /dev/shm binds it. Another process of the same user opens it by ``path``, as long
    as it is not closed here."""

    def __init__(self, fd: int):
        self._fd = fd
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self._pages = np.frombuffer(mmap.mmap(fd, 0), np.uint8).reshape(-1, PAGE)
        self.count = len(self._pages)

    @classmethod
    def create(cls, count: int) -> "SharedPages":
        """``count`` new pages."""
        fd = os.memfd_create("drafthead-states")
        os.ftruncate(fd, count * PAGE)
        return cls(fd)

    @classmethod
    def open(cls, path: str) -> "SharedPages":
        """The pages that another process has."""
        return cls(os.open(path, os.O_RDWR))

    def close(self) -> None:
        """Let nobody else open it; the memory goes with the last who has it."""
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


class PageWriter:
    """Checks samples and copies them into pages. After ``CHECKED`` greedy tokens the engine is
    believed, and only each state's values are looked at: the LM head is too much to read for every
    few samples.

    Args:
        pages: shared with the reader.
        meta: what the states are of.
        checker: of the engine's states.
    """

    def __init__(self, pages: SharedPages, meta: StoreMeta, checker: Checker):
        self.pages, self.meta, self.checker = pages, meta, checker
        self._picked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._believed = not checker.greedy

    def submit(
        self,
        places: Sequence[Sequence[int]],
        samples: Iterable[tuple[str, Sample | None]],
        count: int,
    ) -> None:
        """Copy each of ``count`` samples into the pages at its place; zeros if it is unusable.

        Raises:
            DraftheadError: the states are not those of the served tokens.
        """
        for place, (_, sample) in zip(places, samples, strict=True):
            if sample is None or unusable(sample, self.meta):
                self.pages.clear(place)
                continue
            if not self._believed:
                self._picked.append(self.checker.pick(sample, count))
            self.pages.put(place, sample.stored.values())
        if sum(len(served) for _, served in self._picked) >= CHECKED:
            self.checker.agreement(self._picked)
            self._picked, self._believed = [], True

    def check(self) -> None:
        """``submit`` itself has said what is wrong."""

    def flush(self) -> None:
        """``submit`` leaves nothing to wait for."""
