"""Ties and faults told apart, with a target whose noise is known."""

import numpy as np
import pytest

from drafthead.prove.engine import Completion, Generation
from drafthead.prove.lossless import NOT_LOSSLESS, TIE, Examiner

VOCAB, TOKENS, JUMP = 12, 40, 0.5


class Target:
    """A target with bf16's habits: decoding and one pass agree to the bit at most positions; at a
    few, drawn from the prefix, the gaps are apart by ``JUMP``."""

    def __init__(self, jumps: float):
        self.jumps, self.measured = jumps, 0
        self.info = {"max_model_len": 1000}

    def row(self, prefix: tuple[int, ...], decoding: bool) -> dict[int, float]:
        rng = np.random.default_rng(prefix)
        logits = rng.permutation(VOCAB) / 4  # gaps of a quarter
        if rng.random() < self.jumps and decoding:
            logits[rng.integers(VOCAB)] += JUMP
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
