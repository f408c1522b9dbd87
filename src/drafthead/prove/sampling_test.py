"""Is sampling lossless too? Not token for token: two engines draw different random numbers. What
must agree is the distribution, so many answers are drawn at the same contexts with and without
the head, and their token frequencies compared by a two-sample test.

For each context and each position of the answer, Pearson's chi-square of the two samples' token
counts; their sum over positions and contexts is the statistic. Its null distribution comes from
permuting, within a context, which engine wrote which answer: exact whatever the dependence between
positions (Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, chapter 3).

A test that finds nothing says only as much as its power: it is computed by simulation against the
fault to be feared, drafts kept more often than the target's probability allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.001
"""Chance of a false alarm. Small, since the test runs with every proof."""
POWER = 0.9
PERMUTATIONS = 4000
_SHIFTS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class TwoSample:
    """Outcome of the test."""

    p_value: float
    detectable_shift: float | None
    """Smallest share of tokens replaced by the likeliest one that the test would find with 90 %
    probability; None if not even half of them."""
    contexts: int
    samples: int
    """Answers a context and engine."""
    positions: int

    @property
    def same(self) -> bool:
        return self.p_value >= ALPHA

    @property
    def words(self) -> str:
        """For people, with what the test could have found."""
        seen = (
            f"{self.samples} answers at each of {self.contexts} contexts, {self.positions} tokens "
            "each, with and without the head"
        )
        if not self.same:
            return f"Sampling: the distributions differ (p = {self.p_value:.2g}); {seen}."
        power = (
            "too few to find even a shift of half the probability"
            if self.detectable_shift is None
            else f"a shift of {self.detectable_shift:.0%} of the probability towards the likeliest "
            "token would have been found nine times in ten"
        )
        return (
            f"Sampling: no difference between the distributions (p = {self.p_value:.2g}); {seen}; "
            f"{power}."
        )


class _Context:
    """The answers of both engines at one context, as indicators of token and position.

    Args:
        base: token ids [N, L] that the target alone wrote.
        drafted: token ids [N, L] written with the head.
    """

    def __init__(self, base: np.ndarray, drafted: np.ndarray):
        tokens = np.concatenate([base, drafted])
        self.n = len(base)
        self.tokens = tokens
        # One column for each token at each position: [2N, categories].
        columns = [np.unique(tokens[:, j], return_inverse=True) for j in range(tokens.shape[1])]
        self.sizes = [len(kinds) for kinds, _ in columns]
        offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.codes = np.stack([codes + at for (_, codes), at in zip(columns, offsets)], axis=1)
        self.total = np.bincount(self.codes.ravel(), minlength=sum(self.sizes)).astype(float)

    def statistic(self, base_counts: np.ndarray) -> np.ndarray:
        """Chi-square summed over positions for each column of base counts [..., categories].

        With two samples of equal size, sum (a - b)^2 / (a + b), a and b the two counts.
        """
        return (((2 * base_counts - self.total) ** 2) / self.total).sum(axis=-1)

    def counts(self, codes: np.ndarray) -> np.ndarray:
        return np.bincount(codes.ravel(), minlength=len(self.total)).astype(float)

    def observed(self) -> float:
        return float(self.statistic(self.counts(self.codes[: self.n])))

    def permuted(self, rng: np.random.Generator, times: int) -> np.ndarray:
        """The statistic under ``times`` random assignments of answers to engines."""
        statistics = np.empty(times)
        for i in range(times):
            chosen = rng.permutation(2 * self.n)[: self.n]
            statistics[i] = self.statistic(self.counts(self.codes[chosen]))
        return statistics

    def shifted(self, rng: np.random.Generator, shift: float) -> float:
        """The statistic if the second engine put ``shift`` of its tokens on the likeliest one."""
        draws = self.codes[rng.integers(0, 2 * self.n, (2, self.n))]
        likeliest = np.array(
            [np.bincount(self.codes[:, j]).argmax() for j in range(self.codes.shape[1])]
        )
        replace = rng.random(draws[1].shape) < shift
        second = np.where(replace, likeliest, draws[1])
        a, b = self.counts(draws[0]), self.counts(second)
        both = a + b
        seen = both > 0
        return float(((a - b)[seen] ** 2 / both[seen]).sum())


def two_sample(
    base: Sequence[np.ndarray], drafted: Sequence[np.ndarray], *, seed: int = 0
) -> TwoSample:
    """Test whether two engines draw from the same distributions.

    Args:
        base: for each context, token ids [N, L] that the target alone sampled; an answer that
            ended early is filled up with -1.
        drafted: the same, with the head.
        seed: of permutations and simulation.

    Raises:
        ValueError: no contexts, or shapes that differ.
    """
    if not base or [a.shape for a in base] != [b.shape for b in drafted]:
        raise ValueError("the two samples need the same contexts, answers and lengths")
    rng = np.random.default_rng(seed)
    contexts = [_Context(a, b) for a, b in zip(base, drafted, strict=True)]
    observed = sum(context.observed() for context in contexts)
    null = np.sum([context.permuted(rng, PERMUTATIONS) for context in contexts], axis=0)
    p_value = (1 + int((null >= observed - 1e-9).sum())) / (1 + PERMUTATIONS)
    threshold = np.quantile(null, 1 - ALPHA)
    detectable = None
    for shift in _SHIFTS:
        detected = [sum(c.shifted(rng, shift) for c in contexts) > threshold for _ in range(100)]
        if np.mean(detected) >= POWER:
            detectable = shift
            break
    n, length = base[0].shape
    return TwoSample(p_value, detectable, len(contexts), n, length)
