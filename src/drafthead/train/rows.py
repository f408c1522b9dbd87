"""The loss of a row of logits, and its gradient in closed form.

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
"""

from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["kl", "ce", "acceptance"]

SMALLEST_OVERLAP = 1e-30  # keeps log and quotient finite where fp32 has no more digits


def row_loss(logits: Tensor, teacher: Tensor | None, labels: Tensor, kind: LossKind) -> Tensor:
    """The plain loss of each row.

    logits [..., N, Vd]; teacher [N, Vd] logits, None for `ce`; labels int64 [N], the served token
    as a draft id or -1 outside the draft vocabulary. Returns [..., N], zero where the label is -1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logq = logits.log_softmax(-1)
    if kind == "ce":
        index = labels.clamp(min=0).expand(logits.shape[:-1])[..., None]
        loss = -logq.gather(-1, index)[..., 0]
    else:
        assert teacher is not None
        logp = teacher.to(logits.dtype).log_softmax(-1)
        if kind == "kl":
            loss = (logp.exp() * (logp - logq)).sum(-1)
        else:
            overlap = torch.minimum(logp.exp(), logq.exp()).sum(-1)
            loss = -overlap.clamp(min=SMALLEST_OVERLAP).log()
    return torch.where(labels >= 0, loss, 0.0)


def row_gradients(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, kind: LossKind
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient of a chunk in closed form; may overwrite `logits` with the gradient.

    logits [T, R, Vd], teacher [R, Vd] or None, labels int64 [R], weights fp32 [T, R].
    Returns weighted losses [T, R], d loss / d logits [T, R, Vd], predicted draft ids [T, R].

    d/dz KL(softmax(s) || softmax(z)) = q - p; cross-entropy the same with p one-hot. With b = 1
    where q < p: d/dz -log sum min(p, q) = q (sum(q b) - b) / sum min(p, q).
    """
    predicted = logits.argmax(-1)
    weights = weights * (labels >= 0)
    z = logits if logits.dtype == torch.float64 else logits.float()
    lse = z.logsumexp(-1)
    gradient = (z - lse[..., None]).exp_()
    if kind == "ce":
        index = labels.clamp(min=0).expand(z.shape[:-1])[..., None]
        loss = lse - z.gather(-1, index)[..., 0]
        gradient.scatter_add_(-1, index, gradient.new_tensor(-1.0).expand_as(index))
    else:
        assert teacher is not None
        logp = teacher.to(z.dtype).log_softmax(-1)
        p = logp.exp()
        if kind == "kl":
            # sum p (log p - z + lse): the entropy once for all T rows, the cross term as a product
            loss = (p * logp).sum(-1) - torch.einsum("rv,trv->tr", p, z) + lse
            gradient -= p
        else:
            below = gradient < p
            overlap = torch.minimum(gradient, p).sum(-1).clamp(min=SMALLEST_OVERLAP)
            loss = -overlap.log()
            share = (gradient * below).sum(-1, keepdim=True)
            gradient *= (share - below.to(z.dtype)) / overlap[..., None]
    gradient *= weights[..., None]
    return loss * weights, gradient.to(logits.dtype), predicted
