"""Ties and faults told apart, with a target whose noise is known."""

import numpy as np
import pytest

from drafthead.prove.engine import Completion, Generation
from drafthead.prove.lossless import BATCHES, Examiner, ask_again, other_concurrencies
from drafthead.prove.numeric_noise import NOT_LOSSLESS, TIE, WIDE, NoiseSample, noise_words

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
    assert noise["parted"] == [0, 0]
    assert noise["parted_at_once"] == found["ties"]
    assert found["p_value"] > 0.4
    examiner.compare(alone, drafted)
    assert target.measured == 1


@pytest.mark.parametrize("answered", [1, 20])
def test_where_no_answer_differs_nothing_is_said_of_noise(answered):
    """It was not measured; the power is that of the answers alone."""
    target, limits = Target(jumps=0.0), LIMITS[:answered]
    alone = target.generate(PROMPTS[:answered], max_tokens=limits).completions
    found = Examiner(target, PROMPTS[:answered], limits, 8).compare(alone, alone)
    assert (found["identical"], found["noise"]) == (answered, None)
    (words,) = noise_words({"runs": [found | {"workload": "prompts"}]})
    assert "noise" not in words
    assert ("too few" in words) == (answered == 1)


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
    assert found["bounds"]["widest"] <= JUMP
    assert found["bounds"]["limit"] == pytest.approx(2 * JUMP)
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
    again = ask_again(other, PROMPTS, LIMITS, 8)
    assert len(again) == len(other_concurrencies(8))
    assert sorted(again[0]) == list(range(len(PROMPTS)))
    assert list(again[0]) != sorted(again[0])
    found = Examiner(target, PROMPTS, LIMITS, 8, again).compare(alone, drafted)
    assert found["noise"]["parted"] == [len(PROMPTS) - found["identical"]] * 2
    assert found["noise"]["parted"][0] > 10
    assert found["noise"]["flips"] == 0
    assert found["p_value"] > 0.4
    # Each writes the same however many are asked at once: it is from each other that they move.
    assert found["bounds"]["limit"] == pytest.approx(2 * JUMP)
    assert found["lossless"]


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


def wide(jumps: float, faults: int, below: int, prompts: int = 60) -> dict:
    """What is found of answers of which ``faults`` have a token ``below`` places below the best,
    a quarter of log-probability each, and else what a target with noise writes."""
    target = Target(jumps)
    asked = [[i, 7] for i in range(prompts)]
    limits = [12] * prompts
    alone = target.generate(asked, max_tokens=limits).completions
    drafted = target.generate(asked, max_tokens=limits, decoding=False).completions
    same = [i for i in range(prompts) if alone[i].ids == drafted[i].ids]
    for i in same[:faults]:
        row = target.row((*asked[i], *drafted[i].ids[:3]), decoding=False)
        ids = [*drafted[i].ids[:3], sorted(row, key=row.get)[-1 - below]]
        (rest,) = target.generate([[*asked[i], *ids]], max_tokens=[8], decoding=False).completions
        drafted[i] = Completion(ids + rest.ids, "length")
    return Examiner(target, asked, limits, 8).compare(alone, drafted)


def test_one_corrupted_answer_in_five_hundred_is_found():
    """In a target that parts from itself, by half a unit; the fault lies 1.25 off."""
    found = wide(jumps=0.05, faults=1, below=5, prompts=500)
    assert found["ties"] > 20
    assert found["differences"] == 1
    assert found["p_value"] > 0.01
    assert not found["lossless"]
    assert found["bounds"]["limit"] < 1.25
    assert wide(jumps=0.05, faults=0, below=5, prompts=500)["lossless"]


def test_one_gap_wider_than_the_targets_own_proves_nothing_and_many_do():
    """Three quarters: more than the half at which the target parts from itself, no more than what
    its movements could close. So few answers do not show in how many part."""
    few, many = wide(0.05, 1, 3, prompts=200), wide(0.05, 15, 3, prompts=200)
    assert few["bounds"]["widest"] == pytest.approx(JUMP)
    assert few["bounds"]["limit"] == pytest.approx(2 * JUMP)
    assert (few["wide"], few["differences"]) == (1, 0)
    assert few["lossless"]
    assert few["p_wide"] == pytest.approx(0.5)
    assert any(d["verdict"] == WIDE for d in few["examined"])
    assert (many["wide"], many["differences"]) == (15, 0)
    assert many["p_value"] > 0.001
    assert many["p_wide"] < 0.001
    assert not many["lossless"]
    assert many["detectable_wide_share"] <= 0.1


