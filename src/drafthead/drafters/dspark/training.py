"""A packed row through head and loss: gradients and the numbers that logs want.

Teacher forcing: the Markov head reads the true token before each slot. The confidence head learns
the acceptance 1 - TV of each slot, from states and embeddings that it does not change.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.drafters.dspark.model import DecoderLayer, DSparkHead, Rotation
from drafthead.drafters.dspark.packing import BlockBatch
from drafthead.ops.block_attention import block_attention
from drafthead.ops.gather import take_rows
from drafthead.ops.losses import LossKind, Teacher, gradient_rule


@dataclass(frozen=True)
class BlockObjective:
    """What is minimised: the mean over supervised slots of exp(-j / decay) times slot j's loss."""

    loss: LossKind = "kl"
    decay: float = 4.0
    """Later slots count only if earlier ones were accepted (DSpark: 4)."""
    chunk_rows: int = 2048
    """Rows whose logits exist at once."""


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, markov, lm_head, w2, batch, teacher, weights, kind, chunk_rows):
        needs = ctx.needs_input_grad
        # One product for both heads: [state, Markov embedding] against [LM head, w2].
        x, joint = torch.cat([states, markov], dim=-1), torch.cat([lm_head, w2], dim=-1)
        rule = gradient_rule(x)
        d_x = torch.empty_like(x) if any(needs) else None
        d_head = torch.zeros_like(lm_head) if needs[2] else None
        d_w2 = torch.zeros_like(w2) if needs[3] else None
        loss = torch.zeros((), dtype=weights.dtype, device=x.device)
        overlap = torch.empty_like(weights)
        predicted = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for slots, rows in _chunks(batch.teacher_ends, chunk_rows):
            logits = x[slots] @ joint.t()
            soft = teacher.logits(batch.last[rows].to(x.dtype)) if kind != "ce" else None
            losses, gradient, best, accepted = rule(
                logits[None], soft, batch.labels[rows], weights[None, slots], kind,
                batch.teacher_of[slots] - rows.start,
            )  # fmt: skip
            loss += losses.sum()
            overlap[slots], predicted[slots] = accepted[0], best[0]
            if d_x is not None:
                gradient = gradient[0]
                d_x[slots] = gradient @ joint
                if d_head is not None:
                    d_head.addmm_(gradient.t(), states[slots])
                if d_w2 is not None:
                    d_w2.addmm_(gradient.t(), markov[slots])
            # Or they would live on beside the next chunk's: most of the step's peak memory.
            del logits, soft, gradient
        correct = predicted == batch.labels[batch.teacher_of]
        ctx.save_for_backward(d_x, d_head, d_w2)
        ctx.width = states.shape[-1]
        ctx.mark_non_differentiable(overlap, correct)
        return loss, overlap, correct

    @staticmethod
    def backward(ctx, d_loss, *_):
        d_x, d_head, d_w2 = ctx.saved_tensors
        d_states, d_markov = d_x.mul_(d_loss).split([ctx.width, d_x.shape[-1] - ctx.width], dim=-1)
        d_head, d_w2 = (x if x is None else x.mul_(d_loss) for x in (d_head, d_w2))
        return d_states, d_markov, d_head, d_w2, None, None, None, None, None


def _chunks(ends: tuple[int, ...], most: int) -> list[tuple[slice, slice]]:
    """Runs of at most `most` slots (or one teacher row's), with their runs of teacher rows."""
    chunks, first = [], 0
    while first < len(ends) - 1:
        last = first + 1
        while last < len(ends) - 1 and ends[last + 1] - ends[first] <= most:
            last += 1
        chunks.append((slice(ends[first], ends[last]), slice(first, last)))
        first = last
    return chunks


def block_loss(
    states: Tensor,
    markov: Tensor,
    lm_head: Tensor,
    w2: Tensor,
    batch: BlockBatch,
    teacher: Teacher,
    weights: Tensor,
    kind: LossKind,
    chunk_rows: int = 2048,
) -> tuple[Tensor, Tensor, Tensor]:
    """LM head, Markov projection and loss in chunks: no logits outlive their chunk.

    states [R, H]: what the LM head reads at the supervised slots. markov [R, r]: their Markov
    embeddings. lm_head [Vd, H], w2 [Vd, r]. weights fp32 [R].

    Returns the weighted sum of the losses (differentiable, once), the chance fp32 [R] that each
    slot's draft is accepted, and whether its likeliest token is the true one, bool [R].
    """
    return _BlockLoss.apply(states, markov, lm_head, w2, batch, teacher, weights, kind, chunk_rows)


# The pieces between two attentions, each compiled as one graph.


