"""Triton kernels of the optimizers. Each does what its plain twin does.

Only imported where the tensors are on a GPU (or, in tests, under Triton's interpreter).
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _join(high, low, at, inside):
    """fp32 masters kept as a bf16 weight (`high`) and 16 lower bits (`low`): what lies `at` there.

    The plain twins of this and `_split` are `split_fp32.join` and `split_fp32.split`.
    """
    bits = tl.load(high + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    bits = (bits << 16) + tl.load(low + at, mask=inside, other=0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _split(masters, high, low, at, inside):
    """Put masters back where `_join` takes them from."""
    bits = masters.to(tl.int32, bitcast=True)
    top = (bits + 0x8000) >> 16
    tl.store(high + at, top.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(low + at, (bits - (top << 16)).to(tl.int16), mask=inside)


@triton.jit
def _split_adamw(
    high, low, grad, mean, square, scale, rate, beta1, beta2, eps, decay, correct1, correct2, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW on masters as `_join` reads them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    factor = tl.load(scale)
    if factor == factor:  # NaN says: leave everything as it is
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        p = _join(high, low, at, inside)
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        m += (g - m) * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        p -= p * (rate * decay)
        p -= (rate / correct1) * m / (tl.sqrt(v) / tl.sqrt(correct2) + eps)
        _split(p, high, low, at, inside)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)


def split_adamw(
    high: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor,
    rate: float, beta1: float, beta2: float, eps: float, decay: float, correct1: float,
    correct2: float,
) -> None:  # fmt: skip
    """One step of `optimizer.update` on one weight, in place, in one pass over memory."""
    count = high.numel()
    _split_adamw[(triton.cdiv(count, 2048),)](
        high, low, grad.contiguous(), mean, square, scale, rate, beta1, beta2, eps, decay, correct1,
        correct2, count, BLOCK=2048, num_warps=8,
    )  # fmt: skip


@triton.jit
def _momentum(grad, mean, direction, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    factor = tl.load(scale)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
    m = tl.load(mean + at, mask=inside, other=0.0)
    new = m + (g - m) * 0.05
    sound = factor == factor  # NaN says: leave everything as it is
    way = tl.where(sound, g + (new - g) * 0.95, 0.0)
    tl.store(direction + at, way.to(direction.dtype.element_ty), mask=inside)
    tl.store(mean + at, tl.where(sound, new, m), mask=inside)


def momentum(grad: Tensor, mean: Tensor, direction: Tensor, scale: Tensor) -> None:
    """`muon.momentum` in one pass over memory."""
    count = grad.numel()
    _momentum[(triton.cdiv(count, 2048),)](
        grad.contiguous(), mean, direction, scale, count, BLOCK=2048, num_warps=8
    )


@triton.jit
def _split_descend(high, low, step, numbers, size, count, BLOCK: tl.constexpr):
    """On masters as `_join` reads them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    scale = tl.load(numbers)
    if scale == scale:  # NaN says: leave everything as it is
        p = _join(high, low, at, inside)
        s = tl.load(step + at, mask=inside, other=0.0).to(tl.float32)
        p = p * (1 - tl.load(numbers + 2)) - s * (size * tl.load(numbers + 1))
        _split(p, high, low, at, inside)


def split_descend(high: Tensor, low: Tensor, step: Tensor, numbers: Tensor, size: float) -> None:
    """`muon.descend` of a split weight, in place, in one pass over memory."""
    count = high.numel()
    _split_descend[(triton.cdiv(count, 2048),)](
        high, low, step.contiguous(), numbers, size, count, BLOCK=2048, num_warps=8
    )
