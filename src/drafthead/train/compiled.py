"""Functions of tensors, compiled where that pays."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def fused(function: Callable, x: Tensor) -> Callable:
    """`function` for tensors where x lives: compiled on a GPU, sizes dynamic."""
    return _compiled(function) if x.is_cuda else function