def test_the_noise_is_that_of_all_sets_of_prompts():
    """A set whose own answers part nowhere is judged by what the others showed."""
    target = Target(jumps=0.05)
    halves = [PROMPTS[:30], PROMPTS[30:]]
    noise_sample = NoiseSample()
    examiners = [Examiner(target, half, LIMITS[:30], 8, None, noise_sample) for half in halves]
    alone = answers(target)
    for examiner, part in zip(examiners, (alone[:30], alone[30:])):
        examiner.measure(part)
    own = Examiner(target, PROMPTS, LIMITS, 8)
    own.measure(alone)
    assert noise_sample.bounds() == own.noise_sample.bounds()
    assert noise_sample.bounds().answers == len(PROMPTS)
    # What was seen twice counts once.
    Examiner(target, halves[0], LIMITS[:30], 8, None, noise_sample).measure(alone[:30])
    assert noise_sample.bounds() == own.noise_sample.bounds()


def test_what_the_target_itself_writes_in_another_batch_is_no_fault():
    """A place that lies 1.5 off in one batch, and beside the likeliest in one of three."""

    class Batches(Target):
        def generate(self, prompts, *, max_tokens, **how):
            found = super().generate(prompts, max_tokens=max_tokens, **how)
            if max_tokens == 1 and len(prompts) == self.size:
                for completion in found.completions:
                    row = completion.logprobs[0]
                    row[self.token] = max(row.values())
            return found

    target = Batches(jumps=0.0)
    alone = answers(target)
    drafted = corrupted(target, alone, 5, at=TOKENS - 1, below=6)
    target.token = drafted[5].ids[-1]
    for target.size, fault in ((3, False), (4, True)):
        assert (target.size in BATCHES) is not fault
        found = Examiner(target, PROMPTS, LIMITS, 8).compare(alone, drafted)
        assert found["lossless"] is not fault
        assert found["examined"][-1]["gap"] == pytest.approx(1.5 if fault else 0.0)


def bounds(gaps: list[float], moves: list[tuple[float, float]]):
    return NoiseSample({(1,)}, dict(enumerate(gaps)), moves).bounds()


def test_bounds():
    """As on an H100 in bf16: one pass over the answers showed no noise, another batch did."""
    still = [(0.1, 0.0)] * 200
    assert bounds([0.375], still).limit == 0.375
    # Without noise there is no tie but of equals.
    assert bounds([], still).limit == bounds([], []).limit == 0.0
    assert bounds([], still).verdict(0.0) == TIE
    assert bounds([], still).verdict(1e-6) == NOT_LOSSLESS
    assert bounds([], still).verdict(None) == NOT_LOSSLESS
    # Narrow gaps count, and step by step those that they could close; wide ones do not.
    narrow = [(0.2, 0.3)] * 100
    assert bounds([0.25], narrow).limit == pytest.approx(0.6)
    assert bounds([0.25], [*narrow, (0.5, 0.4)]).limit == pytest.approx(0.8)
    assert bounds([0.25], [*narrow, (0.7, 4.0)]).limit == pytest.approx(0.6)
    assert bounds([0.25], [*narrow, (0.5, 0.4), (0.7, 1.0)]).limit == pytest.approx(2.0)
    found = bounds([0.25], narrow)
    assert [found.verdict(gap) for gap in (0.25, 0.26, 0.61)] == [TIE, WIDE, NOT_LOSSLESS]


@pytest.mark.parametrize("freedom", [3, 5])
def test_heavy_noise_is_not_called_a_fault(freedom):
    """Noise with heavy tails in steps of a sixteenth, eight times as many positions with a head as
    of the target alone."""
    rng = np.random.default_rng(freedom)

    def parted(gap: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """Gaps, computed anew, of what parts between two runs, and how all of them moved."""
        one, other, anew = (
            gap + np.round(rng.standard_t(freedom, gap.size) * 0.02 * 16) / 16 for _ in range(3)
        )
        moves = np.stack([np.minimum(one, other), abs(one - other)], axis=1)
        return abs(anew[one * other < 0]), list(map(tuple, moves.tolist()))

    for _ in range(10):
        gaps = np.round(rng.exponential(1.5, 90_000) * 16) / 16
        own, moves = parted(gaps[:10_000])
        found = bounds(own.tolist(), moves)
        drafted, _ = parted(gaps[10_000:])
        assert drafted.size > 5
        assert not (drafted > found.limit).any()
        assert found.limit < 8  # of 80,000 drafted positions, and heavy tails
