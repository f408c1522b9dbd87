"""How the seeds of the comparison of formats are paired."""

import pytest

from benchmarks.train import state_formats


def head(name: str, seed: int, length: float) -> dict:
    return {"format": name, "seed": seed, "accepted_length": length}


def test_heads_are_held_against_bf16_of_the_same_seed():
    heads = [head("fp8", 1, 1.6), head("bf16", 0, 1.5), head("bf16", 1, 1.7), head("fp8", 0, 1.5)]
    heads += [head("fp8-aux", 2, 9.0)]  # whose other side is not finished
    found = state_formats.summary(heads)
    assert found.keys() == {"bf16", "fp8"}
    assert found["fp8"]["seeds"] == [0, 1]
    assert found["fp8"]["minus_bf16"] == pytest.approx([0, -0.1])
    assert found["fp8"]["mean_minus_bf16"] == pytest.approx(-0.05)
    assert found["bf16"]["minus_bf16"] == [0, 0]
    assert state_formats.summary(heads[:1]) == {}
