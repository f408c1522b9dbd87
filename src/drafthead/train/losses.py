"""What a head is trained on: the loss of every step of training-time test, over supervised rows.

Shapes: T steps, M supervised tokens, H head width, Ht target width, Vd draft vocabulary. Row (t, m)
is the head's state at step t from which token m is to be predicted; all T rows of a token share one
teacher row, the target's last hidden state that predicted the same token. What the loss of a row is
says `rows.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.targets.logits import PLAIN, LogitRule
from drafthead.train.rows import LossKind, row_gradients, row_loss


@dataclass(frozen=True)
class Teacher:
    """The target's own next-token distribution, recomputed from its last hidden states.

    norm_weight [Ht] and eps: the target's final norm. head [Vd, Ht]: the rows of its LM head that
    belong to the draft vocabulary, in the draft vocabulary's order. rule: what kind of norm it is,
    and what follows the product.
    """

    norm_weight: Tensor
    eps: float
    head: Tensor
    rule: LogitRule = PLAIN

    def normed(self, last: Tensor) -> Tensor:
        """Last hidden states before the final norm [M, Ht] -> what the LM head reads [M, Ht]."""
        return self.rule.norm(last.to(self.norm_weight.dtype), self.norm_weight, self.eps)

    def logits(self, last: Tensor) -> Tensor:
        """Last hidden states [M, Ht] -> logits over the draft vocabulary [M, Vd], fp32 or better.

        The products are bf16 on a GPU, but their sums leave it in fp32: rounding the logits
        themselves to bf16 would move probabilities by several per cent.
        """
        return self.rule.finish(matmul_fp32(self.normed(last), self.head))


def matmul_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] @ weight [V, K].T -> [N, V] in fp32 (fp64 stays fp64)."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    out = x @ weight.t()
    return out if out.dtype == torch.float64 else out.float()


def hidden_regression(normed: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """SmoothL1 between the states that the two LM heads read, mean over width (EAGLE-1's second
    loss, arXiv 2401.15077; the published head's "SmoothL1 hidden-regression").

    normed [T, M, H] after the head's final norm; target [M, H] after the target's; weights [T, M].
    Returns the weighted sum. Head and target must be equally wide.
    """
    loss = F.smooth_l1_loss(normed.float(), target.float().expand_as(normed), reduction="none")
    return (loss.mean(-1) * weights).sum()


def plain_loss(
    normed: Tensor,
    lm_head: Tensor,
    last: Tensor,
    teacher: Teacher,
    labels: Tensor,
    weights: Tensor,
    kind: LossKind,
) -> tuple[Tensor, Tensor]:
    """The loss as its definition says: all logits at once. Arguments as for `fused_loss`."""
    logits = normed @ lm_head.t()
    soft = None if kind == "ce" else teacher.logits(last)
    loss = (row_loss(logits, soft, labels, kind) * weights).sum()
    correct = (logits.argmax(-1) == labels) & (weights > 0)
    return loss, correct.sum(-1)


def gradient_rule(x: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`row_gradients`, as one Triton kernel on a GPU."""
    if x.is_cuda and x.dtype != torch.float64:
        from drafthead.train.kernels import row_gradients as fused

        return fused
    return row_gradients


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, normed, lm_head, last, teacher, labels, weights, kind, chunk_rows):
        steps, tokens, width = normed.shape
        rule = gradient_rule(normed)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_normed = torch.empty_like(normed) if wants_grad else None
        d_head = torch.zeros_like(lm_head) if wants_grad else None
        loss = torch.zeros((), dtype=weights.dtype, device=normed.device)
        correct = torch.zeros(steps, dtype=torch.int64, device=normed.device)
        chunk = max(1, chunk_rows // steps)
        for at in range(0, tokens, chunk):
            part = slice(at, at + chunk)
            rows = normed[:, part].reshape(-1, width)
            logits = (rows @ lm_head.t()).view(steps, -1, lm_head.shape[0])
            soft = None if kind == "ce" else teacher.logits(last[part])
            losses, gradient, predicted = rule(logits, soft, labels[part], weights[:, part], kind)
            loss += losses.sum()
            correct += ((predicted == labels[part]) & (weights[:, part] > 0)).sum(-1)
            if d_normed is not None and d_head is not None:
                gradient = gradient.view(-1, lm_head.shape[0])
                d_normed[:, part] = (gradient @ lm_head).view(steps, -1, width)
                d_head.addmm_(gradient.t(), rows)
            # Or they would live on beside the next chunk's: most of the step's peak memory.
            del logits, soft, gradient
        ctx.save_for_backward(d_normed, d_head)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, d_loss, _):
        d_normed, d_head = ctx.saved_tensors
        # The buffers are ours alone: scaling them in place spares a second copy.
        return d_normed.mul_(d_loss), d_head.mul_(d_loss), None, None, None, None, None, None


def fused_loss(
    normed: Tensor,
    lm_head: Tensor,
    last: Tensor,
    teacher: Teacher,
    labels: Tensor,
    weights: Tensor,
    kind: LossKind,
    chunk_rows: int = 2048,
) -> tuple[Tensor, Tensor]:
    """LM head and loss in chunks, gradients computed on the way: no logits outlive their chunk.

    normed [T, M, H]: the head's states after its final norm. lm_head [Vd, H]. last [M, Ht]: the
    target's last hidden states before its final norm, of the positions that predicted the M tokens.
    labels int64 [M]: the served tokens as draft ids, -1 outside. weights fp32 [T, M]: 0 where the
    step has no row for the token. A chunk is `chunk_rows` rows of `normed`, all T steps of as many
    tokens as fit, so that the teacher's logits are computed once for all steps.

    Returns the weighted sum of the losses (differentiable, once) and, for each step, how many rows
    predicted the served token: int64 [T].
    """
    return _FusedLoss.apply(normed, lm_head, last, teacher, labels, weights, kind, chunk_rows)
