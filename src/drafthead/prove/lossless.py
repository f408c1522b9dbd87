"""Is what the drafted engine wrote what the target alone writes? Token for token, greedy.

In exact arithmetic it must be: a draft is kept only where it is the target's own choice. In bf16
two batches of other shapes round differently, so where the target's two likeliest tokens are as
close as that noise, either may come out. Such a place is told from a fault by holding the target
against itself: the same prompts again, in another order and with other numbers at once, and every
position of those answers computed in one pass, as speculation checks its drafts. It is one target
with one noise, so what this finds is pooled over all sets of prompts.

How wide is the gap between the two tokens, computed anew by the target alone?

- No wider than the target's own widest parting: a tie.
- Wider than its movements can close: a fault, in whatever single answer. Gaps that are so narrow,
  in one of two computations at least, are looked at; none moved by more than half as much. Such a
  place is computed anew in batches of several sizes, and is a fault only if it lies as far off in
  all of them: what a corrupted state writes does.
- Between the two, one answer proves nothing: of so many more the widest is likely to be theirs,
  noise or no noise. Several do: had the head changed nothing, any of all the answers, the target's
  own and those with the head, might as well have been the widest ones (an exact test).

How many answers part? A fault that stays within the noise shows as more of them than part of the
target's own (Fisher's exact test). For both tests it is stated what share of faulty answers they
would find.

After a tie the comparison goes on, from the drafted token, so that a tie hides nothing that comes
later.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from drafthead.prove.engine import Completion, EngineProcess
from drafthead.prove.numeric_noise import NOT_LOSSLESS, WIDE, Noise, NoiseSample, gap_changes
from drafthead.prove.stats import detectable_excess, more_often

TOP = 20
"""Likeliest tokens that vLLM gives log-probabilities of, by default at most."""
BATCHES = (1, 2, 3, 5, 8, 13, 21)
"""Sizes of the batches in which a place that looks like a fault is computed anew."""
NOISE_ANSWERS = 256
"""Answers of a set over which the noise is measured at most: tens of thousands of positions."""
ALPHA = 0.001
"""Chance that a set of answers is called too different without cause, by either test; each set is
tested."""
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
    """How far below the target's likeliest token the worse of the two lies, in log-probability (in
    the batch of ``BATCHES`` where it lies closest, if it looked like a fault); None if it is not
    among the likeliest 20, or one side had ended."""
    verdict: str
    """``TIE``, ``WIDE`` or ``NOT_LOSSLESS`` of :mod:`drafthead.prove.numeric_noise`."""

    @property
    def is_tie(self) -> bool:
        return self.verdict != NOT_LOSSLESS


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which ``a`` and ``b`` differ (or one has ended), else None."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def any_differ(base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]) -> bool:
    """Whether any answer is not the same on both sides."""
    return any(
        first_difference(a.ids, b.ids) is not None
        for a, b in zip(base_answers, drafted_answers, strict=True)
    )


def other_concurrencies(concurrency: int) -> list[int]:
    """How many at once where it must not be ``concurrency``."""
    if concurrency == 1:
        return [2, 4]
    return sorted({max(1, concurrency // 3), max(1, 2 * concurrency // 3)})


def ask_again(
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    concurrency: int,
    times: int = 2,
) -> list[dict[int, Completion]]:
    """Ask the target alone again, for as many answers as the noise is measured over: drawn and in
    an order by chance, each time another number than ``concurrency`` at once.

    Returns:
        For each of the first ``times`` of :func:`other_concurrencies` the answers, with
        log-probabilities, by the index of their prompt.
    """
    chosen = np.random.default_rng(0).permutation(len(prompts))[:NOISE_ANSWERS].tolist()
    rounds = []
    for at_once in other_concurrencies(concurrency)[:times]:
        completions = engine.generate(
            [prompts[i] for i in chosen],
            max_tokens=[max_tokens[i] for i in chosen],
            concurrency=at_once,
            logprobs=TOP,
        ).completions
        rounds.append(dict(zip(chosen, completions, strict=True)))
    return rounds


class Examiner:
    """Holds answers against those of the target alone, and tells ties from faults with it.

    Args:
        base: the target alone, alive.
        prompts: token ids of each prompt.
        max_tokens: the limit of each answer.
        concurrency: answers that were asked for at once.
        again: what :func:`ask_again` gave on an engine that differs from the drafted one only in
            having no head; None: ``base`` is such an engine, and is asked when it is needed.
        noise_sample: where differences are gathered, of all sets of prompts if they share it.
    """

    def __init__(
        self,
        base: EngineProcess,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        concurrency: int,
        again: list[dict[int, Completion]] | None = None,
        noise_sample: NoiseSample | None = None,
    ):
        self.base, self.prompts, self.max_tokens = base, prompts, max_tokens
        self.concurrency, self.again = concurrency, again
        self.noise_sample = noise_sample or NoiseSample()
        self.noise: Noise | None = None
        """Measured once it is needed."""

    def compare(
        self, base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]
    ) -> dict:
        """Compare an answer to each prompt by the target alone and with the head, and examine each
        that differs.

        Returns:
            ``prompts`` = ``identical`` + ``ties`` + ``differences`` (answers), ``lossless``,
            ``wide`` (ties with a gap wider than any of the target's own), ``tokens`` compared,
            ``noise`` and ``bounds`` if they were needed, ``p_value`` (of so many answers that part,
            if they part as often as the target's from themselves), ``p_wide`` (of so many that part
            so widely), ``detectable_share`` and ``detectable_wide_share`` (the smallest share of
            answers changed by a fault within the noise, or by one with wider gaps, that would be
            found nine times in ten; None: not even half), and ``examined``: each difference.
        """
        examined = self._examine(base_answers, drafted_answers)
        ties = sum(differences[-1].is_tie for differences in examined.values())
        wide = sum(any(d.verdict == WIDE for d in differences) for differences in examined.values())
        answers, parted = len(self.prompts), len(examined)
        noise, bounds = self.noise, self.noise_sample.bounds() if self.noise else None
        again = max(*noise.parted, noise.parted_at_once) if noise else 0
        asked = noise.answers if noise else 0
        pooled = bounds.answers if bounds else 0
        p_value = more_often(parted, answers, again, asked) if parted else 1.0
        p_wide = more_often(wide, answers, 0, pooled) if wide else 1.0
        return {
            "lossless": ties == parted and min(p_value, p_wide) >= ALPHA,
            "prompts": answers,
            "identical": answers - parted,
            "ties": ties,
            "wide": wide,
            "differences": parted - ties,
            "tokens": sum(len(answer.ids) for answer in drafted_answers),
            "noise": noise and asdict(noise),
            "bounds": bounds and asdict(bounds),
            "p_value": p_value,
            "p_wide": p_wide,
            "detectable_share": detectable_excess(answers, again, asked, alpha=ALPHA, power=POWER),
            "detectable_wide_share": detectable_excess(
                answers, 0, pooled, alpha=ALPHA, power=POWER
            ),
            "examined": [
                asdict(d) for _, differences in sorted(examined.items()) for d in differences
            ],
        }

    def _examine(
        self, base_answers: Sequence[Completion], drafted_answers: Sequence[Completion]
    ) -> dict[int, list[Difference]]:
        """For each prompt whose answers are not the same every difference, each followed past if
        it is a tie: the last one is the only one that may be no tie."""
        differences: dict[int, list[Difference]] = {}
        references = dict(enumerate(answer.ids for answer in base_answers))
        while places := self._first_differences(references, drafted_answers):
            self.measure(base_answers)
            bounds = self.noise_sample.bounds()
            ties = []
            for (i, at), gap in zip(
                places.items(), self._gaps(places, references, drafted_answers)
            ):
                a, b = (
                    ids[at] if at < len(ids) else None
                    for ids in (references[i], drafted_answers[i].ids)
                )
                if gap is not None and gap > bounds.limit:
                    gap = self._closest(i, at, references, drafted_answers)
                difference = Difference(i, at, a, b, gap, bounds.verdict(gap))
                differences.setdefault(i, []).append(difference)
                if difference.is_tie:
                    ties.append((i, at))
            references = self._resumed(ties, drafted_answers)
        return differences

    @staticmethod
    def _first_differences(
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
        rows = self._rows(
            [[*self.prompts[i], *answers[i].ids[:at]] for i, at in places.items()], self.concurrency
        )
        return [
            self._gap(row, references[i][at : at + 1] + answers[i].ids[at : at + 1])
            for (i, at), row in zip(places.items(), rows, strict=True)
        ]

    def _closest(
        self,
        i: int,
        at: int,
        references: dict[int, list[int]],
        answers: Sequence[Completion] | dict[int, Completion],
    ) -> float | None:
        """The narrowest gap at a place that the target alone has in batches of several sizes."""
        pair = references[i][at : at + 1] + answers[i].ids[at : at + 1]
        sequence = [*self.prompts[i], *answers[i].ids[:at]]
        gaps = [
            self._gap(row, pair)
            for size in BATCHES
            for row in self._rows([sequence] * size, concurrency=size)
        ]
        return min((gap for gap in gaps if gap is not None), default=None)

    def _rows(self, sequences: Sequence[list[int]], concurrency: int) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens that follow each sequence."""
        generation = self.base.generate(
            sequences, max_tokens=1, concurrency=concurrency, logprobs=TOP, prefix_cache=False
        )
        return [completion.logprobs[0] for completion in generation.completions]

    @staticmethod
    def _gap(row: dict[int, float], pair: Sequence[int]) -> float | None:
        """Of an answer that has ended there is no token: nothing is found for it."""
        logprobs = [row[token] for token in pair if token in row]
        return max(row.values()) - min(logprobs) if len(logprobs) == 2 else None

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

    def measure(self, base_answers: Sequence[Completion]) -> None:
        """Compare the target alone with itself, unless that was done."""
        if self.noise is not None:
            return
        rounds = self.again or ask_again(self.base, self.prompts, self.max_tokens, self.concurrency)
        decoded = rounds[0]
        if self.again is not None:  # one pass is held against decoding by the same engine
            (decoded,) = ask_again(
                self.base, self.prompts, self.max_tokens, self.concurrency, times=1
            )
        self.noise_sample.asked |= {(tuple(self.prompts[i]), self.max_tokens[i]) for i in decoded}
        parted = [self._differences_from_itself(base_answers, answers) for answers in rounds]
        # Also across the two engines: each may well repeat itself to the bit.
        computed = rounds if self.again is None else [*rounds, decoded]
        for one, other in combinations(computed, 2):
            for i, completion in one.items():
                # Up to where they part: after it nothing compares.
                end = first_difference(completion.ids, other[i].ids)
                both = zip(completion.logprobs, other[i].logprobs)
                for top, row in list(both)[: None if end is None else end + 1]:
                    self.noise_sample.moves += gap_changes(top, row)
        room = self.base.info["max_model_len"] - 1  # given a sequence it writes a token more
        scored = self.base.score(
            [[*self.prompts[i], *c.ids][:room] for i, c in decoded.items()], TOP
        )
        moves: list[tuple[float, float]] = []
        flips, parted_at_once = 0, 0
        for (i, completion), rows in zip(decoded.items(), scored, strict=True):
            prompt, before = self.prompts[i], flips
            for at, (token, top, row) in enumerate(
                zip(completion.ids, completion.logprobs, rows[len(prompt) :])
            ):
                best = max(row.values())
                first = min(t for t, p in row.items() if p == best)  # as argmax takes it
                if token != first:
                    flips += 1
                    place = (*prompt, *completion.ids[:at])
                    self.noise_sample.add_difference(place, first, best - row[token])
                moves += gap_changes(top, row)
            parted_at_once += flips > before
        self.noise_sample.moves += moves
        self.noise = Noise(
            answers=len(decoded),
            concurrency=other_concurrencies(self.concurrency),
            parted=parted,
            parted_at_once=parted_at_once,
            positions=len(moves),
            flips=flips,
            largest=max((moved for _, moved in moves), default=0.0),
        )

    def _differences_from_itself(
        self, base_answers: Sequence[Completion], again: dict[int, Completion]
    ) -> int:
        """Record the gaps at which the target's own answers differ; return how many answers do."""
        first = {i: base_answers[i].ids for i in again}
        places = self._first_differences(first, again)
        for (i, at), gap in zip(places.items(), self._gaps(places, first, again)):
            if gap is not None:
                ids = again[i].ids
                self.noise_sample.add_difference((*self.prompts[i], *ids[:at]), ids[at], gap)
        return len(places)
