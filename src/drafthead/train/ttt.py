"""Training-time test: the head's own steps over a packed row, as the server will take them.

Step t at position i reads the embedding of x[i+1+t], the head's own state of step t-1 there (at
step 0 the fused aux states) and RoPE position i+t; its attention is that of `attention.py`. All
positions give keys and values at step 0; only live ones have queries, MLP and later steps.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from drafthead.head.model import DecoderLayer, Eagle3Head, rotate
from drafthead.train.attention import Documents, attention
from drafthead.train.batches import Batch


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, inverse):
        ctx.save_for_backward(inverse)
        return x[rows]

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        taken = (inverse >= 0)[:, None]
        return torch.where(taken, gradient[inverse.clamp(min=0)], 0.0), None, None


def take_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """x [N, H] at rows int [n], each at most once -> [n, H].

    inverse int [N]: where each row of x went, -1 for nowhere. The gradient is a gather too: no
    atomics, no sorting, the same bits every time. Rows that `inverse` leaves out get no gradient.
    """
    return _TakeRows.apply(x, rows, inverse)


def first_inputs(head: Eagle3Head, aux: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """aux [N, A, Ht], embeds [N, H] -> the first layer's projection input and residual."""
    return head.layers[0].inputs(embeds, head.fuse(aux))


def next_inputs(layer: DecoderLayer, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A later layer's, or a later step's, projection input and residual."""
    return layer.inputs(embeds, hidden)


def project(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of every row of x."""
    return layer.self_attn.qkv(x, cos, sin)


def project_live(
    layer: DecoderLayer,
    x: Tensor,
    residual: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor,
    live_of: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k and v of every row of x, q and residual of the live ones only."""
    own = layer.self_attn
    heads = lambda x, p: p(x).unflatten(-1, (-1, own.head_dim))
    k, v = rotate(heads(x, own.k_proj), cos, sin), heads(x, own.v_proj)
    q = rotate(heads(take_rows(x, live, live_of), own.q_proj), cos[live], sin[live])
    return q, k, v, take_rows(residual, live, live_of)


def outputs(layer: DecoderLayer, attended: Tensor, residual: Tensor) -> Tensor:
    """The rest of a layer after its attention."""
    return layer.outputs(attended, residual)


def select(head: Eagle3Head, decoded: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """What the LM head reads at the supervised rows: decoded [n, H] -> [M, H]."""
    return head.output(take_rows(decoded, rows, inverse))


class TrainingTimeTest:
    """Runs a head for `steps` steps over batches.

    compiled: put the pieces between the attention calls through torch.compile (row counts are
    dynamic, so each compiles once; the attention is a kernel of its own in between).
    """

    def __init__(self, head: Eagle3Head, steps: int, compiled: bool = False):
        self.head, self.steps = head, steps
        wrap: Callable = functools.partial(torch.compile, dynamic=True, fullgraph=True)
        wrap = wrap if compiled else lambda f: f
        self._first_inputs, self._project, self._project_live = map(
            wrap, (first_inputs, project, project_live)
        )
        self._outputs, self._select, self._next = map(wrap, (outputs, select, next_inputs))

    def __call__(self, batch: Batch) -> Tensor:
        """The states that the LM head reads: [T, M, H], rows as in `batch.student`."""
        head, live = self.head, batch.live
        dtype = head.fc.weight.dtype
        docs, all_docs = batch.documents, _all_rows(batch.documents)
        final = len(head.layers) - 1

        embeds = batch.embeds.to(dtype)
        cos, sin = head.rotary(batch.positions, dtype)
        prefix: list[tuple[Tensor, Tensor]] = []
        own: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in head.layers]
        hidden = torch.empty(0)
        for index, layer in enumerate(head.layers):
            if index == 0:
                x, residual = self._first_inputs(head, batch.aux.to(dtype), embeds)
            else:
                x, residual = self._next(layer, embeds, hidden)
            if index == final:
                q, k, v, residual = self._project_live(
                    layer, x, residual, cos, sin, live, batch.live_of
                )
            else:
                q, k, v = self._project(layer, x, cos, sin)
            prefix.append((k, v))
            attended = attention(q, k, v, None, None, docs if index == final else all_docs)
            hidden = self._outputs(layer, attended, residual)
        states = [self._select(head, hidden, batch.student[0], batch.student_of[0])]

        for step in range(1, self.steps):
            later = embeds[(live + step).clamp(max=batch.tokens - 1)]
            cos, sin = head.rotary(batch.positions[live] + step, dtype)
            hidden = head.feedback(hidden)
            for index, layer in enumerate(head.layers):
                x, residual = self._next(layer, later, hidden)
                q, k, v = self._project(layer, x, cos, sin)
                for kept, new in zip(own[index], (k, v)):
                    kept.append(new)
                own_k, own_v = (torch.stack(kept) for kept in own[index])
                attended = attention(q, *prefix[index], own_k, own_v, docs)
                hidden = self._outputs(layer, attended, residual)
            states.append(self._select(head, hidden, batch.student[step], batch.student_of[step]))
        return torch.stack(states)


def _all_rows(docs: Documents) -> Documents:
    """The same documents with every position a query."""
    return Documents(docs.k_lengths, docs.k_lengths, docs.cu_k, docs.cu_k)
