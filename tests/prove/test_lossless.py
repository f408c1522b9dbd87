"""Ties and faults told apart, with a target whose noise is known."""

import numpy as np
import pytest

from drafthead.prove.engine import Completion, Generation
from drafthead.prove.lossless import NOT_LOSSLESS, TIE, Examiner, Noise, once_more

VOCAB, TOKENS, JUMP = 12, 40, 0.5


class Target:
    """A target with bf16's habits: decoding and one pass agree to the bit at most positions; at a
    few, drawn from the prefix, the gaps are apart by ``JUMP``."""

    def __init__(self, jumps: float, sure: float = 0.0):
        self.jumps, self.sure, self.measured = jumps, sure, 0
        self.info = {"max_model_len": 1000}

    def row(self, prefix: tuple[int, ...], decoding: bool) -> dict[int, float]:
        """``sure``: how much the likeliest of every tenth row, far above the rest, moves."""
        rng = np.random.default_rng(prefix)
        logits = rng.permutation(VOCAB) / 4  # gaps of a quarter
        best, jumps, sure = logits.argmax(), *rng.random(2)
        if jumps < self.jumps and decoding:
            logits[rng.integers(VOCAB)] += JUMP
        if self.sure and sure < 0.1:
            logits[best] += 10 + self.sure * decoding
        return dict(enumerate(logits - np.log(np.exp(logits).sum())))

    def generate(self, prompts, *, max_tokens, logprobs=None, decoding=True, **_):
        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        found = []
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            ids, rows = [], []
            # One token is asked for when a place is computed anew: that is one pass.
            for _ in range(limit):
                row = self.row((*prompt, *ids), decoding and limit > 1)
                ids.append(max(row, key=row.get))
                rows.append(row)
            found.append(Completion(ids, "length", logprobs=rows if logprobs else []))
        return Generation(found, 0.0)

    def score(self, sequences, top):
        self.measured += 1
        return [
            [{}, *(self.row(tuple(s[:i]), decoding=False) for i in range(1, len(s)))]
            for s in sequences
        ]


PROMPTS = [[i, 7] for i in range(60)]
LIMITS = [TOKENS] * len(PROMPTS)


def answers(target: Target, **how) -> list[Completion]:
    return target.generate(PROMPTS, max_tokens=LIMITS, **how).completions


def test_noise_that_shows_at_one_position_in_a_hundred_explains_ties():
    """256 positions, as were once looked at, miss such noise often; whole answers do not."""
    target = Target(jumps=0.01)
    alone, drafted = answers(target), answers(target, decoding=False)
    examiner = Examiner(target, PROMPTS, LIMITS, 8)
    found = examiner.compare(alone, drafted)
    assert found["lossless"]
    assert found["ties"] > 2
    assert found["identical"] + found["ties"] == len(PROMPTS)
    noise = found["noise"]
    assert noise["positions"] == len(PROMPTS) * TOKENS
    assert noise["largest"] == pytest.approx(JUMP)
    assert 2 < noise["flips"] < 0.01 * noise["positions"] * 2
    assert all(d["gap"] <= JUMP for d in found["examined"])
    # Asked again it writes the same: it is one pass that it parts from, as the drafted answers do.
    assert noise["parted"] == 0
    assert noise["parted_at_once"] == found["ties"]
    assert found["p_value"] > 0.4
    examiner.compare(alone, drafted)
    assert target.measured == 1


@pytest.mark.parametrize("jumps", [0.0, 0.01])
def test_a_token_further_off_than_the_noise_is_a_fault(jumps):
    target = Target(jumps)
    alone = answers(target)
    drafted = [Completion(list(a.ids), "length") for a in alone]
    row = target.row((*PROMPTS[5], *drafted[5].ids[:9]), decoding=False)
    drafted[5].ids[9] = sorted(row, key=row.get)[-6]  # 1.25 below the likeliest
    found = Examiner(target, PROMPTS, LIMITS, 8).compare(alone, drafted)
    assert (found["identical"], found["differences"]) == (len(PROMPTS) - 1, 1)
    assert found["examined"][-1]["verdict"] == NOT_LOSSLESS
    assert found["examined"][-1]["position"] == 9


