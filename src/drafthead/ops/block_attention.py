"""Attention of a block drafter over packed documents: each block sees a context and itself.

A block is `size` query positions that start at an anchor. They see the context keys of their
document before the anchor, and all keys of their own block (DFlash, arXiv 2602.06036; DSpark, arXiv
2607.05147), or with `causal` those up to their own position. Blocks are sorted by document and
anchor, so both ends of their contexts never decrease: a run of queries needs one run of keys and
the other way round, and no mask over the whole row is ever made.

Shapes: B blocks of S positions, Q = B * S queries, N context keys, h heads, g key heads (h a
multiple of g), d head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which context keys each block sees: those at `start` .. `end` - 1 of the packed row."""

    start: Tensor
    """int32 [B], not decreasing: where the block's document begins."""
    end: Tensor
    """int32 [B], not decreasing: the anchor's place in the packed row."""
    size: int
    """S."""
    causal: bool = False
    """Whether a position sees only the earlier ones of its block."""


def plain_block_attention(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, blocks: Blocks
) -> Tensor:
    """The definition, document by document. Arguments as for `block_attention`."""
    (_, heads, d), groups, size = q.shape, k.shape[1], blocks.size
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    by_block = lambda x: x.unflatten(0, (-1, size))
    q = (by_block(q) * d**-0.5).unflatten(2, (groups, heads // groups))
    own_k, own_v = by_block(own_k), by_block(own_v)
    starts, counts = torch.unique_consecutive(blocks.start.cpu(), return_counts=True)
    attended, first = [], 0
    for start, count in zip(starts.tolist(), counts.tolist()):
        part = slice(first, first + count)
        first += count
        end = blocks.end[part].to(q.device)
        keys = slice(start, int(end.max()))
        context = torch.einsum("bsgnd,lgd->bsgnl", q[part], k[keys])
        unseen = torch.arange(keys.start, keys.stop, device=q.device) >= end[:, None]
        context = context.masked_fill(unseen[:, None, None, None], -torch.inf)
        own = torch.einsum("bsgnd,btgd->bsgnt", q[part], own_k[part])
        if blocks.causal:
            later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
            own = own.masked_fill(later[:, None, None], -torch.inf)
        weights = torch.cat([context, own], dim=-1).to(wide).softmax(-1).to(v.dtype)
        context, own = weights.split([context.shape[-1], size], dim=-1)
        attended.append(
            torch.einsum("bsgnl,lgd->bsgnd", context, v[keys])
            + torch.einsum("bsgnt,btgd->bsgnd", own, own_v[part])
        )
    return torch.cat(attended).flatten(2, 3).flatten(0, 1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, own_k, own_v, blocks):
        from drafthead.ops.kernels import block_attention as forward

        out, lse = forward(q, k, v, own_k, own_v, blocks)
        ctx.save_for_backward(q, k, v, own_k, own_v, out, lse)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx, d_out):
        from drafthead.ops.kernels import block_attention_backward as backward

        q, k, v, own_k, own_v, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        return *backward(d_out, q, k, v, own_k, own_v, out, lse, ctx.blocks), None


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, blocks: Blocks
) -> Tensor:
    """Softmax attention of each position over its context and its block.

    q [Q, h, d] (RoPE applied, scale d ** -0.5 is applied here), k and v [N, g, d] of the context,
    own_k and own_v [Q, g, d] of the blocks. Returns [Q, h, d].
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _BlockAttention.apply(q, k, v, own_k, own_v, blocks)
    return plain_block_attention(q, k, v, own_k, own_v, blocks)
