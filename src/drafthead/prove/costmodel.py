"""What speculation will gain at any k: step times and the acceptance curve, multiplied out.

Without a head a step takes ``plain`` seconds and yields one token. With one it takes
``fixed + k * slope``: the target checks k + 1 tokens instead of one and the head drafts k times.
It yields ``length(k) = 1 + p_1 + … + p_k`` tokens, ``p_i`` being the share of steps whose i-th
draft is accepted. Hence (Leviathan et al. 2023, section 3.3, with measured times in place of a
ratio c)

    speedup(k) = length(k) * plain / (fixed + k * slope)

``p_i`` itself depends on k: where a step ends decides where the next one begins, and text that
is easily drafted takes fewer steps the larger k is. So each k has a curve of its own,
``curves[k - 1]``, and a length.

At several requests at once a step may also read the prompt of a request that just came, and the
others wait for it. The fewer steps answers take, the more such requests there are in one: their
number is in proportion to ``length(k)``. So a step takes ``fixed + k * slope + waiting * length(k)
* requests``, with ``requests`` for each token that a step yields. What one of them adds,
``waiting``, is how much longer those steps of a timed pair take in which more wait (least squares
about each pair's own means). That is less for a second and third than for the first where what
costs is that a step reads a prompt at all, and as much where the prompts' tokens cost.

Step times depend on the requests at once, and by the prompts that are read on the length of the
answers, so each load has a fit of its own (slopes shared between loads would be surer, but are
wrong where memory-bound steps turn compute-bound or more experts are touched). The gain is of
decoding. A whole answer waits for its first token, ``first`` seconds, and then for n more:

    answer(k) = (first + n * plain) / (first_with_head + n / length(k) * step(k))

With another draft vocabulary each draft reads more or fewer rows of the head's LM head: ``slope``
moves by what a row costs, the acceptance by what the vocabulary leaves out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

TRUSTED_ERROR = 0.1
"""A fit whose median error out of sample is larger chooses no k: neighbouring k differ by less."""


Curves = Sequence[Sequence[float]]
"""Acceptance by position with 1, 2, … drafts a step."""
Load = tuple[int, int]
"""Requests at once, and tokens of each answer."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a decoding step at one concurrency."""

    concurrency: int
    plain: float
    """Target alone."""
    fixed: float
    """With the head, what does not grow with k."""
    slope: float
    """With the head, what each further draft token costs: drafting it and checking it."""
    row: float = 0.0
    """What a row of the draft vocabulary adds to the slope."""
    waiting: float = 0.0
    """With the head, what each request that waits for its first token adds to a step."""
    requests: float = 0.0
    """Such requests in a step, for each token that it yields."""

    def step(self, k: int, length: float, more_rows: int = 0) -> float:
        """Seconds of a step that drafts ``k`` tokens and yields ``length``, with so many more
        rows than measured."""
        decoding = self.fixed + k * (self.slope + more_rows * self.row)
        return decoding + self.waiting * self.requests * length

    def speedup(self, k: int, length: float, more_rows: int = 0) -> float:
        """Decoding speed with ``k`` drafts over without.

        Args:
            k: tokens drafted a step.
            length: tokens that such a step yields.
            more_rows: of the draft vocabulary than were measured; less than 0 is fewer.
        """
        return length * self.plain / self.step(k, length, more_rows)


@dataclass(frozen=True)
class Vocabularies:
    """What other draft vocabularies would cost and accept."""

    max_new_tokens: int
    """Of the answers that the curves are of."""
    rows: int
    """Size of the one that was measured."""
    row_s: dict[int, float]
    """Seconds that a row adds to a draft, by requests at once."""
    curves: Mapping[int, Curves]
    """By size, the acceptance with 1, 2, … drafts a step."""


def load(found: Mapping) -> Load:
    """That of a measured point, of a fit or of a whole bench, its headline's."""
    return found["concurrency"], found["max_new_tokens"]


def thinned(acceptance: Sequence[float], share: float) -> list[float]:
    """Acceptance if each draft that was right still could be drafted with probability ``share``.

    Position i needs all i drafts, hence ``share`` to the power i.
    """
    return [p * share ** (i + 1) for i, p in enumerate(acceptance)]


def lengths(curves: Curves) -> list[float]:
    """Tokens that a step with 1, 2, … drafts yields."""
    return [1 + sum(curve) for curve in curves]


