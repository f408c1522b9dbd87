"""Ratios of throughput with their intervals, and two-sample tests: small, in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Speedup:
    """A ratio of two throughputs measured in pairs."""

    base_tokens_per_s: float
    drafted_tokens_per_s: float
    ratio: float
    ci95: tuple[float, float]
    pairs: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.ci95[0] > 1:
            return "faster"
        if self.ci95[1] < 1:
            return "slower"
        return "not distinguishable: the interval spans 1"


def speedup(
    base_tokens: Sequence[float],
    base_seconds: Sequence[float],
    drafted_tokens: Sequence[float],
    drafted_seconds: Sequence[float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Speedup:
    """Ratio of drafted to base throughput over pairs, with a percentile bootstrap interval.

    Throughput is all tokens over all seconds. Pairs are resampled whole (both sides together), so
    that what a prompt does to both cancels out.

    Args:
        base_tokens: tokens of each pair [n], written by the target alone.
        base_seconds: seconds they took [n].
        drafted_tokens: tokens of each pair [n], written with the head.
        drafted_seconds: seconds they took [n].
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    columns = np.array([base_tokens, base_seconds, drafted_tokens, drafted_seconds], dtype=float)
    n = columns.shape[1]
    if n == 0:
        raise ValueError("no pairs")
    rng = np.random.default_rng(seed)
    # Counts of each pair in a resample [resamples, n]; sums are then one matrix product.
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    bt, bs, dt, ds = columns @ counts.T
    low, high = np.percentile(dt / ds / (bt / bs), [2.5, 97.5])
    bt, bs, dt, ds = columns.sum(axis=1)
    return Speedup(bt / bs, dt / ds, dt / ds / (bt / bs), (float(low), float(high)), n)


def conditional(unconditional: Sequence[float]) -> list[float]:
    """Acceptance at each draft position given that all before it were accepted."""
    before = [1.0, *unconditional][: len(unconditional)]
    return [p / q if q else 0.0 for p, q in zip(unconditional, before)]
