"""Muon (https://kellerjordan.github.io/posts/muon/), the matrices of one shape stepped together.

A small head's step is mostly the host starting kernels. Newton-Schulz runs on a stack of matrices
as on one, and what surrounds it is fused into it by torch.compile on a GPU.
"""

import torch
from torch import Tensor

from drafthead.train.compiled import fused
from drafthead.train.masters import join, split


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices with about the singular vectors of x [g, n, m] and singular values near 1: Muon's
    Newton-Schulz iteration, in bf16 on a GPU."""
    wide = x.bfloat16() if x.is_cuda else x
    wide = wide.mT if x.shape[1] > x.shape[2] else wide
    wide = wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(x.dtype)


def update(
    weights: list[Tensor], low: Tensor | None, grads: list[Tensor], mean: Tensor, scale: Tensor,
    rate: Tensor, shrink: Tensor,
) -> None:  # fmt: skip
    """One Muon step in place: Nesterov momentum 0.95, orthogonalized.

    weights: g of [n, m], fp32, or bf16 with the lower halves of their masters in `low` int16
    [g, n, m]; grads as many, multiplied by `scale` first; mean fp32 [g, n, m]. The masters are
    multiplied by 1 - shrink and `rate` times the step is taken off. All three are scalar tensors.
    A NaN in `scale` leaves everything as it is.
    """
    finite = scale.isfinite()
    grad = torch.where(finite, torch.stack(grads).float() * scale, 0.0)
    new = torch.lerp(mean, grad, 0.05)
    step = orthogonalize(torch.lerp(grad, new, 0.95)) * rate
    mean.copy_(torch.where(finite, new, mean))
    master = torch.stack(weights)
    master = master if low is None else join(master, low)
    master = torch.where(finite, master * (1 - shrink) - step, master)
    if low is not None:
        master, lower = split(master)
        low.copy_(lower)
    for weight, changed in zip(weights, master):
        weight.copy_(changed)


class Stack:
    """Matrices of one shape [n, m] and one type, and their momentum."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters
        like = torch.stack([p.detach() for p in parameters.values()])
        self.mean = torch.zeros_like(like, dtype=torch.float32)
        self.low = None
        if like.dtype == torch.bfloat16:
            self.low = torch.zeros_like(like, dtype=torch.int16)

    @classmethod
    def of(cls, parameters: dict[str, Tensor]) -> "list[Stack]":
        """Stacks of all of them, in the order in which their shapes come."""
        by_shape: dict[torch.Size, dict[str, Tensor]] = {}
        for name, p in parameters.items():
            by_shape.setdefault(p.shape, {})[name] = p
        return [cls(group) for group in by_shape.values()]

    def step(self, scale: Tensor, rate: float, decay: float) -> None:
        """`update` by the gradients, which are given up; all have one or none has.

        A step has the size of AdamW's (0.2 sqrt(max(n, m)), arXiv 2502.16982), so that one
        learning rate serves both.
        """
        weights = list(self.parameters.values())
        grads = [p.grad for p in weights if p.grad is not None]
        if not grads:
            return
        size = 0.2 * max(weights[0].shape) ** 0.5 * rate
        # Tensors, as a number that changes would have `update` compiled anew; filled, not copied.
        numbers = (torch.full((), x, device=scale.device) for x in (size, rate * decay))
        data = [p.data for p in weights]
        fused(update, scale)(data, self.low, grads, self.mean, scale, *numbers)
        for p in weights:
            p.grad = None