def lengths_served(pairs: Sequence[dict], k: int) -> list[float]:
    """Tokens that a step with 1 … k drafts would yield, from what was served with k.

    Each pair of blocks is a text of its own, that takes as many steps as its own acceptance
    makes of it; all tokens over all steps is the length.

    Args:
        pairs: of a measured point, as :func:`drafthead.prove.pairing.pair` gives them.
        k: tokens drafted a step in them.
    """
    rows = [(p["drafts"], *p["accepted_by_position"]) for p in pairs if p["drafts"]]
    steps, *accepted = np.array(rows, dtype=float).T
    tokens = steps + sum(accepted)
    own = 1 + np.cumsum(accepted, axis=0) / steps  # [k, pairs]
    return [float(tokens.sum() / (tokens / own[n]).sum()) for n in range(k)]


def fit(concurrency: int, plain: float, steps: dict[int, float]) -> StepCost:
    """Fit a line through step times, each k's relative error counting the same.

    Args:
        concurrency: requests at once.
        plain: seconds of a step of the target alone.
        steps: seconds of a step for each k; with one k only, half of what it takes beyond a plain
            step cannot be told from the rest, so ``fixed`` is taken to be a plain step.
    """
    ks = np.array(sorted(steps), dtype=float)
    seconds = np.array([steps[int(k)] for k in ks])
    if len(ks) == 1:
        return StepCost(concurrency, plain, plain, float((seconds[0] - plain) / ks[0]))
    weighted = np.stack([1 / seconds, ks / seconds], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(weighted, np.ones(len(ks)), rcond=None)
    if slope < 0:  # noise: no step is shorter for a draft more
        fixed, slope = (1 / seconds).sum() / (1 / seconds**2).sum(), 0.0
    return StepCost(concurrency, plain, float(fixed), float(slope))


def model(cells: Sequence[dict]) -> StepCost:
    """What steps cost at one concurrency.

    Args:
        cells: measured points of different k at that concurrency, as
            :func:`drafthead.prove.pairing.summarize` gives them.
    """
    plain = float(np.median([cell["step_s"]["base"] for cell in cells]))
    concurrency = cells[0]["concurrency"]
    steps = {c["num_speculative_tokens"]: c["step_s"]["plain_steps"] * plain for c in cells}
    tokens = {c["num_speculative_tokens"]: c["accepted_length"] for c in cells}
    known = [(c, p["drafted_waiting"]) for c in cells for p in c["pairs"] if p["drafted_waiting"]]
    square = sum(found["square"] for _, found in known)
    if not square or len(steps) == 1:
        return fit(concurrency, plain, steps)
    waiting = max(0.0, sum(found["product"] for _, found in known) / square)
    requests = float(np.mean([found["requests"] / c["accepted_length"] for c, found in known]))
    calm = {k: seconds - waiting * requests * tokens[k] for k, seconds in steps.items()}
    if min(calm.values()) <= 0:  # noise: waiting is no more than the step
        return fit(concurrency, plain, steps)
    return replace(fit(concurrency, plain, calm), waiting=waiting, requests=requests)


def answer_speedup(cells: Sequence[dict], cost: StepCost, k: int, length: float) -> float:
    """Speed with ``k`` drafts over without for whole answers, their first tokens included.

    Args:
        cells: measured points at that concurrency, of whatever k: how long first tokens took.
        cost: of a step.
        k: tokens drafted a step.
        length: tokens that such a step yields.
    """
    pairs = [pair for cell in cells for pair in cell["pairs"]]
    base, drafted = (
        float(np.median([p[f"{which}_first_token_s"] for p in pairs]))
        for which in ("base", "drafted")
    )
    later = sum(p["base_tokens"] for p in pairs) / sum(p["base_answers"] for p in pairs) - 1
    return (base + later * cost.plain) / (drafted + later / length * cost.step(k, length))


def choose(cost: StepCost, tokens: Sequence[float], more_rows: int = 0) -> dict[int, float]:
    """Predicted decoding speedup for each k, best first, from the tokens that a step with
    1, 2, … drafts yields."""
    gains = {k: cost.speedup(k, length, more_rows) for k, length in enumerate(tokens, 1)}
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def by_vocabulary(cost: StepCost, others: Vocabularies) -> list[dict]:
    """For each draft vocabulary the k to serve and what it would gain."""
    found = []
    for size, curves in sorted(others.curves.items()):
        tokens = lengths(curves)
        gains = choose(cost, tokens, size - others.rows)
        k = next(iter(gains))
        found.append(
            {
                "draft_vocab_size": size,
                "best_num_speculative_tokens": k,
                "predicted_speedup": {str(n): gain for n, gain in sorted(gains.items())},
                "accepted_length": tokens[k - 1],
            }
        )
    return found


def median_error(fits: Sequence[dict], of: str = "relative_error") -> float | None:
    """Median over all points of all loads of the relative error, out of sample: of
    decoding, or (``answer_relative_error``) of whole answers."""
    errors = [abs(p[of]) for fit in fits for p in fit["points"] if p[of] is not None]
    return float(np.median(errors)) if errors else None


def analyse(
    cells: Sequence[dict],
    curves: Mapping[int, Curves],
    vocabularies: Vocabularies | None = None,
) -> list[dict]:
    """Fit every load of a measured grid and hold the model against it.

    The error is out of sample: each k is predicted from a fit without it (where at least two
    others remain), with the acceptance curves given, or that of the largest k served.

    Args:
        cells: greedy points of one grid, as :func:`drafthead.prove.pairing.summarize` gives them.
        curves: predicted acceptance in answers of so many tokens, where it is known.
        vocabularies: other draft vocabularies to judge.

    Returns:
        For each load: the fit, predicted and measured speedup for each k, of decoding and
        of whole answers, the relative errors, the k to serve, and that for other draft
        vocabularies.
    """
    found = []
    usable = [c for c in cells if c["step_s"]["plain_steps"]]
    for at in sorted({load(cell) for cell in usable}):
        own = {c["num_speculative_tokens"]: c for c in usable if load(c) == at}
        (concurrency, max_new_tokens), most = at, max(own)
        if len(known := curves.get(max_new_tokens, [])) >= most:
            tokens = lengths(known)
        else:
            tokens = lengths_served(own[most]["pairs"], most)
        cost = model(list(own.values()))
        points = []
        for k, cell in sorted(own.items()):
            rest = [c for j, c in own.items() if j != k]
            held_out = model(rest) if len(rest) >= 2 else None
            measured = cell["accepted_length"] / cell["step_s"]["plain_steps"]
            predicted = held_out.speedup(k, tokens[k - 1]) if held_out else None
            answer = answer_speedup(rest, held_out, k, tokens[k - 1]) if held_out else None
            points.append(
                {
                    "num_speculative_tokens": k,
                    "measured": measured,
                    "predicted_without_this_point": predicted,
                    "relative_error": predicted and predicted / measured - 1,
                    "fitted": cost.speedup(k, tokens[k - 1]),
                    "answer_measured": cell["speedup"],
                    "answer_predicted_without_this_point": answer,
                    "answer_relative_error": answer and answer / cell["speedup"] - 1,
                }
            )
        gains = choose(cost, tokens)
        judged: list[dict] = []
        if vocabularies:
            cost = replace(cost, row=vocabularies.row_s[concurrency])
            if vocabularies.max_new_tokens == max_new_tokens:
                judged = by_vocabulary(cost, vocabularies)
        found.append(
            {
                "concurrency": concurrency,
                "max_new_tokens": max_new_tokens,
                "plain_step_s": cost.plain,
                "fixed_s": cost.fixed,
                "per_draft_token_s": cost.slope,
                "per_waiting_s": cost.waiting,
                "accepted_length_by_k": tokens,
                "points": points,
                "median_relative_error": median_error([{"points": points}]),
                "predicted_speedup": {str(k): gain for k, gain in sorted(gains.items())},
                "best_num_speculative_tokens": next(iter(gains)),
                "per_row_s": cost.row or None,
                "by_vocabulary": judged,
            }
        )
    return found


def recommended_k(fits: Sequence[dict], at: Load) -> int | None:
    """The k to serve at a load. None unless two k were measured there, for with one alone a
    draft's cost cannot be told from a step's; and none from a fit that proved wrong."""
    for fit in fits:
        trusted = (fit["median_relative_error"] or 0.0) <= TRUSTED_ERROR
        if load(fit) == at and len(fit["points"]) > 1 and trusted:
            return fit["best_num_speculative_tokens"]
    return None
