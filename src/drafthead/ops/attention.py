"""Attention of training-time test over packed documents: a prefix and the head's own diagonals.

At step t a query at position i sees the step-0 keys of its document up to i, and its own keys of
the steps 1..t (EAGLE-3's training-time test, arXiv 2503.01840; as served, where the k-th draft sees
the true prefix and the k-1 drafts before it). So no mask is needed: variable-length causal flash
attention for the prefix, then at most t more keys merged into its log-sum-exp. A sliding window of
W positions leaves W - t of the prefix at step t.

The gradient needs no derivative of the log-sum-exp. With the merged output and the merged
log-sum-exp, the backward of flash attention, which rebuilds P = exp(q k - lse) and takes
D = sum(dO * O), gives the prefix's exact share of the whole softmax's gradient (as in ring
attention, arXiv 2310.01889); the diagonals' share is elementwise.

Shapes: n query rows, N key rows, h heads, g key heads (h a multiple of g), d head dim, t diagonals.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where documents lie in the packed rows, on the host and on the device.

    A document's queries are its last positions: query j of a document with a queries and b keys
    sits at key position b - a + j. q_lengths and k_lengths hold a and b; cu_q and cu_k are their
    cumulative sums from 0, int32, on the device, where documents of no length may follow. bounds:
    what a and b may be at most, where kernels are to be told that instead of the longest.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor
    bounds: tuple[int, int] | None = None

    @property
    def longest(self) -> tuple[int, int]:
        """Of queries and of keys."""
        return self.bounds or (max(self.q_lengths), max(self.k_lengths))

    def all_rows(self) -> "Documents":
        """The same documents with every position a query."""
        bounds = self.bounds and (self.bounds[1], self.bounds[1])
        return Documents(self.k_lengths, self.k_lengths, self.cu_k, self.cu_k, bounds)

    @classmethod
    def of(
        cls, q_lengths: list[int], k_lengths: list[int], device: torch.device | str = "cpu"
    ) -> "Documents":
        cumulative = lambda lengths: torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        return cls(tuple(q_lengths), tuple(k_lengths), cumulative(q_lengths), cumulative(k_lengths))

    def spans(self) -> list[tuple[slice, slice]]:
        """Query rows and key rows of each document."""
        spans, q, k = [], 0, 0
        for a, b in zip(self.q_lengths, self.k_lengths):
            spans.append((slice(q, q + a), slice(k, k + b)))
            q, k = q + a, k + b
        return spans


def _has_kernels(q: Tensor) -> bool:
    """Whether q is what the GPU kernels take."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _prefix_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int | None
) -> tuple[Tensor, ...]:
    """Causal attention inside documents: output [n, h, d], log-sum-exp fp32 [h, n], and two tensors
    that the backward of the GPU kernel wants back."""
    if _has_kernels(q):
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, docs.cu_q, docs.cu_k, *docs.longest, 0.0, True, False,
            scale=q.shape[-1] ** -0.5, window_size_left=window and window - 1,
        )  # fmt: skip
        return out, lse, state, unused
    out = torch.empty_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    for rows, keys in docs.spans():
        scores = _scores(q[rows], k[keys], window)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1)
        weights = scores.sub_(lse[:, rows].view(*scores.shape[:2], -1, 1)).exp_().to(v.dtype)
        out[rows] = (weights @ v[keys].permute(1, 0, 2)[:, None]).flatten(0, 1).transpose(0, 1)
    return out, lse


def _prefix_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Documents,
    window: int | None, extra: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v through the prefix, given the output and log-sum-exp of the whole."""
    if _has_kernels(q):
        return torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, docs.cu_q, docs.cu_k, *docs.longest, 0.0, True, *extra,
            scale=q.shape[-1] ** -0.5, window_size_left=window and window - 1,
        )  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale = q.shape[-1] ** -0.5
    for rows, keys in docs.spans():
        scores = _scores(q[rows], k[keys], window)
        p = scores.sub_(lse[:, rows].view(*scores.shape[:2], -1, 1)).exp_().to(q.dtype)
        q_rows, d_rows, o_rows = (_by_group(x[rows], k.shape[1]) for x in (q, d_out, out))
        d_p = d_rows @ v[keys].permute(1, 2, 0)[:, None]
        shift = (d_rows * o_rows).sum(-1, keepdim=True)
        d_s = (d_p - shift) * p * scale
        dq[rows] = (d_s @ k[keys].permute(1, 0, 2)[:, None]).flatten(0, 1).transpose(0, 1)
        dk[keys] = (d_s.flatten(1, 2).mT @ q_rows.flatten(1, 2)).transpose(0, 1)
        dv[keys] = (p.flatten(1, 2).mT @ d_rows.flatten(1, 2)).transpose(0, 1)
    return dq, dk, dv


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[a, h, d] -> [g, h / g, a, d]."""
    return x.transpose(0, 1).unflatten(0, (groups, -1))


