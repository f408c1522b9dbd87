"""What sampled.py makes of its rounds."""

import pytest

from benchmarks.serve import sampled
from drafthead.prove.engine import Completion, Generation

LIKELIEST, DRAWN, MORE = (
    ("head", "greedy", 3),
    ("head", "probabilistic", 3),
    ("head", "probabilistic", 5),
)


def test_ratios_are_of_a_round_and_the_summary_has_the_best_k_and_the_least_head():
    def sides(slow, *fast):
        both = zip((sampled.ALONE, LIKELIEST, DRAWN, MORE), (slow, *fast), strict=True)
        return {
            side: {
                "tokens_per_s": rate,
                "drafts": 10 * side[2],
                "accepted_by_position": [5] * side[2],
            }
            for side, rate in both
        }

    # The machine is half as fast in the second round; ratios are the same.
    rounds = [sides(10, 12, 18, 15), sides(5, 6, 9, 7.5), sides(10, 12, 12, 15)]
    case = sampled.Case({}, [], dict.fromkeys(rounds[0]), {(0.7, 16): rounds})
    rows = {
        (row["draft_sample_method"], row["num_speculative_tokens"]): row
        for row in sampled.cells(case)
    }
    assert rows["greedy", 3]["over_alone"]["median"] == pytest.approx(1.2)
    assert "over_10807bf" not in rows["greedy", 3]
    assert rows["probabilistic", 3]["over_10807bf"]["median"] == pytest.approx(1.5)
    assert rows["probabilistic", 3]["over_10807bf"]["middle_half"] == pytest.approx([1.25, 1.5])
    assert rows["probabilistic", 3]["accepted_length"] == 1.5
    slower = [row | {"over_10807bf": {"median": 1.1}} for row in sampled.cells(case)[3:]]
    found = sampled.figures({"one": sampled.cells(case), "two": slower})
    assert found == {"t07_16": 1.1, "one_head": {"t07_16": 1.5}, "two_head": {"t07_16": 1.1}}


def test_a_step_counts_where_it_begins():
    outputs = [(0.0, 1), (0.1, 126), (0.2, 4), (0.3, 2)]  # the first is the prompt's own
    found = sampled.by_place(Generation([Completion([], "length", 0.0, outputs)], 1.0))
    assert found == [
        {"begin": 1, "steps": 2, "tokens_a_step": 65.0},
        {"begin": 128, "steps": 1, "tokens_a_step": 2.0},
    ]
