"""Is what the drafted engine wrote what the target alone writes? Token for token, greedy.

In exact arithmetic it must be: a draft is kept only where it is the target's own choice. In bf16
two batches of other shapes round differently, so where the target's two likeliest tokens are as
close as that noise, either may come out. Such a place is told from a fault by measuring both: the
target's gap between the two tokens, computed anew by the target alone, and the noise of this
target on this machine: how far its own gaps move over the whole answers, from decoding them to
computing them in one pass. Most do not move at all and a few by a lot (logits in bf16 move in steps
of 1/16, and an expert chosen otherwise moves them by several), so a sample would miss the largest.
After a tie the comparison goes on, from the drafted token, so that a tie hides nothing that comes
later.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from drafthead.prove.engine import Completion, EngineProcess

TOP = 20
"""Likeliest tokens that vLLM gives log-probabilities of, by default at most."""
NOISE_MARGIN = 2.0
"""A flip needs a gap that the noise of both runs can close: that of the run without the head and
of the run with it."""
NOISE_ANSWERS = 256
"""Answers over which the noise is measured at most: tens of thousands of positions."""


@dataclass(frozen=True)
class Difference:
    """A position at which the two engines wrote different tokens."""

    prompt: int
    """Index into the prompts."""
    position: int
    """Index into the answer."""
    base_token: int | None
    """None: the target alone had ended there."""
    drafted_token: int | None
    gap: float | None
    """How far below the target's likeliest token the worse of the two lies, in log-probability;
    None if it is not among the likeliest 20, or one side had ended."""
    verdict: str
    """``tie within numeric noise`` or ``not lossless``."""

    @property
    def is_tie(self) -> bool:
        return self.verdict == TIE


TIE, NOT_LOSSLESS = "tie within numeric noise", "not lossless"


@dataclass(frozen=True)
class Noise:
    """How much the target's own log-probability gaps move with the shape of the computation."""

    positions: int
    """Positions of answers that were computed twice."""
    flips: int
    """Of them, those where the target alone chose another token the second time."""
    largest: float
    """Largest change of the gap between the two likeliest tokens, in log-probability."""

    @property
    def tolerance(self) -> float:
        return NOISE_MARGIN * self.largest


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which ``a`` and ``b`` differ (or one has ended), else None."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def measure_noise(
    base: EngineProcess,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    concurrency: int,
) -> Noise:
    """The numeric noise of a target: its answers decoded token by token, so many at once, and every
    position of them computed in one pass.

    These are the two ways in which a target meets a position when it is served with a head:
    speculation checks several tokens in one forward pass.
    """
    few = np.random.default_rng(0).permutation(len(prompts))[:NOISE_ANSWERS]
    asked = [prompts[i] for i in few]
    decoded = base.generate(
        asked,
        max_tokens=[max_tokens[i] for i in few],
        concurrency=concurrency,
        logprobs=TOP,
        prefix_cache=False,
    ).completions
    room = base.info["max_model_len"] - 1  # an engine that is given a sequence writes a token more
    whole = [[*p, *c.ids][:room] for p, c in zip(asked, decoded, strict=True)]
    at_once = base.score(whole, TOP)
    changes, flips = [], 0
    for prompt, completion, rows in zip(asked, decoded, at_once, strict=True):
        for token, top, row in zip(completion.ids, completion.logprobs, rows[len(prompt) :]):
            flips += row[token] < max(row.values())
            (first, p), (second, q) = sorted(top.items(), key=lambda item: -item[1])[:2]
            if first in row and second in row:
                changes.append(abs((p - q) - (row[first] - row[second])))
    return Noise(len(changes), flips, max(changes, default=0.0))


class Examiner:
    """Holds answers against those of the target alone, and tells ties from faults with it.

    Args:
        base: the target alone, alive.
        prompts: token ids of each prompt.
        max_tokens: the limit of each answer.
        concurrency: answers that were asked for at once.
    """

    def __init__(
        self,
        base: EngineProcess,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        concurrency: int,
    ):
        self.base, self.prompts, self.max_tokens = base, prompts, max_tokens
        self.concurrency = concurrency
        self.noise: Noise | None = None
        """Measured once it is needed."""

    def compare(
        self, base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]
    ) -> dict:
        """Compare an answer to each prompt by the target alone and with the head, and examine each
        that differs.

        Returns:
            ``prompts`` = ``identical`` + ``ties`` + ``differences`` (answers), ``lossless``,
            ``tokens`` compared, ``noise`` if it was needed, and ``examined``: each difference.
        """
        examined: list[Difference] = []
        identical = ties = differences = 0
        for i, (a, b) in enumerate(zip(base_answers, drafted_answers, strict=True)):
            found = self.examine(i, a, b)
            examined += found
            identical += not found
            ties += bool(found) and found[-1].is_tie
            differences += bool(found) and not found[-1].is_tie
        return {
            "lossless": differences == 0,
            "prompts": len(self.prompts),
            "identical": identical,
            "ties": ties,
            "differences": differences,
            "tokens": sum(len(answer.ids) for answer in drafted_answers),
            "noise": self.noise and asdict(self.noise),
            "examined": [asdict(difference) for difference in examined],
        }

    def examine(self, index: int, base: Completion, drafted: Completion) -> list[Difference]:
        """Every difference of one answer, each followed past if it is a tie.

        Args:
            index: which prompt.
            base: what the target alone wrote.
            drafted: what it wrote with the head.

        Returns:
            Empty if they are the same; the last one is the only one that may be no tie.
        """
        found: list[Difference] = []
        reference = base.ids
        while (at := first_difference(reference, drafted.ids)) is not None:
            difference = self._judge(index, at, reference, drafted.ids)
            found.append(difference)
            if not difference.is_tie:
                break
            done = drafted.ids[: at + 1]
            rest: list[int] = []
            max_tokens = self.max_tokens[index]
            stopped = drafted.finish_reason == "stop" and len(done) == len(drafted.ids)
            if len(done) < max_tokens and not stopped:
                resumed = self.base.generate(
                    [[*self.prompts[index], *done]],
                    max_tokens=max_tokens - len(done),
                    prefix_cache=False,
                )
                rest = resumed.completions[0].ids
            reference = done + rest
        return found

    def _judge(self, index: int, at: int, base: list[int], drafted: list[int]) -> Difference:
        if at >= len(base) or at >= len(drafted):
            a, b = (ids[at] if at < len(ids) else None for ids in (base, drafted))
            return Difference(index, at, a, b, gap=None, verdict=NOT_LOSSLESS)
        if self.noise is None:
            self.noise = measure_noise(self.base, self.prompts, self.max_tokens, self.concurrency)
        prefix = [*self.prompts[index], *drafted[:at]]
        anew = self.base.generate([prefix], max_tokens=1, logprobs=TOP, prefix_cache=False)
        row = anew.completions[0].logprobs[0]
        gap = None
        if base[at] in row and drafted[at] in row:
            gap = max(row.values()) - min(row[base[at]], row[drafted[at]])
        tie = gap is not None and gap <= self.noise.tolerance
        verdict = TIE if tie else NOT_LOSSLESS
        return Difference(index, at, base[at], drafted[at], gap, verdict)
