"""The loss by its definition: what `drafthead.ops.losses.fused_loss` is tested against."""

from torch import Tensor

from drafthead.ops.losses import LossKind, Teacher, row_loss


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
