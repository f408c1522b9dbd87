"""The part of a list of requests that counts, against engines whose times are known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafthead.head.acceptance import Acceptance
from drafthead.prove.engine import Completion, Generation
from drafthead.prove.paired_timing import Block, blocks_of, figures, pair
from drafthead.prove.steady_state import requests, whole, window
from tests.prove.closed_loop import serve


@given(
    concurrency=st.integers(2, 70),
    more=st.integers(0, 150),
    max_new_tokens=st.integers(1, 300),
)
def test_each_prompt_gets_a_whole_answer_in_one_piece_or_two(concurrency, more, max_new_tokens):
    prompts = list(range(5, 5 + concurrency + more))
    indices, limits = requests(prompts, concurrency, max_new_tokens)
    assert indices[: len(prompts)] == prompts
    assert min(limits) >= 1
    tokens = dict.fromkeys(prompts, 0)
    for i, limit in zip(indices, limits, strict=True):
        tokens[i] += limit
    assert set(tokens.values()) == {max_new_tokens}
    steps = [b - a for a, b in itertools.pairwise(limits[:concurrency])]
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_one_at_a_time_is_one_whole_answer():
    assert requests([7], 1, 48) == ([7], [48])
    alone = serve([48], 1, first_s=0.5, step_s=0.1)
    seen = window(alone, 1)
    assert (seen.tokens, seen.answers, seen.later_tokens) == (48, 1, 47)
    assert (seen.seconds, seen.decoding_s) == pytest.approx((5.2, 4.7))
    assert whole(alone, [48], 1) == alone.completions


def timed(limits, concurrency, lengths=None):
    """A target whose step takes 0.1, with the head 0.15 for so many tokens in each answer."""
    if lengths is None:
        return serve(limits, concurrency, first_s=0.2, step_s=0.1)
    return serve(limits, concurrency, first_s=0.2, step_s=0.15, length=lambda i: lengths[i])


def both_ways(concurrency, lengths):
    """For answers of 48 tokens: the ratio of places at work, that of the windows, that of all
    tokens over all seconds; the seconds of a step; and those of the block, to what it would take
    without limits of its own."""
    prompts = range(2 * concurrency)
    indices, limits = requests(prompts, concurrency, 48)
    plain, fast = timed(limits, concurrency), timed(limits, concurrency, lengths[indices])
    for generation in (plain, fast):
        seen = window(generation, concurrency)
        waiting = 0.2 * seen.answers  # for first tokens; each begins as another ends
        assert seen.decoding_s == pytest.approx(concurrency * seen.seconds - waiting, rel=0.02)
    assert window(plain, concurrency).seconds > 0.95 * plain.wall_s
    drafts = round(sum((np.array(limits) - 1) / lengths[indices]))
    block = Block(["s"], concurrency, limits, plain, fast, Acceptance(drafts, 0, [0]))
    found = figures([block])
    assert found["step_s"]["base"] == pytest.approx(0.1)
    whole_answers = [48] * len(prompts)
    alone, drafted = timed(whole_answers, concurrency), timed(whole_answers, concurrency, lengths)
    at_work = (0.2 + 47 * 0.1) / np.mean(0.2 + 47 / lengths * 0.15)
    whole_list = alone.wall_s / drafted.wall_s
    takes = fast.wall_s / drafted.wall_s
    return at_work, found["speedup"], whole_list, found["step_s"]["drafted"], takes


@pytest.mark.parametrize("concurrency", [4, 16, 64])
def test_the_ratio_is_that_of_places_at_work(concurrency):
    """With the head, answers differ in speed and places fall empty one by one at the end of a
    list: all tokens over all seconds makes it a sixth slower than it is to users."""
    draws = (np.random.default_rng(seed) for seed in range(10))
    found = [both_ways(concurrency, d.choice([1.25, 1.75, 2.75], 2 * concurrency)) for d in draws]
    at_work, ratio, whole_list, step_s, takes = np.mean(found, axis=0)
    assert ratio == pytest.approx(at_work, rel=0.03)
    assert step_s == pytest.approx(0.15, rel=0.03)
    assert whole_list < 0.85 * at_work
    assert takes < 1


def test_places_that_fall_free_at_once_with_one_request_left():
    """The window ends there: one place of the two stays empty."""
    times = [(0, 1), (0, 1), (1, 2), (1, 2), (2, 9)]
    answers = [Completion([0], "length", b, [(b + 0.5, 1), (e, 1)]) for b, e in times]
    seen = window(Generation(answers, 9.0), 2)
    assert (seen.seconds, seen.tokens, seen.answers) == (1.5, 6, 2)
    assert seen.decoding_s == 2.0


@pytest.mark.parametrize("ends", [1, 2, 3])
def test_answers_that_end_at_once_have_figures(ends):
    """Where every answer is a word, all places end together, and only a second round tells."""
    for block in blocks_of(["s"] * 17, 4, repeats=1):
        _, limits = requests(block, 4, 128)
        short = timed([min(limit, ends) for limit in limits], 4)
        drafts = len(limits) * (ends - 1)
        made = pair(Block(["s"], 4, limits, short, short, Acceptance(drafts, 0, [0])))
        assert made["base_tokens"] > 0
        assert made["base_s"] > 0
        assert (made["base_step_s"] is None) == (ends == 1)


@pytest.mark.parametrize(("limit", "beyond"), [(25, 0), (24, 1), (23, 2), (22, 3), (21, 0)])
def test_drafts_beyond_the_longest_answer_are_told(limit, beyond):
    """Three of three are right at every step: counters have four tokens a step, got or not."""
    steps = -(-(limit - 1) // 4)
    fast = serve([limit] * 2, 2, first_s=0.1, step_s=0.1, length=4)
    assert [len(c.outputs) - 1 for c in fast.completions] == [steps] * 2
    counters = Acceptance(2 * steps, 6 * steps, [2 * steps] * 3)
    found = figures([Block(["s"], 2, [limit] * 2, fast, fast, counters)])
    assert found["accepted_length"] == 4
    assert found["accepted_past_end"] == 2 * beyond


def test_the_whole_answers_are_those_of_the_second_round():
    indices, limits = requests(range(4), 2, 8)
    assert limits == [4, 8, 8, 8, 4]
    assert indices == [0, 1, 2, 3, 0]
    served = serve(limits, 2, first_s=0.2, step_s=0.1)
    assert whole(served, limits, 2) == served.completions[2:4]
