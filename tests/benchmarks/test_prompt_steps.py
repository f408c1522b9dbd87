"""What a grid's record says of the steps that read prompts."""

import prompt_steps

from drafthead.prove.steady import Step, packed


def cell(steps, k=1, length=2.0):
    pair = {"sources": ["a"], "base_steps": packed(steps), "drafted_steps": packed(steps)}
    point = {
        "num_speculative_tokens": k,
        "concurrency": 4,
        "max_new_tokens": 48,
        "temperature": 0.0,
    }
    return {**point, "accepted_length": length, "pairs": [pair]}


def test_a_step_counts_by_what_the_next_one_reads():
    """Two milliseconds where neither this step nor the next reads, ten where the next does, thirty
    where the next reads more than a graph holds, five where only this one does."""
    quiet, small, large = (0, 0), (1, 1), (3, 3)
    order = [quiet, quiet, small, quiet, quiet, large] * 8
    milliseconds = {quiet: {quiet: 2, small: 10, large: 30}, small: {quiet: 5}, large: {quiet: 5}}
    steps = [
        Step(milliseconds[now][after] / 1e3, 4, 4, *now)
        for now, after in zip(order, [*order[1:], quiet])
    ]
    (row,) = prompt_steps.judge([cell(steps)], None, {"a": 30}, graph=60)
    assert row["head"] == {"reading": 0.333, "none": 2.0, "some": 10.0, "large": 30.0}
    assert row["decoding"] == 2.0
    # Alone a step has a token for each request: 4 and three prompts of 30 are too many still.
    assert row["alone"] == row["head"]
    assert prompt_steps.judge([cell(steps)], "b", {"a": 30}, graph=60)[0]["decoding"] is None
    (row,) = prompt_steps.judge([cell(steps)], None, {"a": 30}, graph=100)
    assert row["head"]["large"] is None


def test_one_request_and_sampled_points_are_left_out():
    steps = [Step(0.002, 4, 4, 0, 0)] * 9
    assert prompt_steps.judge([cell(steps) | {"concurrency": 1}], None, {}, 512) == []
    assert prompt_steps.judge([cell(steps) | {"temperature": 0.7}], None, {}, 512) == []
