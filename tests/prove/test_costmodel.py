"""The cost model against step times made from known parts."""

import pytest

from drafthead.prove.costmodel import (
    StepCost,
    Vocabularies,
    analyse,
    by_vocabulary,
    choose,
    fit,
    lengths,
    lengths_served,
    median_error,
    recommended_k,
    thinned,
)

CURVE = [0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02]
CURVES = [CURVE[:k] for k in range(1, 8)]
LENGTHS = lengths(CURVES)


def cell(k, concurrency=1, plain=3.0, fixed=3.4, slope=0.5, waiting=0.0, tokens=48):
    """Answers of 41 tokens, the first of them after 10 (with the head 12) units of time; half a
    request waits in a step for each token that it yields."""
    requests = LENGTHS[k - 1] / 2
    step = fixed + slope * k + waiting * requests
    accepted = [round(1000 * p) for p in CURVE[:k]]
    pair = {
        "drafts": 1000,
        "accepted_by_position": accepted,
        "base_tokens": 41,
        "base_answers": 1,
        "base_first_token_s": 10.0,
        "drafted_first_token_s": 12.0,
        "drafted_waiting": {"requests": requests, "square": 8.0, "product": 8.0 * waiting},
    }
    return {
        "num_speculative_tokens": k,
        "concurrency": concurrency,
        "max_new_tokens": tokens,
        "accepted_length": LENGTHS[k - 1],
        "step_s": {
            "base": plain,
            "drafted": step,
            "plain_steps": step / plain,
        },
        "speedup": (10 + 40 * plain) / (12 + 40 / LENGTHS[k - 1] * step),
        "pairs": [pair],
    }


def test_fit_finds_the_parts_and_speedup_is_tokens_over_time():
    cost = fit(1, 3.0, {1: 3.9, 3: 4.9, 5: 5.9})
    assert (cost.fixed, cost.slope) == pytest.approx((3.4, 0.5))
    assert cost.speedup(3, 2.5) == pytest.approx(2.5 * 3.0 / 4.9)


def test_no_step_is_shorter_for_a_draft_more():
    cost = fit(1, 3.0, {1: 4.4, 3: 4.2, 5: 4.0})
    assert cost.slope == 0
    off = [cost.step(k, 2.0) / seconds - 1 for k, seconds in ((1, 4.4), (3, 4.2), (5, 4.0))]
    assert max(map(abs, off)) < 0.06


def test_one_k_is_taken_as_a_plain_step_and_its_drafts():
    cost = fit(1, 3.0, {3: 4.5})
    assert cost.step(3, 2.0) == pytest.approx(4.5)
    assert (cost.fixed, cost.slope) == pytest.approx((3.0, 0.5))


def test_the_best_k_balances_cost_and_acceptance():
    cost = fit(1, 3.0, {1: 3.9, 5: 5.9})
    gains = choose(cost, LENGTHS)
    brute = {k: (1 + sum(CURVE[:k])) * 3.0 / (3.4 + 0.5 * k) for k in range(1, 8)}
    assert gains == pytest.approx(brute)
    assert next(iter(gains)) == max(brute, key=brute.__getitem__) == 3
    free = fit(1, 3.0, {1: 3.4, 5: 3.4})
    assert next(iter(choose(free, LENGTHS))) == 7
    dear = fit(1, 3.0, {1: 6.0, 5: 18.0})
    assert next(iter(choose(dear, LENGTHS))) == 1


def test_error_is_out_of_sample():
    exact = [cell(k, c, fixed=3.4 * c) for c in (1, 4) for k in (1, 3, 5, 7)]
    for found in analyse(exact, {}):
        assert found["median_relative_error"] == pytest.approx(0, abs=1e-9)
        assert median_error([found], "answer_relative_error") == pytest.approx(0, abs=1e-9)
        assert len(found["points"]) == 4
    bent = [cell(1), cell(3), cell(5), cell(7, fixed=6.0)]  # one step the line cannot know of
    (found,) = analyse(bent, {})
    last = found["points"][-1]
    assert last["predicted_without_this_point"] == pytest.approx(
        (1 + sum(CURVE)) * 3.0 / (3.4 + 0.5 * 7)
    )
    assert last["relative_error"] == pytest.approx((6.0 + 3.5) / (3.4 + 3.5) - 1)


def test_requests_that_wait_are_no_cost_of_drafts():
    """The fewer steps an answer takes, the more requests wait in one of them: not in proportion to
    k, but to the tokens a step yields."""
    cells = [cell(k, 16, waiting=2.0) for k in (1, 3, 5, 7)]
    (found,) = analyse(cells, {})
    assert found["per_waiting_s"] == pytest.approx(2.0)
    assert (found["fixed_s"], found["per_draft_token_s"]) == pytest.approx((3.4, 0.5))
    assert found["median_relative_error"] == pytest.approx(0, abs=1e-9)
    assert median_error([found], "answer_relative_error") == pytest.approx(0, abs=1e-9)
    for one in cells:
        one["pairs"][0]["drafted_waiting"] = None
    (blind,) = analyse(cells, {})
    signs = [point["relative_error"] > 0 for point in blind["points"]]
    assert signs == [False, True, True, False]  # a line through what is bent
    assert blind["median_relative_error"] > 0.01


