"""Figures of training, summed on the device and read seldom."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from drafthead.drafters.base import Batch, Trainer
from drafthead.train.parallel import World


class Meter:
    """Sums between two looks. Only `read` waits for the device.

    steps: T of training-time test. rate: operations per second of a perfect process.
    """

    def __init__(self, world: World, steps: int, rate: float):
        self.world, self.rate = world, rate * world.size
        self.bad = torch.full((), -1.0, device=world.device)
        self.sums = torch.zeros(1 + 2 * steps, device=world.device)
        self.host = torch.zeros(3, dtype=torch.float64)  # supervised, positions, operations
        self.waited = 0.0
        """Seconds that training stood still for want of a row, up to the last look; the mean over
        processes."""
        self._waits: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.norm = torch.zeros((), device=world.device)
        self.updates = 0
        self.since = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last look that were not training."""
        self.since += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for the next row: counts how long training stood still for it.

        On a GPU that is the time between two events of its stream, which is none as long as work is
        queued: waiting that the device's work hides does not count. Nothing waits for the events.
        """
        if self.world.device.type != "cuda":
            started = time.monotonic()
            yield
            self._waits.append(time.monotonic() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def add(
        self, loss: Tensor, correct: Tensor, counted: Tensor, batch: Batch, trainer: Trainer
    ) -> None:
        """Count one row: what `Trainer.backward` returned for it."""
        self.sums[0] += loss
        self.sums[1:] += torch.cat([correct, counted])
        row = trainer.supervised(batch), batch.tokens, trainer.operations(batch)
        self.host += torch.tensor(row, dtype=torch.float64)

    def update(self, norm: Tensor, step: int) -> None:
        """Count one update, the `step`-th of the run, whose gradient had `norm`."""
        self.updates += 1
        self.norm += norm
        self.bad = torch.where((self.bad < 0) & ~norm.isfinite(), float(step), self.bad)

    def read(self) -> tuple[dict[str, float | list[float]], int | None]:
        """Figures since the last look, over all processes, and the first step that went wrong."""
        self.world.sum([self.sums])
        loss, *rest = self.sums.tolist()  # from here on the events of `waiting` have happened
        host = torch.tensor([*self.host.tolist(), self._stood_still()], device=self.world.device)
        self.world.sum([host])
        supervised, positions, count, waited = host.tolist()
        waited /= self.world.size
        self.waited += waited
        half = len(rest) // 2
        seconds = time.monotonic() - self.since
        bad = int(self.bad)
        figures: dict[str, float | list[float]] = {
            "loss": loss / max(1.0, supervised),
            "accuracy": [c / max(1.0, r) for c, r in zip(rest[:half], rest[half:])],
            "gradient_norm": float(self.norm) / max(1, self.updates),
            "tokens_per_s": positions / seconds,
            "mfu": count / seconds / self.rate,
            "waiting": waited / seconds,
        }
        self.sums.zero_()
        self.host.zero_()
        self.norm.zero_()
        self.updates = 0
        self.since = time.monotonic()
        return figures, bad if bad >= 0 else None

    def _stood_still(self) -> float:
        """Seconds that this process stood still since the last look."""
        seconds = sum(self._waits) + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._waits.clear()
        self._events.clear()
        return seconds
