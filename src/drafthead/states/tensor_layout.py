"""Tensors one after the other in one piece of memory."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNED = 64
"""Bytes at which a tensor begins, a cache line: no type needs more."""


class Place(NamedTuple):
    """Where a tensor lies: its bytes from `begin` to `end`."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor that lies there in `memory`, uint8 [bytes]."""
        return memory[self.begin : self.end].view(self.dtype).view(self.shape)


def lay_out(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[dict[str, Place], int]:
    """A place for each of the tensors, by name, and the bytes that all of them take."""
    places, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin = -(-end // _ALIGNED) * _ALIGNED
        end = begin + prod(shape) * dtype.itemsize
        places[name] = Place(begin, end, dtype, shape)
    return places, end


def joined(
    parts: Mapping[str, Sequence[Tensor]], pinned: bool = False
) -> tuple[Tensor, dict[str, Place]]:
    """Tensors on the CPU joined by name along their first axis, in one piece of memory.

    Returns it, uint8 [bytes], and where in it each tensor lies. pinned: a GPU copies from it in its
    own time.
    """
    shapes = {
        name: (of[0].dtype, (sum(len(x) for x in of), *of[0].shape[1:]))
        for name, of in parts.items()
    }
    places, size = lay_out(shapes)
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for name, of in parts.items():
        torch.cat(list(of), out=places[name].of(memory))
    return memory, places
