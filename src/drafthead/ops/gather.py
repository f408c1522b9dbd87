"""Rows taken out of a tensor, each at most once."""

import torch
from torch import Tensor


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, inverse):
        ctx.save_for_backward(inverse)
        return x[rows]

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        taken = (inverse >= 0)[:, None]
        return torch.where(taken, gradient[inverse.clamp(min=0)], 0.0), None, None


def take_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """x [N, H] at rows int [n], each at most once -> [n, H].

    inverse int [N]: where each row of x went, -1 for nowhere. The gradient is a gather too: no
    atomics, no sorting, the same bits every time. Rows that `inverse` leaves out get no gradient.
    """
    return _TakeRows.apply(x, rows, inverse)
