"""Triton kernels of training. Each does what its plain twin does, whose docstring has the maths.

Only imported where the tensors are on a GPU (or, in tests, under Triton's interpreter).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drafthead.train.rows import SMALLEST_OVERLAP


@triton.jit
def _row_gradients(
    logits, teacher, labels, weights, losses, predicted, rows, width, KIND: tl.constexpr,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row of `logits` [T * rows, width], the gradient written over it: two passes,
    three for `acceptance`, whose gradient needs the whole row's overlap first."""
    row = tl.program_id(0)
    shared = row % rows
    label = tl.load(labels + shared)
    weight = tl.load(weights + row)
    z_row = logits + row.to(tl.int64) * width
    s_row = teacher + shared.to(tl.int64) * width
    lanes = tl.arange(0, BLOCK)

    z_max = -float("inf")
    z_sum = 0.0
    s_max = -float("inf")
    s_sum = 0.0
    best = 0
    for start in range(0, width, BLOCK):
        at = start + lanes
        z = tl.load(z_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        top, index = tl.max(z, axis=0, return_indices=True)
        best = tl.where(top > z_max, start + index, best)
        new = tl.maximum(z_max, top)
        z_sum = z_sum * tl.exp(z_max - new) + tl.sum(tl.exp(z - new), axis=0)
        z_max = new
        if KIND != "ce":
            s = tl.load(s_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            new = tl.maximum(s_max, tl.max(s, axis=0))
            s_sum = s_sum * tl.exp(s_max - new) + tl.sum(tl.exp(s - new), axis=0)
            s_max = new
    z_lse = z_max + tl.log(z_sum)
    s_lse = s_max + tl.log(s_sum) if KIND != "ce" else 0.0
    weight = tl.where(label >= 0, weight, 0.0)

    loss = z_lse
    overlap = 0.0
    share = 0.0
    if KIND == "acceptance":
        for start in range(0, width, BLOCK):
            at = start + lanes
            z = tl.load(z_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            s = tl.load(s_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            q = tl.exp(z - z_lse)
            p = tl.exp(s - s_lse)
            overlap += tl.sum(tl.minimum(p, q), axis=0)
            share += tl.sum(tl.where(q < p, q, 0.0), axis=0)
        overlap = tl.maximum(overlap, SMALLEST)
        loss = -tl.log(overlap)
    for start in range(0, width, BLOCK):
        at = start + lanes
        inside = at < width
        z = tl.load(z_row + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.exp(z - z_lse)
        if KIND == "ce":
            p = tl.where(at == label, 1.0, 0.0)
            loss -= tl.sum(p * z, axis=0)
            gradient = (q - p) * weight
        else:
            s = tl.load(s_row + at, mask=inside, other=-float("inf")).to(tl.float32)
            p = tl.exp(s - s_lse)
            if KIND == "kl":
                loss += tl.sum(tl.where(p > 0, p * (s - s_lse - z), 0.0), axis=0)
                gradient = (q - p) * weight
            else:
                gradient = q * (share - tl.where(q < p, 1.0, 0.0)) * (weight / overlap)
        tl.store(z_row + at, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + row, loss * weight)
    tl.store(predicted + row, best)


def row_gradients(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows.row_gradients` in one kernel; `logits` [T, R, Vd] is overwritten by the gradient."""
    steps, rows, width = logits.shape
    assert logits.is_contiguous()
    assert teacher is None or teacher.is_contiguous()
    losses = torch.empty(steps, rows, dtype=torch.float32, device=logits.device)
    predicted = torch.empty(steps, rows, dtype=torch.int64, device=logits.device)
    _row_gradients[(steps * rows,)](
        logits, logits if teacher is None else teacher, labels.contiguous(), weights.contiguous(),
        losses, predicted, rows, width, KIND=kind, SMALLEST=SMALLEST_OVERLAP,
        BLOCK=min(4096, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return losses, logits, predicted


@triton.jit
def _join(high, low, at, inside):
    """fp32 masters kept as a bf16 weight (`high`) and 16 lower bits (`low`): what lies `at` there.

    The plain twins of this and `_split` are `masters.join` and `masters.split`.
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


@triton.jit
def _tile(n, heads, groups, SHARE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Offsets and masks of one program: ROWS query rows, the query heads of one key head.

    SHARE is the number of query heads of a key head, rounded up to a power of two.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    share = heads // groups
    head = tl.arange(0, SHARE)
    lane = tl.arange(0, DIM)
    head_ok = (row < n)[:, None] & (head < share)[None, :]
    head_index = group * share + head
    wide = (row[:, None] * heads + head_index[None, :])[:, :, None] * DIM + lane[None, None, :]
    narrow = (row * groups + group)[:, None] * DIM + lane[None, :]
    lse_at = head_index[None, :] * n + row[:, None]
    return wide, head_ok, narrow, (row < n)[:, None], lse_at


@triton.jit
def _merge(
    out, lse, q, diagonal_k, diagonal_v, merged, total, n, heads, groups, steps, scale,
    SHARE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    wide, head_ok, narrow, row_ok, lse_at = _tile(n, heads, groups, SHARE, ROWS, DIM)
    ok = head_ok[:, :, None]
    query = tl.load(q + wide, mask=ok, other=0.0).to(tl.float32)
    value = tl.load(out + wide, mask=ok, other=0.0).to(tl.float32)
    top = tl.load(lse + lse_at, mask=head_ok, other=0.0)
    mass = tl.full(top.shape, 1.0, tl.float32)
    at = narrow
    for _ in range(steps):
        k = tl.load(diagonal_k + at, mask=row_ok, other=0.0).to(tl.float32)
        v = tl.load(diagonal_v + at, mask=row_ok, other=0.0).to(tl.float32)
        s = tl.sum(query * k[:, None, :], axis=2) * scale
        new = tl.maximum(top, s)
        old_share = tl.exp(top - new)
        own = tl.exp(s - new)
        value = value * old_share[:, :, None] + own[:, :, None] * v[:, None, :]
        mass = mass * old_share + own
        top = new
        at += n * groups * DIM
    value = value / mass[:, :, None]
    tl.store(merged + wide, value.to(merged.dtype.element_ty), mask=ok)
    tl.store(total + lse_at, top + tl.log(mass), mask=head_ok)


@triton.jit
def _merge_backward(
    d_out, out, lse, q, diagonal_k, diagonal_v, dq, d_k, d_v, n, heads, groups, steps, scale,
    SHARE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    wide, head_ok, narrow, row_ok, lse_at = _tile(n, heads, groups, SHARE, ROWS, DIM)
    ok = head_ok[:, :, None]
    query = tl.load(q + wide, mask=ok, other=0.0).to(tl.float32)
    d_value = tl.load(d_out + wide, mask=ok, other=0.0).to(tl.float32)
    value = tl.load(out + wide, mask=ok, other=0.0).to(tl.float32)
    total = tl.load(lse + lse_at, mask=head_ok, other=0.0)
    gradient = tl.load(dq + wide, mask=ok, other=0.0).to(tl.float32)
    shift = tl.sum(d_value * value, axis=2)
    at = narrow
    for _ in range(steps):
        k = tl.load(diagonal_k + at, mask=row_ok, other=0.0).to(tl.float32)
        v = tl.load(diagonal_v + at, mask=row_ok, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(query * k[:, None, :], axis=2) * scale - total)
        p = tl.where(head_ok, p, 0.0)
        d_s = p * (tl.sum(d_value * v[:, None, :], axis=2) - shift) * scale
        gradient += d_s[:, :, None] * k[:, None, :]
        kind = d_k.dtype.element_ty
        tl.store(d_k + at, tl.sum(d_s[:, :, None] * query, axis=1).to(kind), mask=row_ok)
        tl.store(d_v + at, tl.sum(p[:, :, None] * d_value, axis=1).to(kind), mask=row_ok)
        at += n * groups * DIM
    tl.store(dq + wide, gradient.to(dq.dtype.element_ty), mask=ok)


def _merge_launch(q: Tensor, diagonal_k: Tensor) -> tuple[tuple[int, int], tuple, dict]:
    """Grid, scalar arguments and constants that the two merge kernels share."""
    n, heads, dim = q.shape
    steps, _, groups, _ = diagonal_k.shape
    assert dim & (dim - 1) == 0, f"head_dim {dim} is not a power of two"
    constants = {"SHARE": triton.next_power_of_2(heads // groups), "ROWS": 8, "DIM": dim}
    numbers = (n, heads, groups, steps, dim**-0.5)
    return (triton.cdiv(n, constants["ROWS"]), groups), numbers, constants


def merge(
    out: Tensor, lse: Tensor, q: Tensor, diagonal_k: Tensor, diagonal_v: Tensor
) -> tuple[Tensor, Tensor]:
    """`attention.merge` in one kernel."""
    tensors = [t.contiguous() for t in (out, lse, q, diagonal_k, diagonal_v)]
    merged, total = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
    grid, numbers, constants = _merge_launch(q, diagonal_k)
    _merge[grid](*tensors, merged, total, *numbers, **constants)
    return merged, total


def merge_backward(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    diagonal_k: Tensor,
    diagonal_v: Tensor,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """`attention.merge_backward` in one kernel; adds to `dq` (contiguous) in place."""
    tensors = [t.contiguous() for t in (d_out, out, lse, q, diagonal_k, diagonal_v)]
    assert dq.is_contiguous()
    d_k, d_v = torch.empty_like(tensors[4]), torch.empty_like(tensors[5])
    grid, numbers, constants = _merge_launch(q, diagonal_k)
    _merge_backward[grid](*tensors, dq, d_k, d_v, *numbers, **constants)
    return d_k, d_v
