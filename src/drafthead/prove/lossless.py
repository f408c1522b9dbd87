"""Is what the drafted engine wrote what the target alone writes? Token for token, greedy.

In exact arithmetic it must be: a draft is kept only where it is the target's own choice. In bf16
two batches of other shapes round differently, so where the target's two likeliest tokens are as
close as that noise, either may come out. Such a place is told from a fault by holding the target
against itself, in two ways: the same prompts again, in another order and with another number at
once, and every position of those answers computed in one pass, as speculation checks its drafts.

- How wide is the gap between the two tokens, computed anew by the target alone? A tie is what is
  no wider than the target's own partings allow. What a corrupted state writes lies further off.
- How many answers part? A fault that stays within the noise shows as more partings than the target
  has with itself (Fisher's exact test; what share of faulty answers it would find is stated).

After a tie the comparison goes on, from the drafted token, so that a tie hides nothing that comes
later.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from drafthead.prove.engine import Completion, EngineProcess
from drafthead.prove.stats import detectable_excess, more_often

TOP = 20
"""Likeliest tokens that vLLM gives log-probabilities of, by default at most."""
NOISE_MARGIN = 2.0
"""A flip needs a gap that the noise of both runs can close: that of the run without the head and
of the run with it."""
PARTING_MARGIN = 3.0
"""Times the widest gap of the target's own partings. Noise whose tail falls off as an exponential
exceeds three times the widest of n partings with a chance of n**-3 for each parting."""
ENOUGH_PARTINGS = 20
"""With fewer the widest says little."""
NOISE_ANSWERS = 256
"""Answers over which the noise is measured at most: tens of thousands of positions."""
ALPHA = 0.001
"""Chance that a set of answers is called too different without cause; each set is tested."""
POWER = 0.9


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
    """The target alone held against itself."""

    answers: int
    """Answers that it was asked for once more."""
    concurrency: int
    """How many of them at once."""
    parted: int
    """Answers that came out otherwise the second time."""
    parted_at_once: int
    """Answers with a position at which one pass over them chooses another token."""
    positions: int
    """Positions of answers that were computed by decoding and in one pass."""
    flips: int
    """Of them, those where the target chooses another token in one pass."""
    largest: float
    """Largest change of the gap between the two likeliest tokens, in log-probability."""
    widest: float
    """Widest gap at which the target parted from itself, in either way."""

    @property
    def tolerance(self) -> float:
        """Widest gap of a tie: at least that at which the target parted from itself, since one pass
        over its answers may show no noise where other batches do. Where the target is sure of a
        token its gap may move by a lot and nothing comes of it, so its partings, if there are
        enough, say more than its movements."""
        most = max(NOISE_MARGIN * self.largest, self.widest)
        if self.parted + self.flips < ENOUGH_PARTINGS:
            return most
        return min(most, PARTING_MARGIN * self.widest)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which ``a`` and ``b`` differ (or one has ended), else None."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def other_concurrency(concurrency: int) -> int:
    """How many at once where it must not be ``concurrency``."""
    return max(1, concurrency // 3) if concurrency > 1 else 4


def once_more(
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    concurrency: int,
    logprobs: int | None = None,
) -> dict[int, Completion]:
    """Ask the target alone again, for as many answers as the noise is measured over: drawn and in
    an order by chance, another number than ``concurrency`` at once.

    Returns:
        The answers by the index of their prompt.
    """
    few = np.random.default_rng(0).permutation(len(prompts))[:NOISE_ANSWERS].tolist()
    completions = engine.generate(
        [prompts[i] for i in few],
        max_tokens=[max_tokens[i] for i in few],
        concurrency=other_concurrency(concurrency),
        logprobs=logprobs,
    ).completions
    return dict(zip(few, completions, strict=True))


class Examiner:
    """Holds answers against those of the target alone, and tells ties from faults with it.

    Args:
        base: the target alone, alive.
        prompts: token ids of each prompt.
        max_tokens: the limit of each answer.
        concurrency: answers that were asked for at once.
        again: what :func:`once_more` gave on an engine that differs from the drafted one only in
            having no head; None: ``base`` is such an engine, and is asked when it is needed.
    """

    def __init__(
        self,
        base: EngineProcess,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        concurrency: int,
        again: dict[int, Completion] | None = None,
    ):
        self.base, self.prompts, self.max_tokens = base, prompts, max_tokens
        self.concurrency, self.again = concurrency, again
        self.noise: Noise | None = None
        """Measured once it is needed."""

    def compare(
        self, base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]
    ) -> dict:
        """Compare an answer to each prompt by the target alone and with the head, and examine each
        that differs.

        Returns:
            ``prompts`` = ``identical`` + ``ties`` + ``differences`` (answers), ``lossless``,
            ``tokens`` compared, ``noise`` if it was needed, ``p_value`` (of so many answers that
            part, if they part as often as the target's from themselves), ``detectable_share`` (the
            smallest share of answers changed by a fault within the noise that would be found nine
            times in ten; None: not even half), and ``examined``: each difference.
        """
        found = self._examine(base_answers, drafted_answers)
        ties = sum(differences[-1].is_tie for differences in found.values())
        answers, parted = len(self.prompts), len(found)
        noise = self.noise
        again = max(noise.parted, noise.parted_at_once) if noise else 0
        asked = noise.answers if noise else 0
        p_value = more_often(parted, answers, again, asked) if parted else 1.0
        return {
            "lossless": ties == parted and p_value >= ALPHA,
            "prompts": answers,
            "identical": answers - parted,
            "ties": ties,
            "differences": parted - ties,
            "tokens": sum(len(answer.ids) for answer in drafted_answers),
            "noise": noise and asdict(noise),
            "p_value": p_value,
            "detectable_share": detectable_excess(answers, again, asked, alpha=ALPHA, power=POWER),
            "examined": [
                asdict(d) for _, differences in sorted(found.items()) for d in differences
            ],
        }

    def _examine(
        self, base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]
    ) -> dict[int, list[Difference]]:
        """For each prompt whose answers are not the same every difference, each followed past if
        it is a tie: the last one is the only one that may be no tie."""
        found: dict[int, list[Difference]] = {}
        references = dict(enumerate(answer.ids for answer in base_answers))
        while places := self._partings(references, drafted_answers):
            if self.noise is None:
                self.noise = self._measure(base_answers)
            ties = []
            for (i, at), gap in zip(
                places.items(), self._gaps(places, references, drafted_answers)
            ):
                a, b = (
                    ids[at] if at < len(ids) else None
                    for ids in (references[i], drafted_answers[i].ids)
                )
                tie = gap is not None and gap <= self.noise.tolerance
                verdict = TIE if tie else NOT_LOSSLESS
                found.setdefault(i, []).append(Difference(i, at, a, b, gap, verdict))
                if tie:
                    ties.append((i, at))
            references = self._resumed(ties, drafted_answers)
        return found

    @staticmethod
    def _partings(
        references: dict[int, list[int]], answers: Sequence[Completion] | dict[int, Completion]
    ) -> dict[int, int]:
        """Where each answer first departs from its reference, of those that do."""
        places = {i: first_difference(ids, answers[i].ids) for i, ids in references.items()}
        return {i: at for i, at in places.items() if at is not None}

    def _gaps(
        self,
        places: dict[int, int],
        references: dict[int, list[int]],
        answers: Sequence[Completion] | dict[int, Completion],
    ) -> list[float | None]:
        """The gap at each place (see :class:`Difference`), computed anew."""
        rows = self.base.generate(
            [[*self.prompts[i], *answers[i].ids[:at]] for i, at in places.items()],
            max_tokens=1,
            concurrency=self.concurrency,
            logprobs=TOP,
            prefix_cache=False,
        ).completions
        found: list[float | None] = []
        for (i, at), completion in zip(places.items(), rows, strict=True):
            row = completion.logprobs[0]
            # Of an answer that has ended there is no token: nothing is found for it.
            pair = [row.get(t) for ids in (references[i], answers[i].ids) for t in ids[at : at + 1]]
            known = [p for p in pair if p is not None]
            found.append(max(row.values()) - min(known) if len(known) == 2 else None)
        return found

    def _resumed(
        self, ties: Sequence[tuple[int, int]], answers: Sequence[Completion]
    ) -> dict[int, list[int]]:
        """What the target alone writes on from the drafted token of each tie."""
        done = {i: answers[i].ids[: at + 1] for i, at in ties}
        open_ = [
            i
            for i, ids in done.items()
            if len(ids) < self.max_tokens[i]
            and not (answers[i].finish_reason == "stop" and len(ids) == len(answers[i].ids))
        ]
        if open_:
            resumed = self.base.generate(
                [[*self.prompts[i], *done[i]] for i in open_],
                max_tokens=[self.max_tokens[i] - len(done[i]) for i in open_],
                concurrency=self.concurrency,
                prefix_cache=False,
            )
            for i, rest in zip(open_, resumed.completions, strict=True):
                done[i] = done[i] + rest.ids
        return done

    def _measure(self, base_answers: Sequence[Completion]) -> Noise:
        """Hold the target alone against itself."""
        decoded = once_more(self.base, self.prompts, self.max_tokens, self.concurrency, TOP)
        again = decoded if self.again is None else self.again
        first = {i: base_answers[i].ids for i in again}
        places = self._partings(first, again)
        widest = [gap for gap in self._gaps(places, first, again) if gap is not None]
        room = self.base.info["max_model_len"] - 1  # given a sequence it writes a token more
        scored = self.base.score(
            [[*self.prompts[i], *c.ids][:room] for i, c in decoded.items()], TOP
        )
        changes, flips, parted_at_once = [], 0, 0
        for (i, completion), rows in zip(decoded.items(), scored, strict=True):
            before = flips
            for token, top, row in zip(
                completion.ids, completion.logprobs, rows[len(self.prompts[i]) :]
            ):
                best = max(row.values())
                if token != min(t for t, p in row.items() if p == best):  # as argmax takes it
                    flips += 1
                    widest.append(best - row[token])
                (one, p), (two, q) = sorted(top.items(), key=lambda item: -item[1])[:2]
                if one in row and two in row:
                    changes.append(abs((p - q) - (row[one] - row[two])))
            parted_at_once += flips > before
        return Noise(
            answers=len(again),
            concurrency=other_concurrency(self.concurrency),
            parted=len(places),
            parted_at_once=parted_at_once,
            positions=len(changes),
            flips=flips,
            largest=max(changes, default=0.0),
            widest=max(widest, default=0.0),
        )
