"""RMSNorm of several layers at once on the CPU uses each layer's own weight.

A block drafter (DFlash, DSpark) norms the keys of all of its layers in one call, with a weight
[layers, head size] for rows [layers, tokens, heads, head size]. The CPU's kernel takes the first
layer's weight for all of them.
"""

import torch
from vllm import _custom_ops as ops

from .patch import Replacement, original


def needed() -> bool:
    """Whether the second row of a weight is not used."""
    x, weight = torch.ones(2, 1, 16), torch.stack([torch.ones(16), 2 * torch.ones(16)])
    out = torch.empty_like(x)
    original(ops, "rms_norm")(out, x, weight, 0.0)
    return not torch.equal(out[1], 2 * out[0])


def _each_by_its_own(stock):
    def rms_norm(out, input, weight, epsilon):
        if weight is None or weight.ndim < 2:
            return stock(out, input, weight, epsilon)
        for one, rows, scale in zip(out, input, weight, strict=True):
            stock(one, rows, scale, epsilon)
        return None

    return rms_norm


REPLACEMENTS = (
    Replacement("vllm._custom_ops:rms_norm", "out input weight epsilon", _each_by_its_own),
)
