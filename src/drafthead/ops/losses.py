"""What a head is trained on: the loss of a row of logits over the draft vocabulary, and LM head and
loss together in chunks, so that logits are never stored.

With z a row's logits over the draft vocabulary and s the teacher's:

- `kl`: KL(p || q) with q = softmax(z) and p = softmax(s), the target's distribution restricted to
  the draft vocabulary. What the target puts outside is dropped (p is renormalised) unless the token
  served there is itself outside: no draft can be accepted then, and the row weighs nothing. EAGLE-3
  masks by the target's argmax in the same way (arXiv 2503.01840, its reference code).
- `ce`: cross-entropy against the token that the target served, rows outside the vocabulary as
  above. With greedy answers that token is the target's argmax. Together with `hidden_regression` it
  is the published head's "reduced-vocab CE + SmoothL1 hidden-regression".
- `acceptance`: -log a, a = sum_v min(p_v, q_v), p as for `kl`: what speculative sampling accepts
  of a draft from q (arXiv 2211.17192, theorem 3.5; as a loss arXiv 2602.23881, "LK alpha"). A chain
  is accepted up to step t with probability P_t = prod a_s, s <= t; weighting step s by the sum of
  w_t over t >= s minimises -sum_t w_t log P_t, which bounds -log of the expected accepted length
  from above (Jensen). On a teacher that is sure of one token it is cross-entropy.
- `ce+tv`: 0.1 times `ce` plus 0.9 times the total variation 1 - a (DSpark, arXiv 2607.05147).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.errors import DraftheadError
from drafthead.targets.logits import PLAIN, LogitRule

LossKind = Literal["kl", "ce", "acceptance", "ce+tv"]

CE_SHARE = 0.1  # of cross-entropy in `ce+tv`
SMALLEST_OVERLAP = 1e-30  # keeps log and quotient finite where fp32 has no more digits


def check_kind(kind: str) -> None:
    """Refuse a loss that there is not.

    Raises:
        DraftheadError: no loss is of that kind.
    """
    if kind not in get_args(LossKind):
        known = ", ".join(get_args(LossKind))
        raise DraftheadError(f"loss: there is no {kind!r}; there are {known}", field="loss")


def row_gradients(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    kind: LossKind,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of a chunk in closed form; may overwrite `logits` with the gradient.

    logits [T, R, Vd], teacher [U, Vd] or None, labels int64 [U], weights fp32 [T, R]. shared int
    [R]: which of the U rows of `teacher` and `labels` belongs to each of the R rows; None where
    U = R and they are in order.
    Returns weighted losses [T, R], d loss / d logits [T, R, Vd], predicted draft ids [T, R], and
    sum_v min(p_v, q_v) [T, R], the chance that speculative sampling accepts a draft (0 for `ce`).

    d/dz KL(softmax(s) || softmax(z)) = q - p; cross-entropy the same with p one-hot. With b = 1
    where q < p: d/dz sum min(p, q) = q (b - sum(q b)).

    Raises:
        DraftheadError: no loss is of that kind.
    """
    check_kind(kind)
    predicted = logits.argmax(-1)
    if shared is not None:
        labels = labels[shared]
    weights = weights * (labels >= 0)
    z = logits if logits.dtype == torch.float64 else logits.float()
    lse = z.logsumexp(-1)
    gradient = (z - lse[..., None]).exp_()
    index = labels.clamp(min=0).expand(z.shape[:-1])[..., None]
    overlap = torch.zeros_like(lse)
    if kind in ("ce", "ce+tv"):
        loss = lse - z.gather(-1, index)[..., 0]
    if kind == "ce":
        gradient.scatter_add_(-1, index, gradient.new_tensor(-1.0).expand_as(index))
    else:
        assert teacher is not None
        logp = teacher.to(z.dtype).log_softmax(-1)
        if shared is not None:
            logp = logp[shared]
        p = logp.exp()
        overlap = torch.minimum(gradient, p).sum(-1)
        if kind == "kl":
            # sum p (log p - z + lse): the entropy once for all T rows, the cross term as a product
            loss = (p * logp).sum(-1) - torch.einsum("rv,trv->tr", p, z) + lse
            gradient -= p
        else:
            below = gradient < p
            share = (gradient * below).sum(-1, keepdim=True)
            away = share - below.to(z.dtype)  # times q: the gradient of -overlap
            if kind == "acceptance":
                floored = overlap.clamp(min=SMALLEST_OVERLAP)
                loss = -floored.log()
                gradient *= away / floored[..., None]
            else:
                loss = CE_SHARE * loss + (1 - CE_SHARE) * (1 - overlap)
                gradient *= CE_SHARE + (1 - CE_SHARE) * away
                gradient.scatter_add_(-1, index, gradient.new_tensor(-CE_SHARE).expand_as(index))
    gradient *= weights[..., None]
    return loss * weights, gradient.to(logits.dtype), predicted, overlap


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


def gradient_rule(x: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`row_gradients`, as one Triton kernel on a GPU."""
    if x.is_cuda and x.dtype != torch.float64:
        from drafthead.ops.kernels import row_gradients as fused

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
            losses, gradient, predicted, _ = rule(
                logits, soft, labels[part], weights[:, part], kind
            )
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
