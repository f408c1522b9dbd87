"""Training-time test: the head's own steps over a packed row, as the server will take them.

Step t at position i reads the embedding of x[i+1+t], the head's own state of step t-1 there (at
step 0 the fused aux states) and RoPE position i+t; its attention is that of `attention.py`. All
positions give keys and values at step 0; only live ones have queries, MLP and later steps.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from drafthead.drafters.eagle3.batch import Batch
from drafthead.head.model import Attention, DecoderLayer, Eagle3Head, rotate
from drafthead.ops.attention import attention
from drafthead.ops.gather import take_rows


def project(
    layer: DecoderLayer,
    embeds: Tensor,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor | None = None,
    live_of: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a layer's attention, and the residual added to its output: q, k, v, residual.

    With `live` and `live_of` (its inverse) q and residual of those rows only.
    """
    x, residual = layer.inputs(embeds, hidden)
    attention = layer.self_attn
    if live is None or live_of is None:
        return *attention.qkv(x, cos, sin), residual
    heads = lambda x, p: p(x).unflatten(-1, (-1, attention.head_dim))
    k, v = rotate(heads(x, attention.k_proj), cos, sin), heads(x, attention.v_proj)
    q = rotate(heads(take_rows(x, live, live_of), attention.q_proj), cos[live], sin[live])
    return q, k, v, take_rows(residual, live, live_of)


# The pieces between two attentions, each compiled as one graph: on a small head a step's time is
# what the host needs to start its pieces.


def first_qkv(
    head: Eagle3Head,
    aux: Tensor,
    embeds: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor | None,
    live_of: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the batch to the first attention: aux [N, A, Ht], embeds [N, H] -> as `project`."""
    return project(head.layers[0], embeds, head.fuse(aux), cos, sin, live, live_of)


def next_layer_qkv(
    below: DecoderLayer,
    layer: DecoderLayer,
    attended: Tensor,
    residual: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor | None,
    live_of: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From one layer's attention to the next layer's."""
    hidden = below.outputs(attended, residual)
    return project(layer, hidden, hidden, cos, sin, live, live_of)


def last_states(
    head: Eagle3Head, attended: Tensor, residual: Tensor, rows: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """From the last layer's attention to what the LM head reads at the supervised rows [M, H], and
    the state of all live positions [n, H]."""
    hidden = head.layers[-1].outputs(attended, residual)
    return head.output(take_rows(hidden, rows, inverse)), hidden


def next_step_qkv(
    head: Eagle3Head,
    attended: Tensor,
    residual: Tensor,
    rows: Tensor,
    inverse: Tensor,
    embeds: Tensor,
    later: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`last_states`, and on to the first attention of the next step.

    embeds [N, H] are taken at `later`, int [n]. Returns [M, H], then as `project`.
    """
    state, hidden = last_states(head, attended, residual, rows, inverse)
    return state, *project(head.layers[0], embeds[later], head.feedback(hidden), cos, sin)


class TrainingTimeTest:
    """Runs a head for `steps` steps over batches.

    compiled: put the pieces between the attention calls through torch.compile (row counts are
    dynamic, so each compiles once; the attention is a kernel of its own in between).
    """

    def __init__(self, head: Eagle3Head, steps: int, compiled: bool = False):
        self.head, self.steps = head, steps
        wrap: Callable = functools.partial(torch.compile, dynamic=True, fullgraph=True)
        wrap = wrap if compiled else lambda f: f
        self._first_qkv, self._next_layer_qkv, self._next_step_qkv, self._last_states = map(
            wrap, (first_qkv, next_layer_qkv, next_step_qkv, last_states)
        )

    def __call__(self, batch: Batch) -> Tensor:
        """The states that the LM head reads: [T, M, H], rows as in `batch.student`."""
        # Not views, and rows at the start of their memory: what is compiled for one view is
        # compiled anew for one that fills its memory otherwise or does not begin with it.
        batch = batch.map(Tensor.detach)
        head, docs, all_docs = self.head, batch.documents, batch.documents.all_rows()
        dtype, final = head.fc.weight.dtype, len(head.layers) - 1
        embeds = batch.embeds.to(dtype)
        where = [(rows.clone(), of.clone()) for rows, of in zip(batch.student, batch.student_of)]
        prefix: list[tuple[Tensor, Tensor]] = []
        own: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in head.layers]

        def first(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefix.append((k, v))
            queries, window = docs if index == final else all_docs, head.config.window(index)
            return attention(q, k, v, None, None, queries, window)

        def again(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in zip(own[index], (k, v)):
                kept.append(new)
            own_k, own_v = (torch.stack(kept) for kept in own[index])
            window = head.config.window(index)
            left = window and window - len(own_k)  # the rest of the window is the head's own rows
            return attention(q, *prefix[index], own_k, own_v, docs, left)

        cos, sin = head.rotary(batch.positions, dtype)
        live = batch.live, batch.live_of
        x = self._first_qkv(head, batch.aux.to(dtype), embeds, cos, sin, *_only(live, final == 0))
        attended, residual = self._layers(x, cos, sin, first, live)
        states: list[Tensor] = []
        for step, (later, cos, sin) in enumerate(self._later_steps(batch, dtype)):
            state, *x = self._next_step_qkv(
                head, attended, residual, *where[step], embeds, later, cos, sin
            )
            attended, residual = self._layers(x, cos, sin, again)
            states.append(state)
        states.append(self._last_states(head, attended, residual, *where[-1])[0])
        return torch.stack(states)

    def _layers(
        self,
        x: Iterable[Tensor],
        cos: Tensor,
        sin: Tensor,
        attend: Attention,
        live: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Through all layers, from what `project` gave of the first one: the last one's attention
        output and residual. `live`: rows that alone have queries there."""
        q, k, v, residual = x
        layers = self.head.layers
        for index in range(1, len(layers)):
            attended = attend(index - 1, q, k, v)
            q, k, v, residual = self._next_layer_qkv(
                layers[index - 1], layers[index], attended, residual, cos, sin,
                *_only(live, index == len(layers) - 1),
            )  # fmt: skip
        return attend(len(layers) - 1, q, k, v), residual

    def _later_steps(
        self, batch: Batch, dtype: torch.dtype
    ) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Of each step from 1 on: which row of `embeds` a live position reads [n], and its
        rotation [n, 1, d]; worked out for all steps at once."""
        ahead = torch.arange(1, self.steps, device=batch.live.device)[:, None]
        later = (batch.live + ahead).clamp(max=batch.tokens - 1)
        positions = batch.positions[batch.live] + ahead
        cos, sin = (
            x.unflatten(0, positions.shape) for x in self.head.rotary(positions.flatten(), dtype)
        )
        return zip(later, cos, sin)


def _only(
    live: tuple[Tensor, Tensor] | None, here: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The arguments `live` and `live_of` of `project`."""
    return live if live is not None and here else (None, None)