def corrupted(target: Target, answers: list[Completion], index: int, at: int, below: int):
    """The answers, of one the token ``at`` replaced by the one ``below`` places below the best."""
    found = [Completion(list(a.ids), "length") for a in answers]
    row = target.row((*PROMPTS[index], *found[index].ids[:at]), decoding=False)
    found[index].ids[at] = sorted(row, key=row.get)[-1 - below]
    return found


@pytest.mark.parametrize("sure", [0.0, 4.0])
def test_one_corrupted_answer_in_fifty_is_found(sure):
    """Also where the target's gaps move by more than the fault's at places where nothing comes of
    it: it is held against the gaps at which the target did part from itself."""
    target = Target(jumps=0.1, sure=sure)
    alone, drafted = answers(target), answers(target, decoding=False)
    # Right after the prompt, before any tie, where the target is not sure.
    index = next(i for i, p in enumerate(PROMPTS) if max(target.row(tuple(p), False).values()) < -1)
    found = Examiner(target, PROMPTS, LIMITS, 8).compare(
        alone, corrupted(target, drafted, index, at=0, below=8)
    )
    assert found["noise"]["largest"] >= sure
    assert found["noise"]["widest"] <= JUMP
    assert found["ties"] > 10
    assert not found["lossless"]
    assert found["differences"] == 1
    (fault,) = [d for d in found["examined"] if d["prompt"] == index]
    assert fault["gap"] == pytest.approx(2.0)
    assert fault["verdict"] == NOT_LOSSLESS


def test_a_fault_within_the_noise_shows_as_more_partings_than_the_target_has():
    """Ten answers more than the target's own part, each at the second likeliest token; three more
    are what chance does."""
    target = Target(jumps=0.001)
    alone = answers(target)

    def judged(faults: int) -> dict:
        drafted = alone
        for index in range(faults):
            drafted = corrupted(target, drafted, index, at=5, below=1)
            # What it writes on from there is the target's own.
            start = [*PROMPTS[index], *drafted[index].ids[:6]]
            (rest,) = target.generate([start], max_tokens=TOKENS - 6).completions
            drafted[index].ids[6:] = rest.ids
        return Examiner(target, PROMPTS, LIMITS, 8).compare(alone, drafted)

    few, many = judged(3), judged(30)
    assert few["lossless"]
    assert few["ties"] == 3
    assert many["differences"] == 0
    assert many["ties"] == 30
    assert many["p_value"] < 0.001
    assert not many["lossless"]


def test_what_differs_only_by_how_the_engine_is_set_is_not_the_heads_doing():
    """Answers from an engine that is set as with the head, but has none, are the measure."""
    target, other = Target(jumps=0.0), Target(jumps=0.05)
    alone, drafted = answers(target), answers(other)
    again = once_more(other, PROMPTS, LIMITS, 8)
    assert sorted(again) == list(range(len(PROMPTS)))
    assert list(again) != sorted(again)
    found = Examiner(target, PROMPTS, LIMITS, 8, again).compare(alone, drafted)
    assert found["noise"]["parted"] == len(PROMPTS) - found["identical"] > 10
    assert found["noise"]["flips"] == 0
    assert found["p_value"] > 0.4


def test_a_fault_behind_a_tie_is_found():
    target = Target(jumps=0.01)
    alone, drafted = answers(target), answers(target, decoding=False)
    index = next(
        i for i, (a, b) in enumerate(zip(alone, drafted)) if a.ids[:20] != b.ids[:20]
    )  # fmt: skip
    row = target.row((*PROMPTS[index], *drafted[index].ids[:30]), decoding=False)
    drafted[index].ids[30] = min(row, key=row.get)
    found = Examiner(target, PROMPTS, LIMITS, 8).compare(alone, drafted)
    verdicts = [d["verdict"] for d in found["examined"] if d["prompt"] == index]
    assert verdicts[0] == TIE
    assert verdicts[-1] == NOT_LOSSLESS
    assert found["differences"] == 1


def test_a_gap_at_which_the_target_parts_from_itself_is_a_tie():
    """As on an H100 in bf16: one pass over the answers showed no noise, another batch did."""
    noise = Noise(150, 21, 7, 0, 9377, 0, largest=0.0, widest=0.375)
    assert noise.tolerance == 0.375
    assert Noise(150, 21, 0, 0, 9377, 0, largest=0.0, widest=0.0).tolerance == 0.0
    assert Noise(256, 21, 34, 49, 16203, 56, largest=1.25, widest=0.25).tolerance == 0.75
