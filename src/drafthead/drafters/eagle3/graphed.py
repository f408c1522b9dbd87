"""Rows through head and loss as CUDA graphs: copied into fixed places, padded to a few sizes."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.step import TrainStep
from drafthead.head.model import Eagle3Head
from drafthead.ops.attention import Documents
from drafthead.ops.graphs import Graphs

SIZES = 16  # steps in which a padded size can grow: the finest lose 3 % of a full row's work
CAPTURE = 30  # full rows that take as long as capturing a graph does: 0.15 s and 5 ms
HOST_SECONDS = 4e-3  # that the host takes to start the kernels of one step of training-time test
DOCUMENTS = 32  # room for so many documents, or that times a power of two
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


Size = tuple[int, int, int]  # live rows, supervised tokens, documents


class Sizes:
    """The sizes that rows of up to `tokens` positions are padded to: few, for each costs a graph.

    A row gets the cheapest size there is that holds it, at first a full row's. Its own is added
    once it would have paid for its graph on the rows seen so far. So padding never costs much more
    than the graphs that it spares, however long training goes on.
    """

    def __init__(self, tokens: int):
        self.step = -(-tokens // SIZES)
        self.full = self.step * SIZES
        self.chosen: list[Size] = []
        self._seen: Counter[Size] = Counter()

    def own(self, batch: Batch) -> Size:
        """A row's own size, rounded up by as little as sizes are."""
        up = lambda size: -(-size // self.step) * self.step
        return up(len(batch.live)), up(len(batch.labels)), _room(len(batch.documents.k_lengths))

    def choose(self, batch: Batch) -> Size:
        """The size that a row is padded to."""
        own = self.own(batch)
        if not self._holding(own):
            self.chosen.append((self.full, self.full, own[2]))
        self._seen[own] += 1
        if own not in self.chosen and self._saved(own) >= CAPTURE:
            self.chosen.append(own)
        return self._cheapest(own)

    def _holding(self, size: Size) -> list[Size]:
        return [c for c in self.chosen if all(has >= wants for has, wants in zip(c, size))]

    def _cheapest(self, size: Size) -> Size:
        return min(self._holding(size), key=self._cost)

    def _cost(self, size: Size) -> float:
        """In full rows. To layer and LM head a live row and a supervised token cost about alike;
        what is done to all positions is little, and documents cost nothing."""
        return (size[0] + size[1]) / (2 * self.full)

    def _saved(self, size: Size) -> float:
        """Full rows that having had `size` would have saved so far."""
        held = [seen for seen in self._seen if all(a <= b for a, b in zip(seen, size))]
        worse = {seen: self._cost(self._cheapest(seen)) - self._cost(size) for seen in held}
        return sum(self._seen[seen] * max(0.0, cost) for seen, cost in worse.items())


class Places:
    """Fixed memory for batches of up to `full` positions, padded.

    The padding is zeros that no loss is taken of, in two documents behind the others: of positions
    that are not live, and of live ones, which as queries want as many keys.
    """

    def __init__(self, full: int):
        self.full = full
        self._memory: dict[str, Tensor] = {}

    def make(self, like: Batch, size: Size) -> Batch:
        """A batch of `size` whose tensors lie here, all at the start: one at a time can be used.
        like: tells dtypes and the other dimensions."""
        live, supervised, documents = size
        lengths = {"live": live, "supervised": supervised, "positions": self.full + live}

        def place(name: str, like: Tensor, size: int, most: int, dim: int) -> Tensor:
            shape = lambda size: (*like.shape[:dim], size, *like.shape[dim + 1 :])
            if name not in self._memory:
                self._memory[name] = like.new_empty(shape(most)).flatten()
            # From the start of the memory, so that it is contiguous whatever the size.
            memory = self._memory[name]
            return memory[: torch.Size(shape(size)).numel()].view(shape(size))

        tensors = {}
        for name, (counted, _) in COUNTED.items():
            most = 2 * self.full if counted == "positions" else self.full
            dim = int(name in ROWS_OF_STEPS)
            tensors[name] = place(name, getattr(like, name), lengths[counted], most, dim)
        docs, most = like.documents, _room(self.full) + 1
        cu_q = place("cu_q", docs.cu_q, documents + 1, most, 0)
        cu_k = place("cu_k", docs.cu_k, documents + 1, most, 0)
        bounds = live, self.full + live
        return replace(like, documents=Documents((), (), cu_q, cu_k, bounds), **tensors)

    def put(self, batch: Batch, place: Batch) -> Batch:
        """Copy a batch into a place that holds it: the padded batch, of the place's tensors."""
        for name, (_, filler) in COUNTED.items():
            _copy(getattr(place, name), getattr(batch, name), filler)
        docs, cu_q, cu_k = batch.documents, place.documents.cu_q, place.documents.cu_k
        n, end, count = len(batch.live), len(place.positions), len(docs.k_lengths)
        more = len(place.live) - n
        if more:
            torch.arange(end - more, end, out=place.live[n:])
            torch.arange(n, n + more, out=place.live_of[end - more :])
        _copy(cu_q, docs.cu_q, n + more)
        _copy(cu_k, docs.cu_k, end)
        cu_q[count + 1].fill_(n)
        cu_k[count + 1].fill_(end - more)
        q_lengths = *docs.q_lengths, 0, more
        k_lengths = *docs.k_lengths, end - more - batch.tokens, more
        placed = replace(place.documents, q_lengths=q_lengths, k_lengths=k_lengths)
        return replace(place, documents=placed)


def _room(documents: int) -> int:
    """For how many documents there are places, two of them padding."""
    return max(DOCUMENTS, 1 << (documents + 1).bit_length())


def _copy(place: Tensor, x: Tensor, filler: float) -> None:
    """Copy x into the beginning of `place`; fill the rest of the differing dimension with
    `filler`."""
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
        self.step, self.graphs = step, graphs
        self.sizes = Sizes(tokens)
        self.places = Places(self.sizes.full)
        self.parameters = list(step.head.parameters())
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self._made: dict[Size, tuple[Batch, Callable[[], tuple[Tensor, Tensor, Tensor]]]] = {}
        self._batch: Batch | None = None

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """As `TrainStep.backward`; what is returned is overwritten by the next call."""
        if all(p.grad is None for p in self.parameters):
            torch._foreach_zero_(self.gradients)
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        if self._batch is None:
            # The first as large as it is: what is compiled for sizes that are equal by chance, as
            # padded ones often are, is compiled once more for others. Copied, since places too are
            # contiguous and begin with their memory.
            self._batch = batch.map(
                functools.partial(torch.clone, memory_format=torch.contiguous_format)
            )
            return self._backward()
        size = self.sizes.choose(batch)
        if size not in self._made:
            self._made[size] = self.places.make(batch, size), self.graphs.wrap(self._backward)
        place, replayed = self._made[size]
        self._batch = self.places.put(batch, place)
        return replayed()

    def _backward(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self._batch is not None
        loss, correct, counted = self.step.loss(self._batch)
        # Not `loss.backward()`, which adds to `grad` on a stream that a capture need not see.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = [(mine, new) for mine, new in zip(self.gradients, gradients) if new is not None]
        torch._foreach_add_(*map(list, zip(*used)))
        return loss.detach(), correct, counted