def first_qkv(
    head: DSparkHead, anchors: Tensor, mask: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """anchors [B, H] and mask [H], embeddings -> the residual stream [B * S, H], q, k and v of the
    first layer."""
    size = len(rotation[0]) // len(anchors)
    x = torch.cat([anchors[:, None], mask.expand(len(anchors), size - 1, -1)], dim=1).flatten(0, 1)
    return x, *head.layers[0].qkv(x, rotation)


def next_qkv(
    below: DecoderLayer, layer: DecoderLayer, attended: Tensor, x: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From one layer's attention to the next one's: the residual stream, q, k and v."""
    x = below.outputs(attended, x)
    return x, *layer.qkv(x, rotation)


def last_states(head: DSparkHead, attended: Tensor, x: Tensor) -> Tensor:
    """From the last layer's attention to what the LM head reads [B * S, H]."""
    return head.norm(head.layers[-1].outputs(attended, x))


class BlockStep:
    """Adds one row's gradients to the head's parameters.

    mask [H]: the target's embedding of the mask token. lm_head [V, H]: the target's, for a head
    without one. Head, teacher and batches live on one device.
    """

    def __init__(
        self,
        head: DSparkHead,
        teacher: Teacher,
        objective: BlockObjective,
        mask: Tensor,
        lm_head: Tensor | None = None,
        compiled: bool = False,
    ):
        self.head, self.teacher, self.objective, self.mask = head, teacher, objective, mask
        self.lm_head = lm_head
        wrap: Callable = functools.partial(torch.compile, dynamic=True, fullgraph=True)
        wrap = wrap if compiled else lambda f: f
        self._context, self._first, self._next, self._last = map(
            wrap, (DSparkHead.context, first_qkv, next_qkv, last_states)
        )

    def states(self, batch: BlockBatch) -> Tensor:
        """What the LM head reads at every slot: [B * S, H]."""
        head, blocks, dtype = self.head, batch.blocks, self.head.fc.weight.dtype
        context = self._context(head, batch.aux.to(dtype), head.rotary(batch.positions, dtype))
        steps = torch.arange(blocks.size, device=batch.positions.device)
        rotation = head.rotary((batch.anchor_positions[:, None] + steps).flatten(), dtype)
        x, q, k, v = self._first(head, batch.anchors.to(dtype), self.mask, rotation)
        for below, layer, (keys, values) in zip(head.layers, head.layers[1:], context):
            attended = block_attention(q, keys, values, k, v, blocks)
            x, q, k, v = self._next(below, layer, attended, x, rotation)
        keys, values = context[-1]
        return self._last(head, block_attention(q, keys, values, k, v, blocks), x)

    def loss(self, batch: BlockBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss summed over the row's slots, and by step the slots whose likeliest token is the
        true one and all supervised ones, int64 [S]."""
        head, objective = self.head, self.objective
        states = take_rows(self.states(batch), batch.slots, batch.slot_of)
        markov = head.markov_head.markov_w1(batch.previous)
        step = batch.slots % batch.blocks.size
        weights = torch.exp(-step.float() / objective.decay)
        lm_head = self.lm_head if head.lm_head is None else head.lm_head.weight
        assert lm_head is not None
        loss, overlap, correct = block_loss(
            states, markov, lm_head, head.markov_head.markov_w2.weight, batch, self.teacher,
            weights, objective.loss, objective.chunk_rows,
        )  # fmt: skip
        if head.confidence_head is not None:
            odds = head.confidence_head(states.detach(), markov.detach())
            loss = loss + F.binary_cross_entropy_with_logits(
                odds, overlap.clamp(0, 1), weights, reduction="sum"
            )
        counts = torch.zeros(2, batch.blocks.size, dtype=torch.int64, device=step.device)
        counts[0].scatter_add_(0, step, correct.long())
        counts[1].scatter_add_(0, step, torch.ones_like(step))
        return loss, counts[0], counts[1]

    def backward(self, batch: BlockBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate gradients of the summed loss; returns what `loss` does, detached."""
        loss, correct, counted = self.loss(batch)
        loss.backward()
        return loss.detach(), correct, counted


def operations(head: DSparkHead, batch: BlockBatch) -> float:
    """Multiplications and additions of one training step over a row, by its matrix products:
    what a perfect process would have to do (attention scores left out)."""
    c, queries, slots = head.config, len(batch.slot_of), len(batch.slots)
    h, d = c.hidden_size, c.head_dim
    kv = 2 * c.num_key_value_heads * d * h
    layer = kv + 2 * c.num_attention_heads * d * h + 3 * h * c.intermediate_size
    joint = c.draft_vocab_size * (h + c.markov_rank)
    trained_head = c.draft_vocab_size * c.markov_rank
    if head.lm_head is not None and head.lm_head.weight.requires_grad:
        trained_head += c.draft_vocab_size * h
    fc = c.num_aux_hidden_states * c.target_hidden_size * h
    return 2.0 * (
        2 * batch.tokens * fc  # no gradient of the states
        + 3 * batch.tokens * kv * len(head.layers)
        + 3 * queries * layer * len(head.layers)
        + slots * (2 * joint + trained_head)
        + len(batch.labels) * c.draft_vocab_size * c.target_hidden_size
    )
