"""Matrix products of training in 8-bit floats.

The products alone are twice as fast as bf16's on Hopper; a whole step, which also has to round to
them, was slower at the published head's shape (docs/results.md).

Weights and activations are rounded to e4m3, gradients to e5m2 (arXiv 2209.05433), each tensor with
one scale, which puts its own largest magnitude at the format's largest. Products are summed in fp32
and leave in the activations' type. Masters, norms, attention, the teacher's logits and the loss
stay as they are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafthead.errors import DraftheadError
from drafthead.head.model import Eagle3Head

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every width that a product has to do with


class Quantized(NamedTuple):
    """A matrix: values [n, k] in 8 bits times scale, fp32 []."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor, kind: torch.dtype = VALUES) -> Quantized:
    """x [n, k] in `kind`, scaled so that its largest magnitude is the largest of `kind`."""
    scale = x.abs().amax().float().clamp(min=1e-30) / torch.finfo(kind).max
    return Quantized((x.float() / scale).to(kind), scale)


def transposed(x: Quantized) -> Quantized:
    """[n, k] -> [k, n], copied: a product wants what it sums over to lie together."""
    return Quantized(x.values.t().contiguous(), x.scale)


def product(a: Quantized, b: Quantized, kind: torch.dtype, exact: bool = True) -> Tensor:
    """a [n, k] times b [m, k] transposed -> [n, m] in `kind`; m and k are multiples of 16.

    exact: sums in whole fp32, for gradients; else in the tensor cores' 22 bits, which are faster.
    """
    return torch._scaled_mm(
        a.values, b.values.t(), a.scale, b.scale, out_dtype=kind, use_fast_accum=not exact
    )


def plain_product(a: Quantized, b: Quantized, kind: torch.dtype) -> Tensor:
    """`product` by its definition."""
    wide = lambda x: x.values.float() * x.scale
    return (wide(a) @ wide(b).t()).to(kind)


def _padded(x: Tensor) -> Tensor:
    """x [n, k] with 1 to 16 more rows of zeros, for a gradient that sums over rows: 16 n in all.
    Never none, which would be a special case to compile."""
    return F.pad(x, (0, 0, 0, MULTIPLE - x.shape[0] % MULTIPLE))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        rows = quantize(_padded(x))
        ctx.save_for_backward(rows.values, rows.scale, weight)
        return product(rows, quantize(weight), x.dtype, exact=False)[: x.shape[0]]

    @staticmethod
    def backward(ctx, gradient):
        values, scale, weight = ctx.saved_tensors
        kind = gradient.dtype
        rows = quantize(_padded(gradient), GRADIENTS)
        d_x = product(rows, transposed(quantize(weight)), kind)[: gradient.shape[0]]
        d_weight = product(transposed(rows), transposed(Quantized(values, scale)), kind)
        return d_x, d_weight


class Linear(nn.Linear):
    """A linear layer whose products are 8-bit while gradients are wanted, and exact otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """x [n, k] -> [n, m]."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        out = _Linear.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


def convert(head: Eagle3Head) -> None:
    """Make the linear layers of `head` 8-bit ones; its parameters stay the same objects.

    Not the LM head, whose products are those of `losses.fused_loss`.
    """
    for name, module in head.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.__class__ = Linear


def require(device: torch.device, head: Eagle3Head) -> None:
    """Raise `DraftheadError` where `device` has no such products or `head` has other widths."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise DraftheadError(
            f"recipe: train.matmul fp8 needs a GPU with 8-bit products (Ada, Hopper or later), "
            f"found {name}; use bf16"
        )
    for name, p in head.named_parameters():
        if p.dim() == 2 and any(width % MULTIPLE for width in p.shape):
            raise DraftheadError(
                f"recipe: train.matmul fp8 needs widths that are multiples of {MULTIPLE}, "
                f"{name} is {list(p.shape)}; change the head's sizes or use bf16"
            )


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def fused(function: Callable, x: Tensor) -> Callable:
    """`quantize` or `transposed` for tensors where x lives: compiled on a GPU."""
    return _compiled(function) if x.is_cuda else function
