"""fp32 masters of bf16 weights, at two bytes a weight beside it instead of four.

A bf16 weight is the upper half of its fp32 master, rounded to nearest; the lower half lies beside
it as int16. Nothing is stored twice.
"""

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 rounded to nearest, ties away from zero; int16 of what is missing)."""
    bits = master.view(torch.int32)
    top = (bits + 0x8000) >> 16
    return top.to(torch.int16).view(torch.bfloat16), (bits - (top << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a weight: undoes `split` exactly."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def keep(master: Tensor, high: Tensor, low: Tensor) -> None:
    """Write a master over its weight `high` and the lower half `low`."""
    for half, new in zip((high, low), split(master)):
        half.copy_(new)
