"""How far a target differs from itself: the noise that a gap between two tokens is compared with.

Used by :mod:`drafthead.prove.lossless`, whose docstring says what it is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

NOISE_MARGIN = 2.0
"""Times the largest gap_changes seen: of several times as many positions one will move further.
Simulated (Student's t with 3 and 5 degrees of freedom, 200,000 drafted positions, thrice 27,000 of
the target's own), a margin of 1 called noise a fault in one case of three and of six, a margin of 2
in 1 of 400."""
NARROWEST = 100
"""Positions at least whose movements are looked at, the narrowest ones."""

TIE, NOT_LOSSLESS = "tie within numeric noise", "not lossless"
WIDE = "tie wider than the target's own"


@dataclass(frozen=True)
class Noise:
    """The target alone compared with itself over a set of prompts."""

    answers: int
    """Answers that it was asked for once more."""
    concurrency: list[int]
    """How many of them at once, each time that it was."""
    parted: list[int]
    """Answers that came out otherwise than at first, each time."""
    parted_at_once: int
    """Answers with a position at which one pass over them chooses another token."""
    positions: int
    """Positions of answers that were computed by decoding and in one pass."""
    flips: int
    """Of them, those where the target chooses another token in one pass."""
    largest: float
    """Largest change of the gap between the two likeliest tokens, in log-probability."""


@dataclass(frozen=True)
class Bounds:
    """How far the target differs from itself, over all sets of prompts."""

    answers: int
    """Different answers of its own that were held against others of its own."""
    partings: int
    """Different places at which those parted."""
    widest: float
    """Widest gap at one of them."""
    limit: float
    """Widest gap that its movements could close; no less than ``widest``."""

    def verdict(self, gap: float | None) -> str:
        if gap is None or gap > self.limit:
            return NOT_LOSSLESS
        return TIE if gap <= self.widest else WIDE


@dataclass
class NoiseSample:
    """Differences between runs of the target alone, pooled over all sets of prompts."""

    asked: set[tuple] = field(default_factory=set)
    """Prompt and limit of each answer."""
    gaps: dict[tuple, float] = field(default_factory=dict)
    """Gap of each of its own partings, by what comes before and the other token."""
    moves: list[tuple[float, float]] = field(default_factory=list)
    """Of each position computed twice: the narrower of the gaps between the two tokens that were
    likeliest at first, and how far apart the two gaps are."""

    def add_difference(self, before: tuple[int, ...], token: int, gap: float) -> None:
        """Record a difference; of one seen before, keep the wider gap."""
        self.gaps[before, token] = max(gap, self.gaps.get((before, token), 0.0))

    def bounds(self) -> Bounds:
        limit = widest = max(self.gaps.values(), default=0.0)
        narrower, moved = np.array(self.moves or [(0.0, 0.0)]).T
        order = narrower.argsort()
        most = np.maximum.accumulate(moved[order])
        narrowest = min(NARROWEST, len(order))
        # Only gaps as narrow as what is to be closed count: where the target is sure of a token its
        # gap may move by a lot and nothing comes of it.
        while True:
            seen = max(narrowest, int(np.searchsorted(narrower[order], limit, side="right")))
            closed = NOISE_MARGIN * float(most[seen - 1])
            if closed <= limit:
                break
            limit = closed
        return Bounds(len(self.asked), len(self.gaps), widest, limit)


def gap_changes(top: dict[int, float], row: dict[int, float]) -> Iterator[tuple[float, float]]:
    """An entry of :attr:`NoiseSample.moves` from a position's log-probabilities computed twice;
    none if the two likeliest of ``top`` are not both in ``row``."""
    (one, p), (two, q) = sorted(top.items(), key=lambda item: -item[1])[:2]
    if one in row and two in row:
        gaps = p - q, row[one] - row[two]
        yield min(gaps), abs(gaps[0] - gaps[1])


def noise_words(verify: dict) -> list[str]:
    """For each set of prompts: how many answers differ with the head, how many by more than the
    target differs from itself, and how small a fault would have been found."""
    sentences = []
    for name in dict.fromkeys(r["workload"] for r in verify["runs"]):
        runs = [r for r in verify["runs"] if r["workload"] == name]
        differ = _span([r["prompts"] - r["identical"] for r in runs])
        words = f"{name}: {differ} of {runs[0]['prompts']} answers differ with the head"
        # Measured once for each set of prompts, whatever k, and only if an answer differs.
        noise, bounds = (
            next((r[key] for r in runs if r[key]), None) for key in ("noise", "bounds")
        )
        if noise and bounds:
            times, at_once = (
                " and ".join(map(str, noise[key])) for key in ("parted", "concurrency")
            )
            words += (
                f"; asked again, {at_once} at once, the target alone differs from itself in "
                f"{times} of {noise['answers']}, and in {noise['parted_at_once']} where its "
                f"answers are computed in one pass; {_span([r['wide'] for r in runs])} differ by "
                f"a wider gap than its own ({bounds['widest']:.2g} at most, in "
                f"{bounds['answers']} answers of all sets)"
            )
        small = "a fault within the noise" if noise else "a fault"
        words += f"; {_would_be_found(small, [r['detectable_share'] for r in runs])}"
        if bounds:
            wide = [r["detectable_wide_share"] for r in runs]
            words += f"; {_would_be_found('a fault with wider gaps', wide)}"
            words += f"; one with a gap above {bounds['limit']:.2g} is found in a single answer"
        sentences.append(f"{words}.")
    return sentences


def _span(counts: list[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least} to {most}" if least < most else f"{least}"


def _would_be_found(fault: str, shares: list[float | None]) -> str:
    """The share of changed answers from which on a fault would have been found."""
    detectable = [share for share in shares if share is not None]
    if len(detectable) < len(shares):
        return f"too few answers to find even {fault} that changes half of them"
    return f"{fault} that changes {max(detectable):.1%} of the answers is found nine times in ten"
