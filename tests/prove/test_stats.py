"""Ratios, their intervals, and the blocks they are taken over."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafthead.head.acceptance import Acceptance
from drafthead.prove.paired_timing import MIN_PAIRS, blocks_of
from drafthead.prove.stats import detectable_excess, more_often, speedup, tail


def test_ratio_is_of_totals_and_pairs_cancel_what_both_share():
    rng = np.random.default_rng(1)
    slow = rng.uniform(1, 20, 40)  # prompts and moments differ twentyfold
    found = speedup(np.full(40, 100), slow, np.full(40, 100), slow / 2)
    assert found.ratio == pytest.approx(2)
    assert found.ci95 == pytest.approx((2, 2))
    assert found.verdict == "faster"
    assert found.base_tokens_per_s == pytest.approx(4000 / slow.sum())


@pytest.mark.parametrize(("pairs", "least"), [(MIN_PAIRS, 0.91), (40, 0.93)])
def test_interval_covers_the_truth_as_often_as_it_says(pairs, least):
    """Plain percentiles cover it in 87 % of cases with 8 pairs."""
    rng = np.random.default_rng(2)
    hits, ones = 0, np.ones(pairs)
    for seed in range(800):
        base, drafted = rng.lognormal(0, 0.3, (2, pairs))
        found = speedup(ones, base, ones, drafted, resamples=600, seed=seed)
        hits += found.ci95[0] <= 1 <= found.ci95[1]
        assert (found.verdict.startswith("not")) == (found.ci95[0] <= 1 <= found.ci95[1])
    assert least <= hits / 800 <= 0.97


def test_what_is_left_out_on_each_side():
    """Student's t is 2.365 with 7 degrees of freedom, of 8 observations."""
    assert tail(8) == pytest.approx(NormalDist().cdf(-2.365 * (8 / 7) ** 0.5), rel=0.01)
    assert tail(10**6) == pytest.approx(0.025, rel=1e-3)
    assert tail(1) == 0


def test_slower_is_said():
    rng = np.random.default_rng(3)
    noise = rng.uniform(0.95, 1.05, 30)
    assert speedup(np.ones(30), noise, np.ones(30), 1.5 * noise[::-1]).verdict == "slower"


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=200),
    st.integers(1, 64),
    st.integers(1, 3),
)
def test_blocks_are_full_of_one_source_and_fair(sources, concurrency, repeats):
    blocks = blocks_of(sources, concurrency, repeats)
    assert len(blocks) >= MIN_PAIRS
    for block in blocks:
        assert len({sources[i] for i in block}) == 1
        assert len(block) >= (1 if concurrency == 1 else 2 * concurrency)
    counts = np.bincount([i for block in blocks for i in block], minlength=len(sources))
    assert counts.min() >= repeats
    for source in set(sources):
        assert len({counts[i] for i, s in enumerate(sources) if s == source}) == 1


def test_counters_add_and_subtract():
    a, b = Acceptance(2, 6, [2, 1, 0]), Acceptance(4, 12, [4, 3, 2])
    assert Acceptance.total([a, b]) == Acceptance(6, 18, [6, 4, 2])
    assert b.since(a) == Acceptance(2, 6, [2, 2, 2])
    assert b.since(Acceptance()) == b
    assert b.accepted_length == 3.25
    assert Acceptance().accepted_length is None
    assert b.conditional == pytest.approx([1, 3 / 4, 2 / 3])
    assert Acceptance(2, 6, [1, 0, 0]).conditional == [0.5, 0.0, 0.0]


def test_fishers_exact_test_as_published():
    """The lady tasting tea: four cups of four right by chance, and three or more."""
    assert more_often(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert more_often(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert more_often(0, 4, 3, 4) == 1


@pytest.mark.parametrize(("n", "b", "m"), [(150, 11, 150), (4200, 20, 256), (300, 0, 256)])
def test_a_detectable_excess_is_found_as_often_as_said(n, b, m):
    share = detectable_excess(n, b, m, alpha=0.001, power=0.9)
    rng = np.random.default_rng(1)
    counts = rng.binomial(n, b / m + share * (1 - b / m), 400)
    assert np.mean([more_often(a, n, b, m) < 0.001 for a in counts]) > 0.87
    # and half of it is not
    counts = rng.binomial(n, b / m + share / 2 * (1 - b / m), 400)
    assert np.mean([more_often(a, n, b, m) < 0.001 for a in counts]) < 0.9


def test_without_a_control_one_is_enough():
    assert detectable_excess(48, 0, 0, alpha=0.001, power=0.9) == 0.05  # 1 - 0.95**48 = 0.915
    assert detectable_excess(1, 0, 0, alpha=0.001, power=0.9) is None
