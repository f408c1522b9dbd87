"""Muon (https://kellerjordan.github.io/posts/muon/), the matrices of one shape stepped together.

Newton-Schulz runs on a stack of matrices as on one, and all of it as one CUDA graph: a small head's
step is mostly the host starting kernels.
"""

import torch
from torch import Tensor

from drafthead.train.graphs import Graphs
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
    weights: list[Tensor], low: Tensor | None, grad: Tensor, mean: Tensor, scale: Tensor,
    rate: Tensor, shrink: Tensor,
) -> None:  # fmt: skip
    """One Muon step in place: Nesterov momentum 0.95, orthogonalized.

    weights: g of [n, m], fp32, or bf16 with the lower halves of their masters in `low` int16
    [g, n, m]; grad [g, n, m], multiplied by `scale` first; mean fp32 [g, n, m]. The masters are
    multiplied by 1 - shrink and `rate` times the step is taken off. All three are scalar tensors.
    A NaN in `scale` leaves everything as it is.
    """
    finite = scale.isfinite()
    grad = torch.where(finite, grad.float() * scale, 0.0)
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
        self.grad = torch.zeros_like(like)
        self.mean = torch.zeros_like(like, dtype=torch.float32)
        self.low = None
        if like.dtype == torch.bfloat16:
            self.low = torch.zeros_like(like, dtype=torch.int16)

    def step(self, scale: Tensor, rate: Tensor, shrink: Tensor) -> None:
        """`update` by `grad`.

        A step has the size of AdamW's (0.2 sqrt(max(n, m)), arXiv 2502.16982), so that one
        learning rate serves both.
        """
        weights = [p.data for p in self.parameters.values()]
        size = 0.2 * max(weights[0].shape) ** 0.5
        update(weights, self.low, self.grad, self.mean, scale, rate * size, shrink)


class Muon:
    """Muon over named matrices, replayed as one CUDA graph on a GPU."""

    def __init__(self, parameters: dict[str, Tensor], graphs: Graphs):
        by_shape: dict[torch.Size, dict[str, Tensor]] = {}
        for name, p in parameters.items():
            by_shape.setdefault(p.shape, {})[name] = p
        self.stacks = [Stack(group) for group in by_shape.values()]
        self._numbers: Tensor | None = None
        self._step = graphs.wrap(self._step_all)

    def step(self, scale: Tensor, rate: float, decay: float) -> None:
        """One step by the gradients times `scale` (a scalar tensor), which are given up; all
        matrices have one or none has."""
        for stack in self.stacks:
            parameters = stack.parameters.values()
            grads = [p.grad for p in parameters if p.grad is not None]
            if not grads:
                return
            torch.stack(grads, out=stack.grad)
            for p in parameters:
                p.grad = None
        if self._numbers is None:
            self._numbers = torch.zeros(3, device=scale.device)
        self._numbers[0].copy_(scale)
        self._numbers[1].fill_(rate)
        self._numbers[2].fill_(rate * decay)
        self._step()

    def _step_all(self) -> None:
        assert self._numbers is not None
        for stack in self.stacks:
            stack.step(*self._numbers)
