"""Rows through head and loss as CUDA graphs: copied into fixed places, padded to a few sizes."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drafthead.head.model import Eagle3Head
from drafthead.train.attention import Documents
from drafthead.train.batches import Batch
from drafthead.train.graphs import Graphs
from drafthead.train.step import TrainStep

SIZES = 8  # live rows and supervised tokens are padded to: 6 % of a row's work on average
HOST_SECONDS = 4e-3  # that the host takes to start the kernels of one step of training-time test
DOCUMENTS = 32  # by which the number of documents is rounded up
# By what each tensor of a batch is counted, and what stands in its padding.
COUNTED = {
    "embeds": ("positions", 0),
    "positions": ("positions", 0),
    "aux": ("positions", 0),
    "live": ("live", 0),
    "live_of": ("positions", -1),
    "last": ("supervised", 0),
    "labels": ("supervised", -1),
    "student": ("supervised", 0),
    "student_of": ("live", -1),
    "has_row": ("supervised", False),
}
ROWS_OF_STEPS = {"student", "student_of", "has_row"}  # [T, ...]: counted in the second dimension


def worth_replaying(head: Eagle3Head, tokens: int, rate: float) -> bool:
    """Whether the host would keep a GPU waiting: whether the products of one step over a row of
    `tokens`, at `rate` operations per second, take less time than starting their kernels."""
    weights = sum(p.numel() for p in head.parameters())
    return 6 * weights * tokens / rate < HOST_SECONDS


class Places:
    """Fixed memory for batches of up to `tokens` positions, padded.

    The padding is a document of its own behind the others, of zeros, that no loss is taken of.
    """

    def __init__(self, tokens: int):
        self.step = -(-tokens // SIZES)
        # The padding has at least as many keys as queries, as the attention wants it.
        self.positions = tokens + self.step
        self._memory: dict[str, Tensor] = {}
        self._batches: dict[tuple[int, ...], Batch] = {}

    def put(self, batch: Batch) -> tuple[tuple[int, ...], Batch]:
        """Copy a batch here: its padded sizes, and the padded batch, whose tensors are the same
        for the same sizes."""
        docs, count = batch.documents, len(batch.documents.k_lengths)
        n, m = len(batch.live), len(batch.labels)
        up = lambda size, step: -(-size // step) * step
        sizes = up(n, self.step), up(m, self.step), up(count + 1, DOCUMENTS)
        if sizes not in self._batches:
            self._batches[sizes] = self._make(batch, *sizes)
        padded = self._batches[sizes]
        for name, (_, filler) in COUNTED.items():
            _copy(getattr(padded, name), getattr(batch, name), filler)
        end, more = self.positions, sizes[0] - n
        if more:
            torch.arange(end - more, end, out=padded.live[n:])
            torch.arange(n, sizes[0], out=padded.live_of[end - more :])
        _copy(padded.documents.cu_q, docs.cu_q, sizes[0])
        _copy(padded.documents.cu_k, docs.cu_k, end)
        lengths = (*docs.q_lengths, more), (*docs.k_lengths, end - batch.tokens)
        placed = padded.documents
        documents = Documents(*lengths, placed.cu_q, placed.cu_k, placed.bounds)
        return sizes, replace(padded, documents=documents)

    def _make(self, batch: Batch, live: int, supervised: int, documents: int) -> Batch:
        sizes = {"live": live, "supervised": supervised, "positions": self.positions}

        def place(name: str, like: Tensor, size: int, dim: int) -> Tensor:
            shape = lambda size: (*like.shape[:dim], size, *like.shape[dim + 1 :])
            if name not in self._memory:
                self._memory[name] = like.new_empty(shape(self.positions + DOCUMENTS)).flatten()
            # From the start of the memory, so that it is contiguous whatever the size.
            memory = self._memory[name]
            return memory[: torch.Size(shape(size)).numel()].view(shape(size))

        docs = batch.documents
        cu_q = place("cu_q", docs.cu_q, documents + 1, 0)
        cu_k = place("cu_k", docs.cu_k, documents + 1, 0)
        bounds = live, self.positions
        tensors = {
            name: place(name, getattr(batch, name), sizes[counted], int(name in ROWS_OF_STEPS))
            for name, (counted, _) in COUNTED.items()
        }
        return replace(batch, documents=Documents((), (), cu_q, cu_k, bounds), **tensors)


def _copy(place: Tensor, x: Tensor, filler: float) -> None:
    """x into the beginning of `place`, `filler` into what is left of the dimension that differs."""
    dim = next((d for d in range(x.dim()) if place.shape[d] != x.shape[d]), 0)
    size = x.shape[dim]
    place.narrow(dim, 0, size).copy_(x)
    if place.shape[dim] > size:
        place.narrow(dim, size, place.shape[dim] - size).fill_(filler)


class GraphedStep:
    """`TrainStep.backward` replayed as CUDA graphs, one for each padded size.

    A parameter's gradient is the same tensor in every step; who takes it up sets `grad` to None.
    """

    def __init__(self, step: TrainStep, tokens: int, graphs: Graphs):
        self.step, self.graphs, self.places = step, graphs, Places(tokens)
        self.parameters = list(step.head.parameters())
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self._functions: dict[tuple[int, ...], Callable[[], tuple[Tensor, Tensor]]] = {}
        self._batch: Batch | None = None

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `TrainStep.backward`; what is returned is overwritten by the next call."""
        if all(p.grad is None for p in self.parameters):
            torch._foreach_zero_(self.gradients)
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        sizes, self._batch = self.places.put(batch)
        if sizes not in self._functions:
            self._functions[sizes] = self.graphs.wrap(self._backward)
        return self._functions[sizes]()

    def _backward(self) -> tuple[Tensor, Tensor]:
        assert self._batch is not None
        loss, correct = self.step.loss(self._batch)
        # Not `loss.backward()`, which adds to `grad` on a stream that a capture need not see.
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = [(mine, new) for mine, new in zip(self.gradients, found) if new is not None]
        torch._foreach_add_(*map(list, zip(*used)))
        return loss.detach(), correct