@pytest.mark.parametrize("product", [-80.0, 8000.0])
def test_a_cost_of_waiting_that_noise_made_is_none(product):
    cells = [cell(k, 16) for k in (1, 3, 5)]
    for one in cells:
        one["pairs"][0]["drafted_waiting"]["product"] = product
    (found,) = analyse(cells, {})
    assert found["per_waiting_s"] == 0
    assert (found["fixed_s"], found["per_draft_token_s"]) == pytest.approx((3.4, 0.5))


def test_predicted_curves_take_the_place_of_the_served_one():
    (found,) = analyse([cell(1), cell(3)], {48: [[0.9] * k for k in range(1, 6)]})
    assert found["accepted_length_by_k"] == pytest.approx([1.9, 2.8, 3.7, 4.6, 5.5])
    assert set(found["predicted_speedup"]) == {"1", "2", "3", "4", "5"}
    (found,) = analyse([cell(1), cell(3)], {48: [[0.9]]})  # too short for the grid
    assert found["accepted_length_by_k"] == pytest.approx(LENGTHS[:3])


def test_each_length_of_answers_has_its_own_fit_and_curves():
    short = [cell(k, 16, waiting=2.0) for k in (1, 3, 5)]
    long = [cell(k, 16, plain=2.5, waiting=0.2, tokens=256) for k in (1, 3, 5)]
    better = [[0.9] * k for k in range(1, 6)]
    others = Vocabularies(48, 32000, {16: 1e-5}, {32000: CURVES})
    one, other = analyse(long + short, {256: better}, others)
    assert (one["max_new_tokens"], other["max_new_tokens"]) == (48, 256)
    assert (one["per_waiting_s"], other["per_waiting_s"]) == pytest.approx((2.0, 0.2))
    assert (one["plain_step_s"], other["plain_step_s"]) == (3.0, 2.5)
    assert one["accepted_length_by_k"] == pytest.approx(LENGTHS[:5])
    assert other["accepted_length_by_k"] == pytest.approx([1.9, 2.8, 3.7, 4.6, 5.5])
    assert [len(fit["by_vocabulary"]) for fit in (one, other)] == [1, 0]
    assert one["best_num_speculative_tokens"] < other["best_num_speculative_tokens"] == 5
    assert recommended_k([one, other], (16, 48)) == one["best_num_speculative_tokens"]
    assert recommended_k([one, other], (16, 256)) is None  # not what was served: it does not hold


def test_text_that_is_easily_drafted_takes_fewer_steps_the_larger_k_is():
    """Three texts of 48 tokens: every draft right, the first of each step, none."""
    accepted = {8: [8] * 5, 24: [24, 0, 0, 0, 0], 48: [0] * 5}
    pairs = [{"drafts": n, "accepted_by_position": right} for n, right in accepted.items()]
    walked = {k: 144 / (48 / (1 + k) + 24 + 48) for k in range(1, 6)}
    assert lengths_served(pairs, 5) == pytest.approx(list(walked.values()))
    steps = sum(accepted)
    assert walked[1] > 1 + (8 + 24) / steps  # the first of the rates at k = 5 is too low for k = 1


def test_a_smaller_vocabulary_costs_less_and_accepts_less():
    cost = StepCost(1, plain=3.0, fixed=3.4, slope=0.5, row=1e-5)
    few = [thinned(curve, 0.97) for curve in CURVES]
    curves = {8000: few, 32000: CURVES, 64000: CURVES}
    small, own, large = by_vocabulary(cost, Vocabularies(48, 32000, {1: 1e-5}, curves))
    assert own["predicted_speedup"]["3"] == pytest.approx(2.5 * 3.0 / 4.9)
    tokens = 1 + 0.7 * 0.97 + 0.5 * 0.97**2 + 0.3 * 0.97**3
    assert small["predicted_speedup"]["3"] == pytest.approx(tokens * 3.0 / (4.9 - 3 * 0.24))
    assert large["predicted_speedup"]["3"] == pytest.approx(2.5 * 3.0 / (4.9 + 3 * 0.32))
    assert small["best_num_speculative_tokens"] > large["best_num_speculative_tokens"]


def test_a_recommendation_takes_two_k_at_that_load():
    fits = analyse(
        [cell(k, c) for c in (1, 4) for k in ((1, 3, 5) if c == 4 else (3,))], {48: CURVES}
    )
    assert recommended_k(fits, (1, 48)) is None
    assert recommended_k(fits, (4, 48)) == 3
    assert recommended_k(fits, (16, 48)) is None
    assert recommended_k(fits, (4, 256)) is None
    bent = [cell(1, fixed=9.0), cell(3), cell(5, fixed=9.0)]
    assert recommended_k(analyse(bent, {48: CURVES}), (1, 48)) is None  # the fit does not hold
    assert median_error(fits[:1]) is None
    assert median_error(fits) == pytest.approx(0, abs=1e-9)
