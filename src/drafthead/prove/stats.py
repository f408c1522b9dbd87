"""Statistics of throughputs and shares, small, in numpy."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

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
    """Ratio of drafted to base throughput over pairs, with a bootstrap interval.

    Throughput is all tokens over all seconds. Pairs are resampled whole (both sides together), so
    that what a prompt does to both cancels out. The interval is the expanded percentile one
    (:func:`tail`).

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
    low, high = np.quantile(dt / ds / (bt / bs), [tail(n), 1 - tail(n)])
    bt, bs, dt, ds = columns.sum(axis=1)
    return Speedup(bt / bs, dt / ds, dt / ds / (bt / bs), (float(low), float(high)), n)


def tail(n: int) -> float:
    """Share of a bootstrap's resamples to leave out on each side of a 95 % interval from ``n``
    observations, as far as so few can tell: 2.5 % of very many, less of few. What is resampled
    varies too little, by the square root of (n - 1) / n, and the normal distribution has shorter
    tails than Student's t (Hesterberg, What Teachers Should Know About the Bootstrap, 2015). Of 8
    pairs the plain percentiles cover the truth in 87 % of cases, these in 93 %.
    """
    if n < 2:
        return 0.0
    normal, nu = NormalDist(), n - 1
    z = normal.inv_cdf(0.975)
    # Quantile of Student's t (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return normal.cdf(-t * math.sqrt(n / nu))


def more_often(a: int, n: int, b: int, m: int) -> float:
    """How likely ``a`` or more of ``n`` would be, beside ``b`` of ``m``, if both were alike:
    Fisher's exact test, one-sided."""
    both = a + b
    tail = sum(comb(n, x) * comb(m, both - x) for x in range(a, min(n, both) + 1))
    return tail / comb(n + m, both)


_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


def detectable_excess(n: int, b: int, m: int, *, alpha: float, power: float) -> float | None:
    """The smallest share of ``n``, beside a rate of ``b`` of ``m``, that :func:`more_often` would
    find at ``alpha`` with a chance of ``power``; None if not even half. Without ``m`` a single one
    is found."""
    counts = range(n + 1)
    least = bisect.bisect(counts, -alpha, key=lambda a: -more_often(a, n, b, m)) if m else 1
    rate = b / m if m else 0.0
    rng = np.random.default_rng(0)
    for share in _SHARES:
        if np.mean(rng.binomial(n, rate + share * (1 - rate), 20_000) >= least) >= power:
            return share
    return None
