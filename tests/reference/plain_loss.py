"""The loss by its definition: what `drafthead.ops.losses.fused_loss` is tested against."""

import torch
from torch import Tensor

from drafthead.ops.losses import CE_SHARE, SMALLEST_OVERLAP, LossKind, Teacher


def row_loss(logits: Tensor, teacher: Tensor | None, labels: Tensor, kind: LossKind) -> Tensor:
    """The plain loss of each row.

    logits [..., N, Vd]; teacher [N, Vd] logits, None for `ce`; labels int64 [N], the served token
    as a draft id or -1 outside the draft vocabulary. Returns [..., N], zero where the label is -1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logq = logits.log_softmax(-1)
    index = labels.clamp(min=0).expand(logits.shape[:-1])[..., None]
    cross_entropy = -logq.gather(-1, index)[..., 0]
    if kind == "ce":
        loss = cross_entropy
    else:
        assert teacher is not None
        logp = teacher.to(logits.dtype).log_softmax(-1)
        overlap = torch.minimum(logp.exp(), logq.exp()).sum(-1)
        if kind == "kl":
            loss = (logp.exp() * (logp - logq)).sum(-1)
        elif kind == "acceptance":
            loss = -overlap.clamp(min=SMALLEST_OVERLAP).log()
        else:
            loss = CE_SHARE * cross_entropy + (1 - CE_SHARE) * (1 - overlap)
    return torch.where(labels >= 0, loss, 0.0)


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
