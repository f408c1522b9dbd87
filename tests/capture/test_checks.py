from dataclasses import replace

import pytest
import torch

from drafthead.capture import checks
from drafthead.capture.checks import (
    ALL_ZERO,
    MISSING,
    NOT_FINITE,
    Checker,
    check_agreement,
    check_share,
    teacher_argmax,
    unusable,
)
from drafthead.errors import DraftheadError
from drafthead.states import Sample, StoreMeta
from drafthead.states.format import encode
from drafthead.targets import load_target
from tests.refused import refused

META = StoreMeta((0, 2), 4, 64, "fp32", 1, {})


@pytest.fixture(scope="module")
def target(llama):
    return load_target(llama)


def greedy_sample(target, seed=0, tokens=12, prompt=4):
    """Random states, and the answer that the target's teacher reads off them."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens - 1, 3, 64, generator=g)
    norm, eps = target.final_norm()
    ids = torch.randint(0, 500, (tokens,), generator=g, dtype=torch.int32)
    ids[prompt:] = teacher_argmax(states[prompt - 1 :, -1], norm, eps, target.lm_head()).int()
    return Sample(ids, torch.arange(tokens) >= prompt, states, 2, prompt, f"c{seed}", "train")


def run(checker, samples):
    checks = {}
    named = [(sample.conversation, sample) for sample in samples]
    return list(checker.watch(named, len(samples), META, checks)), checks


@pytest.mark.parametrize("block", [4096, 100, 3])
def test_teacher_is_the_last_norm_and_the_lm_head(target, monkeypatch, block):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target.path, dtype=torch.float32)
    last = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(last)).argmax(-1)
    norm, eps = target.final_norm()
    monkeypatch.setattr(checks, "_VOCAB_BLOCK", block)
    monkeypatch.setattr(checks, "_POSITIONS_BLOCK", block)
    assert torch.equal(teacher_argmax(last, norm, eps, target.lm_head()), expected)


def test_good_samples_pass_untouched_and_are_counted(target, monkeypatch):
    samples = [greedy_sample(target, seed) for seed in range(5)]
    checker = Checker(target, True)
    passed, found = run(checker, samples)
    assert all(a is b for a, b in zip(passed, samples))
    assert found == {"samples": 5, "tokens": 55, "greedy_checked": 40, "greedy_agree": 40}
    for most, each in ((15, 3), (11, 3), (5, 1), (41, 8)):
        monkeypatch.setattr(checks, "CHECKED", most)
        assert run(checker, samples)[1]["greedy_checked"] == 5 * each


def test_rows_of_other_positions_are_found_out(target):
    checker = Checker(target, True)
    shifted = [greedy_sample(target, seed) for seed in range(4)]
    for sample in shifted:
        sample.states[:] = sample.states.roll(1, 0)
    with refused("1 of 32 tokens", "config.json"):
        run(checker, shifted)
    # sampled answers are not expected to be the teacher's
    sampled = Checker(target, False)
    assert run(sampled, shifted)[1]["greedy_checked"] == 0


@pytest.mark.parametrize(
    ("positions", "fewest"), [(0, 0), (1, 0), (3, 1), (5, 2), (40, 30), (512, 440)]
)
def test_a_near_tie_among_few_tokens_is_no_fault(positions, fewest):
    check_agreement(fewest, positions)
    if fewest:
        with refused(f"{fewest - 1} of {positions} tokens"):
            check_agreement(fewest - 1, positions)


@pytest.mark.parametrize("block", [32, 2])
@pytest.mark.parametrize("encoding", ["fp32", "bf16", "fp8", "fp8-aux"])
def test_silent_zeros_and_what_is_not_finite(encoding, block, monkeypatch):
    monkeypatch.setattr(checks, "_VALUES_BLOCK", block)

    def check(change):
        states = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
        change(states)
        ids, about = torch.zeros(6, dtype=torch.int32), (2, 1, "c7", "train")
        sample = Sample(ids, ids.bool(), states, *about)
        return unusable(replace(sample, **encode(states, encoding)), META)

    assert check(lambda s: None) is None
    assert check(lambda s: s[3, 0].zero_()) is None  # an embedding may be zero
    assert check(lambda s: s[3, 1, :63].zero_()) is None
    assert check(lambda s: s[3, 1].zero_()) == ALL_ZERO
    assert check(lambda s: s.zero_()) == ALL_ZERO
    for value in (float("nan"), float("inf"), -float("inf")):
        assert check(lambda s, v=value: s[1, 2, 9].fill_(v)) == NOT_FINITE  # the last layer
        assert check(lambda s, v=value: s[1, 1, 9].fill_(v)) == NOT_FINITE  # an auxiliary one


def test_unusable_samples_are_left_out_and_the_others_stay(target):
    samples = [greedy_sample(target, seed) for seed in range(5)]
    samples[1].states[3] = float("nan")
    samples[4].states[:] = 0
    given = [(s.conversation, s) for s in samples]
    given[2] = ("c2", None)
    checks = {}
    passed = list(Checker(target, True).watch(given, 5, META, checks))
    assert [sample.conversation for sample in passed] == ["c0", "c3"]
    assert checks["samples"] == 2
    assert checks["left_out"] == {NOT_FINITE: ["c1"], MISSING: ["c2"], ALL_ZERO: ["c4"]}
    assert checks["greedy_agree"] == checks["greedy_checked"] == 16


@pytest.mark.parametrize(
    ("count", "conversations", "share", "more", "stops"),
    [
        (1, 3, 0.05, False, False),  # one is none too many
        (1, 3, 0.0, False, True),
        (5, 100, 0.05, False, False),
        (6, 100, 0.05, False, True),
        (6, 100, 0.05, True, False),  # by chance: more samples are to come
        (100, 100, 0.05, True, True),
        (16, 32, 0.05, True, True),
        (100, 100, 1.0, False, False),
    ],
)
def test_more_unusable_samples_than_the_recipe_allows_stop_the_work(
    count, conversations, share, more, stops
):
    unusable = {NOT_FINITE: [f"c{i}" for i in range(count)]}
    labels = {"c0": "chats.jsonl, line 7: 'Hello'"}
    if not stops:
        check_share(unusable, conversations, share, labels, more_to_come=more)
        return
    with pytest.raises(DraftheadError) as stopped:
        check_share(unusable, conversations, share, labels, more_to_come=more)
    for words in ("capture.max_unusable", f"{count} of {conversations}", "line 7: 'Hello'"):
        assert words in str(stopped.value)
    assert "engine.dtype" in str(stopped.value)