def _scores(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Scaled causal scores of one document: q [a, h, d], k [b, g, d] -> [g, h / g, a, b], fp32 or
    better."""
    a, b = len(q), len(k)
    scores = _by_group(q, k.shape[1]) @ k.permute(1, 2, 0)[:, None]
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * q.shape[-1] ** -0.5
    hidden = torch.ones(a, b, dtype=torch.bool, device=q.device).triu(b - a + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(b - a - window)
    return scores.masked_fill_(hidden, -torch.inf)


def merge(
    out: Tensor, lse: Tensor, q: Tensor, diagonal_k: Tensor, diagonal_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Add diagonals to a finished softmax. out [n, h, d], lse [h, n], q [n, h, d], diagonal_k and
    diagonal_v [t, n, g, d] -> the output [n, h, d] and log-sum-exp [h, n] over all keys."""
    groups, scale = diagonal_k.shape[2], q.shape[-1] ** -0.5
    by_group = lambda x: x.unflatten(1, (groups, -1)).to(lse.dtype)
    scores = (by_group(q) * diagonal_k[:, :, :, None]).sum(-1) * scale
    first = by_group(lse.t())
    total = torch.cat([first[None], scores]).logsumexp(0)
    merged = by_group(out) * (first - total).exp()[..., None]
    merged = merged + ((scores - total).exp()[..., None] * diagonal_v[:, :, :, None]).sum(0)
    return merged.flatten(1, 2).to(out.dtype), total.flatten(1).t().contiguous()


def merge_backward(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    diagonal_k: Tensor,
    diagonal_v: Tensor,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients through the diagonals, given the merged out and lse: returns those of diagonal_k
    and diagonal_v [t, n, g, d] and adds the diagonals' share to dq [n, h, d]."""
    groups, scale = diagonal_k.shape[2], q.shape[-1] ** -0.5
    by_group = lambda x: x.unflatten(1, (groups, -1)).to(lse.dtype)
    query, keys, values = by_group(q), diagonal_k[:, :, :, None], diagonal_v[:, :, :, None]
    d_rows = by_group(d_out)
    p = ((query * keys).sum(-1) * scale - by_group(lse.t())).exp()
    shift = (d_rows * by_group(out)).sum(-1)
    d_s = p * ((d_rows * values).sum(-1) - shift) * scale
    dq += (d_s[..., None] * keys).sum(0).flatten(1, 2).to(dq.dtype)
    d_k = (d_s[..., None] * query).sum(3)
    d_v = (p[..., None] * d_rows).sum(3)
    return d_k.to(diagonal_k.dtype), d_v.to(diagonal_v.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, diagonal_k, diagonal_v, documents, window):
        out, lse, *extra = _prefix_forward(q, k, v, documents, window)
        if diagonal_k is not None:
            out, lse = _merge_rules(q)[0](out, lse, q, diagonal_k, diagonal_v)
        ctx.save_for_backward(q, k, v, out, lse, diagonal_k, diagonal_v, *extra)
        ctx.documents, ctx.window = documents, window
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, diagonal_k, diagonal_v, *extra = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = _prefix_backward(
            d_out, q, k, v, out, lse, ctx.documents, ctx.window, tuple(extra)
        )
        d_diagonal_k = d_diagonal_v = None
        if diagonal_k is not None:
            dq = dq.contiguous()
            d_diagonal_k, d_diagonal_v = _merge_rules(q)[1](
                d_out, out, lse, q, diagonal_k, diagonal_v, dq
            )
        return dq, dk, dv, d_diagonal_k, d_diagonal_v, None, None


def _merge_rules(q: Tensor):
    """`merge` and `merge_backward`, as Triton kernels on a GPU. These take heads whose width is a
    power of two, as Triton's tensors are; Phi-3's are 96 wide."""
    if _has_kernels(q) and q.shape[-1].bit_count() == 1:
        from drafthead.ops import kernels

        return kernels.merge, kernels.merge_backward
    return merge, merge_backward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal_k: Tensor | None,
    diagonal_v: Tensor | None,
    documents: Documents,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of each query over its document's prefix and its own diagonals.

    q [n, h, d] (RoPE applied, scale d ** -0.5 is applied here), k and v [N, g, d] of step 0,
    diagonal_k and diagonal_v [t, n, g, d] of steps 1..t, None at step 0. Returns [n, h, d].
    window: how many positions of the prefix a query sees at most, at least 1; None is all.
    """
    return _Attention.apply(q, k, v, diagonal_k, diagonal_v, documents, window)
