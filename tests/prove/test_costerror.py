"""The cost model's error against that of noise, on grids whose truth is known."""

import numpy as np
import pytest

from drafthead.prove.costerror import resampled, with_intervals
from drafthead.prove.costmodel import analyse
from drafthead.prove.pairing import typical_steps

LENGTHS = {1: 1.5, 3: 2.0, 5: 2.25}


def grid(noise, bend=0.0, pairs=16, seed=0):
    """Steps of 1.2 plain ones and 0.1 a draft, that at k = 3 longer by ``bend``; each of a pair's
    times is off by ``noise``. Answers are of 41 tokens, their first without any wait."""
    rng = np.random.default_rng(seed)
    cells = []
    for concurrency in (1, 4, 16, 64):
        plain = rng.lognormal(0, noise, pairs)
        for k, length in LENGTHS.items():
            step = (1.2 + 0.1 * k) * (1 + bend * (k == 3)) * rng.lognormal(0, noise, pairs)
            accepted = [round(100 * (length - 1) / k)] * k
            timed = [
                {
                    "base_tokens": 41,
                    "base_answers": 1,
                    "base_s": 40 * b,
                    "base_step_s": b,
                    "base_first_token_s": 0.0,
                    "drafted_tokens": 41,
                    "drafted_s": 40 / length * d,
                    "drafted_step_s": d,
                    "drafted_waiting": None,
                    "drafted_first_token_s": 0.0,
                    "drafts": 100,
                    "accepted_by_position": accepted,
                }
                for b, d in zip(plain, step, strict=True)
            ]
            cells.append(
                {
                    "num_speculative_tokens": k,
                    "concurrency": concurrency,
                    "max_new_tokens": 41,
                    "accepted_length": 1 + sum(accepted) / 100,
                    "step_s": typical_steps(timed),
                    "speedup": length * plain.sum() / step.sum(),
                    "pairs": timed,
                }
            )
    return cells


def judged(cells):
    curves = {41: [[(LENGTHS[k] - 1) / k] * k if k in LENGTHS else [0.5] * k for k in range(1, 6)]}
    return with_intervals(cells, analyse(cells, curves), curves, resamples=60)


def test_all_pairs_once_are_the_point_itself():
    (one, *_) = grid(0.2)
    again = resampled(one, np.arange(16))
    assert again["step_s"] == one["step_s"]
    assert again["accepted_length"] == pytest.approx(one["accepted_length"])
    assert again["speedup"] == pytest.approx(one["speedup"])
    assert resampled(one, np.zeros(16, int))["step_s"] != one["step_s"]


def test_what_is_wrong_without_noise_is_the_models():
    fits, summary = judged(grid(0.0, bend=0.3))
    assert summary["decoding"]["median_error"] > 0.2
    assert summary["decoding"]["of_noise_alone"] == pytest.approx([0, 0, 0], abs=1e-9)
    point = fits[0]["points"][0]
    assert point["relative_error_ci95"] == pytest.approx([point["relative_error"]] * 2)


def test_an_exact_model_errs_as_noise_does():
    """Over many grids the error is on average what noise alone is said to give, and nearly always
    within its range; of fewer pairs more is noise."""
    found = [judged(grid(0.2, pairs=32, seed=s))[1]["decoding"] for s in range(8)]
    errors = np.array([one["median_error"] for one in found])
    low, middle, high = np.mean([one["of_noise_alone"] for one in found], axis=0)
    assert errors.mean() == pytest.approx(middle, rel=0.3)
    assert np.mean((low < errors) & (errors < high)) >= 0.75
    few = [judged(grid(0.2, pairs=8, seed=s))[1]["decoding"] for s in range(4)]
    assert np.mean([one["of_noise_alone"][1] for one in few]) > 1.3 * middle
