"""Muon (https://kellerjordan.github.io/posts/muon/), the matrices of one shape stepped together.

Newton-Schulz runs on a stack of matrices as on one, and what follows the momentum as one CUDA graph
for all: a small head's step is mostly the host starting kernels.
"""

import torch
from torch import Tensor

from drafthead.ops.graphs import Graphs
from drafthead.train.split_fp32 import join, keep


def momentum(grad: Tensor, mean: Tensor, direction: Tensor, scale: Tensor) -> None:
    """Nesterov momentum 0.95 of `grad` times `scale` (a scalar tensor): `mean` fp32 in place, where
    to go into `direction`. A NaN in `scale` leaves `mean` as it is and directs nowhere."""
    finite = scale.isfinite()
    grad = torch.where(finite, grad.float() * scale, 0.0)
    new = torch.lerp(mean, grad, 0.05)
    direction.copy_(torch.where(finite, torch.lerp(grad, new, 0.95), 0.0))
    mean.copy_(torch.where(finite, new, mean))


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices with about the singular vectors of x [g, n, m] and singular values near 1, in fp32,
    on a GPU fp16: its iterates are below 2, so the three more bits than bf16's cost nothing."""
    dtype = torch.float16 if x.is_cuda else torch.float32
    wide = scaled(x.mT if x.shape[1] > x.shape[2] else x, dtype)
    wide = newton_schulz(wide) if 2 * wide.shape[1] > wide.shape[2] else by_gram(wide)
    return wide.mT if x.shape[1] > x.shape[2] else wide


def scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [g, n, m], each matrix over its Frobenius norm: divided in fp32 and rounded to `dtype`, in
    one pass over memory."""
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    return torch.div(x, norm.clamp(min=1e-7), out=torch.empty_like(x, dtype=dtype))


A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


def _polynomial(gram: Tensor) -> Tensor:
    """A + B gram + C gram²: the matrix that an iteration multiplies by."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
    polynomial.diagonal(dim1=1, dim2=2).add_(A)
    return polynomial


def newton_schulz(wide: Tensor) -> Tensor:
    """Muon's iteration for matrices [g, n, m], n <= m, of spectral norm 1 at most."""
    for _ in range(STEPS):
        wide = _polynomial(wide @ wide.mT) @ wide
    return wide


def by_gram(wide: Tensor) -> Tensor:
    """`newton_schulz` in products of n by n, with 4 of n by n by m instead of 10.

    An iteration makes W into P W, and so W W' into P W W' P: what happens to W can be kept apart,
    as the product of all P. Where W has no part, rounding leaves one in W W', and each iteration
    makes it 12 times as large (A squared); so W W' is taken anew after the third.
    """
    for steps in (3, STEPS - 3):
        gram = wide @ wide.mT
        whole = last = _polynomial(gram)
        for _ in range(steps - 1):
            gram = last @ gram @ last
            last = _polynomial(gram)
            whole = last @ whole
        wide = whole @ wide
    return wide


def descend(master: Tensor, step: Tensor, numbers: Tensor, size: float) -> None:
    """An fp32 weight in place: times 1 - shrink, less `size` times rate times `step`.

    numbers fp32 [3]: scale, rate and shrink. A NaN in the scale leaves the weight as it is.
    """
    scale, rate, shrink = numbers
    changed = master * (1 - shrink) - step.float() * (size * rate)
    master.copy_(torch.where(scale.isfinite(), changed, master))


class Stack:
    """Matrices of one shape [n, m] and one type, and their momentum."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters
        like = torch.stack([p.detach() for p in parameters.values()])
        # What Newton-Schulz takes: in bf16 on a GPU.
        self.direction = like.to(torch.bfloat16 if like.is_cuda else torch.float32)
        self.mean = torch.zeros_like(like, dtype=torch.float32)
        self.low = None
        if like.dtype == torch.bfloat16:
            self.low = torch.zeros_like(like, dtype=torch.int16)

    def take(self, scale: Tensor) -> None:
        """`momentum` by the gradients times `scale`, which are given up."""
        for p, mean, direction in zip(self.parameters.values(), self.mean, self.direction):
            assert p.grad is not None
            if p.is_cuda:
                from drafthead.train.kernels import momentum as fused

                fused(p.grad, mean, direction, scale)
            else:
                momentum(p.grad, mean, direction, scale)
            p.grad = None

    def step(self, numbers: Tensor) -> None:
        """Move the weights; `numbers` as for `descend`.

        A step has the size of AdamW's (0.2 sqrt(max(n, m)), arXiv 2502.16982), so that one
        learning rate serves both.
        """
        size = 0.2 * max(self.direction.shape[1:]) ** 0.5
        steps = orthogonalize(self.direction)
        for index, (p, step) in enumerate(zip(self.parameters.values(), steps)):
            if self.low is None:
                descend(p.data, step, numbers, size)
            elif p.is_cuda:
                from drafthead.train.kernels import split_descend

                split_descend(p.data, self.low[index], step, numbers, size)
            else:
                master = join(p.data, self.low[index])
                descend(master, step, numbers, size)
                keep(master, p.data, self.low[index])


class Muon:
    """Muon over named matrices."""

    def __init__(self, parameters: dict[str, Tensor], graphs: Graphs):
        by_shape: dict[torch.Size, dict[str, Tensor]] = {}
        for name, p in parameters.items():
            by_shape.setdefault(p.shape, {})[name] = p
        self.stacks = [Stack(group) for group in by_shape.values()]
        device = next((p.device for p in parameters.values()), None)
        self._numbers = torch.zeros(3, device=device)
        self._step = graphs.wrap(self._step_all)

    def step(self, scale: Tensor, rate: float, decay: float) -> None:
        """One step by the gradients times `scale` (a scalar tensor), which are given up; all
        matrices have one or none has."""
        parameters = [p for stack in self.stacks for p in stack.parameters.values()]
        if all(p.grad is None for p in parameters):
            return
        for stack in self.stacks:
            stack.take(scale)
        self._numbers[0].copy_(scale)
        self._numbers[1].fill_(rate)
        self._numbers[2].fill_(rate * decay)
        self._step()

    def _step_all(self) -> None:
        for stack in self.stacks:
            stack.step(self._numbers)
