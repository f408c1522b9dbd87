"""The cost model against step times made from known parts."""

import pytest

from drafthead.prove.costmodel import (
    StepCost,
    Vocabularies,
    analyse,
    by_vocabulary,
    choose,
    fit,
    median_error,
    recommended_k,
    thinned,
)

CURVE = [0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02]


def cell(k, concurrency=1, plain=3.0, fixed=3.4, slope=0.5, curve=CURVE):
    return {
        "num_speculative_tokens": k,
        "concurrency": concurrency,
        "accepted_length": 1 + sum(curve[:k]),
        "acceptance_by_position": curve[:k],
        "step_s": {"base": plain, "drafted": fixed + slope * k},
    }


def test_fit_finds_the_parts_and_speedup_is_tokens_over_time():
    cost = fit(1, 3.0, {1: 3.9, 3: 4.9, 5: 5.9})
    assert (cost.fixed, cost.slope) == pytest.approx((3.4, 0.5))
    assert cost.speedup(3, CURVE) == pytest.approx(2.5 * 3.0 / 4.9)
    with pytest.raises(ValueError, match="7 positions, k=8"):
        cost.speedup(8, CURVE)


def test_one_k_is_taken_as_a_plain_step_and_its_drafts():
    cost = fit(1, 3.0, {3: 4.5})
    assert cost.step(3) == pytest.approx(4.5)
    assert (cost.fixed, cost.slope) == pytest.approx((3.0, 0.5))


def test_the_best_k_balances_cost_and_acceptance():
    cost = fit(1, 3.0, {1: 3.9, 5: 5.9})
    gains = choose(cost, CURVE)
    brute = {k: (1 + sum(CURVE[:k])) * 3.0 / (3.4 + 0.5 * k) for k in range(1, 8)}
    assert gains == pytest.approx(brute)
    assert next(iter(gains)) == max(brute, key=brute.__getitem__) == 3
    free = fit(1, 3.0, {1: 3.4, 5: 3.4})
    assert next(iter(choose(free, CURVE))) == 7
    dear = fit(1, 3.0, {1: 6.0, 5: 18.0})
    assert next(iter(choose(dear, CURVE))) == 1


def test_error_is_out_of_sample():
    exact = [cell(k, c, fixed=3.4 * c) for c in (1, 4) for k in (1, 3, 5, 7)]
    for found in analyse(exact, None):
        assert found["median_relative_error"] == pytest.approx(0, abs=1e-9)
        assert len(found["points"]) == 4
    bent = [cell(1), cell(3), cell(5), cell(7, fixed=6.0)]  # one step the line cannot know of
    (found,) = analyse(bent, None)
    last = found["points"][-1]
    assert last["predicted_without_this_point"] == pytest.approx(
        (1 + sum(CURVE)) * 3.0 / (3.4 + 0.5 * 7)
    )
    assert last["relative_error"] == pytest.approx((6.0 + 3.5) / (3.4 + 3.5) - 1)


def test_a_predicted_curve_takes_the_place_of_the_served_one():
    (found,) = analyse([cell(1), cell(3)], [0.9] * 5)
    assert found["acceptance_by_position"] == [0.9] * 5
    assert set(found["predicted_speedup"]) == {"1", "2", "3", "4", "5"}
    (found,) = analyse([cell(1), cell(3)], [0.9])  # too short for the grid
    assert found["acceptance_by_position"] == CURVE[:3]


def test_a_smaller_vocabulary_costs_less_and_accepts_less():
    cost = StepCost(1, plain=3.0, fixed=3.4, slope=0.5, row=1e-5)
    curves = {8000: thinned(CURVE, 0.97), 32000: CURVE, 64000: CURVE}
    small, own, large = by_vocabulary(cost, Vocabularies(32000, {1: 1e-5}, curves))
    assert own["predicted_speedup"]["3"] == pytest.approx(2.5 * 3.0 / 4.9)
    tokens = 1 + 0.7 * 0.97 + 0.5 * 0.97**2 + 0.3 * 0.97**3
    assert small["predicted_speedup"]["3"] == pytest.approx(tokens * 3.0 / (4.9 - 3 * 0.24))
    assert large["predicted_speedup"]["3"] == pytest.approx(2.5 * 3.0 / (4.9 + 3 * 0.32))
    assert small["best_num_speculative_tokens"] > large["best_num_speculative_tokens"]


def test_a_recommendation_takes_two_k_at_that_load():
    fits = analyse([cell(k, c) for c in (1, 4) for k in ((1, 3, 5) if c == 4 else (3,))], CURVE)
    assert recommended_k(fits, 1) is None
    assert recommended_k(fits, 4) == 3
    assert recommended_k(fits, 16) is None
    bent = [cell(1, fixed=9.0), cell(3), cell(5, fixed=9.0)]
    assert recommended_k(analyse(bent, CURVE), 1) is None  # the fit does not hold
    assert median_error(fits[:1]) is None
    assert median_error(fits) == pytest.approx(0, abs=1e-9)
