"""Triton kernels of losses and attention. Each does what its plain twin does.

Only imported where the tensors are on a GPU (or, in tests, under Triton's interpreter).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drafthead.ops.block_attention import Blocks
from drafthead.ops.losses import CE_SHARE, SMALLEST_OVERLAP, check_kind


@triton.jit
def _row_gradients(
    logits, teacher, labels, weights, shared, losses, predicted, overlaps, rows, width,
    KIND: tl.constexpr, INDEXED: tl.constexpr, CE_SHARE: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row of `logits` [T * rows, width]; the gradient is written over it. Two passes,
    three where the gradient needs the whole row's overlap first. shared int64 [rows]: the row of
    `teacher` and `labels`, if INDEXED."""
    row = tl.program_id(0)
    other = row % rows
    if INDEXED:
        other = tl.load(shared + other)
    label = tl.load(labels + other)
    weight = tl.load(weights + row)
    z_row = logits + row.to(tl.int64) * width
    s_row = teacher + other.to(tl.int64) * width
    lanes = tl.arange(0, BLOCK)

    # First pass: both log-sum-exps, and the likeliest token.
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

    # Second pass: the overlap, and the draft's mass where it is below the target's.
    loss = z_lse
    overlap = 0.0
    share = 0.0
    hit = 0.0  # the label's logit
    if KIND == "acceptance" or KIND == "ce+tv":
        for start in range(0, width, BLOCK):
            at = start + lanes
            z = tl.load(z_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            s = tl.load(s_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            q = tl.exp(z - z_lse)
            p = tl.exp(s - s_lse)
            overlap += tl.sum(tl.minimum(p, q), axis=0)
            share += tl.sum(tl.where(q < p, q, 0.0), axis=0)
            hit += tl.sum(tl.where(at == label, z, 0.0), axis=0)
        if KIND == "acceptance":
            floored = tl.maximum(overlap, SMALLEST)
            loss = -tl.log(floored)
        else:
            loss = CE_SHARE * (z_lse - hit) + (1 - CE_SHARE) * (1 - overlap)

    # Last pass: the gradient.
    for start in range(0, width, BLOCK):
        at = start + lanes
        inside = at < width
        z = tl.load(z_row + at, mask=inside, other=-float("inf")).to(tl.float32)
        q = tl.exp(z - z_lse)
        if KIND == "ce":
            p = tl.where(at == label, 1.0, 0.0)
            loss -= tl.sum(tl.where(at == label, z, 0.0), axis=0)
            gradient = (q - p) * weight
        else:
            s = tl.load(s_row + at, mask=inside, other=-float("inf")).to(tl.float32)
            p = tl.exp(s - s_lse)
            if KIND == "kl":
                loss += tl.sum(tl.where(p > 0, p * (s - s_lse - z), 0.0), axis=0)
                overlap += tl.sum(tl.minimum(p, q), axis=0)
                gradient = (q - p) * weight
            else:
                away = share - tl.where(q < p, 1.0, 0.0)
                if KIND == "acceptance":
                    gradient = q * away * (weight / floored)
                else:
                    target = tl.where(at == label, CE_SHARE, 0.0)
                    gradient = (q * (CE_SHARE + (1 - CE_SHARE) * away) - target) * weight
        tl.store(z_row + at, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + row, loss * weight)
    tl.store(predicted + row, best)
    tl.store(overlaps + row, overlap)


def row_gradients(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    kind: str,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`losses.row_gradients` in one kernel; `logits` [T, R, Vd] is overwritten by the gradient."""
    check_kind(kind)
    steps, rows, width = logits.shape
    assert logits.is_contiguous()
    assert teacher is None or teacher.is_contiguous()
    losses = torch.empty(steps, rows, dtype=torch.float32, device=logits.device)
    overlaps = torch.empty_like(losses)
    predicted = torch.empty(steps, rows, dtype=torch.int64, device=logits.device)
    labels = labels.contiguous()
    _row_gradients[(steps * rows,)](
        logits, logits if teacher is None else teacher, labels, weights.contiguous(),
        labels if shared is None else shared.contiguous(), losses, predicted, overlaps, rows, width,
        KIND=kind, INDEXED=shared is not None, CE_SHARE=CE_SHARE, SMALLEST=SMALLEST_OVERLAP,
        BLOCK=min(4096, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return losses, logits, predicted, overlaps


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


# Block attention. A tile of queries is ROWS rows of one key head: row r of a key head is the
# query (r // share) of head (group * share + r % share), so that the query heads that share a key
# head share its loads. Contexts of a tile lie in one run of keys, since blocks are sorted.


@triton.jit
def _block_rows(tile, queries, share, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile: the rows' numbers [ROWS], which are real, their query and their block."""
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < queries * share
    query = tl.where(real, row // share, queries - 1)
    return row, real, query, query // SIZE


@triton.jit
def _load(x, at, lanes, ok, width, DIM: tl.constexpr):
    """Rows of x at offsets `at` [n], zero where not ok: [n, DIM]."""
    inside = ok[:, None] & (lanes < width)[None, :]
    return tl.load(x + at[:, None] + lanes[None, :], mask=inside, other=0.0)


@triton.jit
def _own_seen(query, block, key, key_ok, SIZE: tl.constexpr, CAUSAL: tl.constexpr):
    """Which own keys [n] the queries [ROWS] see: those of their block."""
    seen = (block[:, None] == (key // SIZE)[None, :]) & key_ok[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= query[:, None])
    return seen


@triton.jit
def _soften(q, k, v, seen, top, mass, out, scale):
    """One step of an online softmax over the keys of a tile."""
    s = tl.dot(q, tl.trans(k)) * scale
    s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(top, tl.max(s, axis=1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp(s - safe[:, None])
    shrink = tl.exp(top - safe)
    mass = mass * shrink + tl.sum(p, axis=1)
    out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    return new, mass, out


@triton.jit
def _block_forward(
    q, k, v, own_k, own_v, start, end, out, lse, queries, heads, groups, width, scale,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    share = heads // groups
    group = tl.program_id(1)
    row, real, query, block = _block_rows(tl.program_id(0), queries, share, SIZE, ROWS)
    lanes = tl.arange(0, DIM)
    at = (query * heads + group * share + row % share) * width
    q_tile = _load(q, at, lanes, real, width, DIM)
    first, last = tl.load(start + block), tl.load(end + block)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    # The context.
    for begin in range(tl.min(first), tl.max(last), KEYS):
        key = begin + tl.arange(0, KEYS)
        ok = key < tl.max(last)
        k_tile = _load(k, (key * groups + group) * width, lanes, ok, width, DIM)
        v_tile = _load(v, (key * groups + group) * width, lanes, ok, width, DIM)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        top, mass, acc = _soften(q_tile, k_tile, v_tile, seen, top, mass, acc, scale)
    # The blocks themselves.
    for begin in range(tl.min(block) * SIZE, (tl.max(block) + 1) * SIZE, KEYS):
        key = begin + tl.arange(0, KEYS)
        ok = key < queries
        k_tile = _load(own_k, (key * groups + group) * width, lanes, ok, width, DIM)
        v_tile = _load(own_v, (key * groups + group) * width, lanes, ok, width, DIM)
        seen = _own_seen(query, block, key, ok, SIZE, CAUSAL)
        top, mass, acc = _soften(q_tile, k_tile, v_tile, seen, top, mass, acc, scale)
    acc = acc / mass[:, None]
    inside = real[:, None] & (lanes < width)[None, :]
    tl.store(out + at[:, None] + lanes[None, :], acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + group * queries * share + row, top + tl.log(mass), mask=real)


@triton.jit
def _d_scores(q, k, v, d_out, total, shift, seen, scale):
    """Softmax weights and the gradient of the scores of one tile, both [ROWS, KEYS]."""
    s = tl.dot(q, tl.trans(k)) * scale
    p = tl.where(seen, tl.exp(s - total[:, None]), 0.0)
    d_p = tl.dot(d_out, tl.trans(v))
    return p, p * (d_p - shift[:, None]) * scale


@triton.jit
def _block_d_query(
    q, k, v, own_k, own_v, start, end, d_out, lse, shifts, d_q, queries, heads, groups, width,
    scale, SIZE: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    share = heads // groups
    group = tl.program_id(1)
    row, real, query, block = _block_rows(tl.program_id(0), queries, share, SIZE, ROWS)
    lanes = tl.arange(0, DIM)
    at = (query * heads + group * share + row % share) * width
    q_tile = _load(q, at, lanes, real, width, DIM)
    d_tile = _load(d_out, at, lanes, real, width, DIM)
    total = tl.load(lse + group * queries * share + row, mask=real, other=0.0)
    shift = tl.load(shifts + group * queries * share + row, mask=real, other=0.0)
    first, last = tl.load(start + block), tl.load(end + block)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for begin in range(tl.min(first), tl.max(last), KEYS):
        key = begin + tl.arange(0, KEYS)
        ok = key < tl.max(last)
        k_tile = _load(k, (key * groups + group) * width, lanes, ok, width, DIM)
        v_tile = _load(v, (key * groups + group) * width, lanes, ok, width, DIM)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        _, d_s = _d_scores(q_tile, k_tile, v_tile, d_tile, total, shift, seen, scale)
        acc += tl.dot(d_s.to(k_tile.dtype), k_tile)
    for begin in range(tl.min(block) * SIZE, (tl.max(block) + 1) * SIZE, KEYS):
        key = begin + tl.arange(0, KEYS)
        ok = key < queries
        k_tile = _load(own_k, (key * groups + group) * width, lanes, ok, width, DIM)
        v_tile = _load(own_v, (key * groups + group) * width, lanes, ok, width, DIM)
        seen = _own_seen(query, block, key, ok, SIZE, CAUSAL)
        _, d_s = _d_scores(q_tile, k_tile, v_tile, d_tile, total, shift, seen, scale)
        acc += tl.dot(d_s.to(k_tile.dtype), k_tile)
    inside = real[:, None] & (lanes < width)[None, :]
    tl.store(d_q + at[:, None] + lanes[None, :], acc.to(d_q.dtype.element_ty), mask=inside)


@triton.jit
def _block_d_key(
    q, k, v, start, end, reach, d_out, lse, shifts, d_k, d_v, queries, keys, heads, groups, width,
    scale, OWN: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys: the blocks' own if OWN, else the context's. reach int32
    [2, tiles]: the first block that sees a context tile and the one behind the last."""
    share = heads // groups
    tile, group = tl.program_id(0), tl.program_id(1)
    key = tile * KEYS + tl.arange(0, KEYS)
    ok = key < keys
    lanes = tl.arange(0, DIM)
    at = (key * groups + group) * width
    k_tile = _load(k, at, lanes, ok, width, DIM)
    v_tile = _load(v, at, lanes, ok, width, DIM)
    if OWN:
        lowest = tile * KEYS // SIZE
        highest = tl.minimum(tile * KEYS + KEYS, keys) - 1
        highest = highest // SIZE + 1
    else:
        lowest = tl.load(reach + tile)
        highest = tl.load(reach + tl.num_programs(0) + tile)
    k_acc = tl.zeros([KEYS, DIM], tl.float32)
    v_acc = tl.zeros([KEYS, DIM], tl.float32)
    for begin in range(lowest * SIZE * share, highest * SIZE * share, ROWS):
        row = begin + tl.arange(0, ROWS)
        real = row < highest * SIZE * share
        query = tl.where(real, row // share, 0)
        block = query // SIZE
        rows_at = (query * heads + group * share + row % share) * width
        q_tile = _load(q, rows_at, lanes, real, width, DIM)
        d_tile = _load(d_out, rows_at, lanes, real, width, DIM)
        total = tl.load(lse + group * queries * share + row, mask=real, other=0.0)
        shift = tl.load(shifts + group * queries * share + row, mask=real, other=0.0)
        if OWN:
            seen = _own_seen(query, block, key, ok, SIZE, CAUSAL)
        else:
            first, last = tl.load(start + block), tl.load(end + block)
            seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        seen = seen & real[:, None]
        p, d_s = _d_scores(q_tile, k_tile, v_tile, d_tile, total, shift, seen, scale)
        v_acc += tl.dot(tl.trans(p.to(d_tile.dtype)), d_tile)
        k_acc += tl.dot(tl.trans(d_s.to(q_tile.dtype)), q_tile)
    inside = ok[:, None] & (lanes < width)[None, :]
    tl.store(d_k + at[:, None] + lanes[None, :], k_acc.to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + at[:, None] + lanes[None, :], v_acc.to(d_v.dtype.element_ty), mask=inside)


FORWARD, D_QUERY, D_KEY = (64, 32, 4), (64, 32, 4), (128, 32, 4)
"""Rows and keys of a tile, and warps, of each kernel: the fastest of 18 on an H200."""


def _block_launch(
    q: Tensor, k: Tensor, blocks: Blocks, tile: tuple[int, int, int]
) -> tuple[tuple[int, int], tuple, dict]:
    """Grid over queries, scalar arguments and constants that the kernels share."""
    (queries, heads, width), groups = q.shape, k.shape[1]
    rows, keys, warps = tile
    constants = {
        "SIZE": blocks.size,
        "CAUSAL": blocks.causal,
        "ROWS": rows,
        "KEYS": keys,
        "DIM": max(16, triton.next_power_of_2(width)),
        "num_warps": warps,
    }
    grid = triton.cdiv(queries * (heads // groups), rows), groups
    return grid, (heads, groups, width, width**-0.5), constants


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """`block_attention.plain_block_attention` in one kernel: the output [Q, h, d] and the
    log-sum-exp fp32 [g, Q * h / g]."""
    q, k, v, own_k, own_v = (x.contiguous() for x in (q, k, v, own_k, own_v))
    grid, numbers, constants = _block_launch(q, k, blocks, FORWARD)
    out = torch.empty_like(q)
    lse = torch.empty(k.shape[1], q.shape[0] * (q.shape[1] // k.shape[1]), device=q.device)
    _block_forward[grid](
        q, k, v, own_k, own_v, blocks.start, blocks.end, out, lse, len(q), *numbers, **constants
    )
    return out, lse


def block_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, own_k and own_v, given the output and its log-sum-exp."""
    q, k, v, own_k, own_v = (x.contiguous() for x in (q, k, v, own_k, own_v))
    grid, numbers, constants = _block_launch(q, k, blocks, D_QUERY)
    # sum(dO * O) of each row, in the order of `lse`.
    shifts = (d_out.float() * out.float()).sum(-1).unflatten(1, (k.shape[1], -1))
    shifts = shifts.transpose(0, 1).flatten(1).contiguous()
    d_q = torch.empty_like(q)
    _block_d_query[grid](
        q, k, v, own_k, own_v, blocks.start, blocks.end, d_out, lse, shifts, d_q, len(q),
        *numbers, **constants,
    )  # fmt: skip
    # Which blocks see a tile of context: both ends are sorted, so they are a run.
    _, numbers, constants = _block_launch(q, k, blocks, D_KEY)
    tile = constants["KEYS"]
    begins = torch.arange(0, len(k), tile, device=q.device, dtype=torch.int32)
    reach = torch.stack(
        [
            torch.searchsorted(blocks.end, begins, right=True),
            torch.searchsorted(blocks.start, begins + tile),
        ]
    ).int()
    gradients = [d_q]
    for own, keys, values in ((False, k, v), (True, own_k, own_v)):
        d_k, d_v = torch.empty_like(keys), torch.empty_like(values)
        _block_d_key[triton.cdiv(len(keys), tile), k.shape[1]](
            q, keys, values, blocks.start, blocks.end, reach, d_out, lse, shifts, d_k, d_v, len(q),
            len(keys), *numbers, OWN=own, **constants,
        )  # fmt: skip
        gradients += [d_k, d_v]
    return tuple(gradients)
