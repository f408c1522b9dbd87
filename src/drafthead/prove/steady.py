"""Requests under steady load: which to give in, and which part of what came of them to count.

Users keep a server at one load: who is answered asks again. A list of requests has a beginning, in
which all prompts are read at once, and an end, in which places fall empty, and with a head they do
so one by one, for its answers differ in speed. Neither is the load that is asked about. So only a
window counts: from the first token of the last of the first requests, for then every place is at
its work, to the moment in which a place falls free and no request is left to take it.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafthead.prove.engine import Completion, Generation


def requests(
    prompts: Sequence[int], concurrency: int, max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """The list to give in for a block of prompts, so many at once.

    One at a time, it is the prompts. Otherwise the first ones are answered with limits that rise
    in even steps: places then fall free one by one, not all in the same step as if all users had
    come at the same moment. Whole answers follow, and at last the first prompts again, with what
    their limits were short of: so all places end at about the same time, and little of the time
    is outside the window. Together that is as many tokens as a whole answer to each prompt.

    Args:
        prompts: indices of prompts, ``concurrency`` at least.
        concurrency: requests at once.
        max_new_tokens: of a whole answer.

    Returns:
        For each request the index of its prompt, and the limit of its answer.
    """
    if concurrency == 1:
        return list(prompts), [max_new_tokens] * len(prompts)
    first, others = prompts[:concurrency], prompts[concurrency:]
    begun = [-(-max_new_tokens * i // concurrency) for i in range(1, concurrency + 1)]
    rest = [max_new_tokens - limit for limit in begun if limit < max_new_tokens]
    limits = [*begun, *[max_new_tokens] * len(others), *rest]
    return [*first, *others, *first[: len(rest)]], limits


@dataclass(frozen=True)
class Step:
    """From one output to the next, as requests meet it that are past their first token."""

    seconds: float
    requests: int
    """That met it: over HTTP each meets steps of its own."""
    tokens: int
    """That it brought them."""
    first: int
    """First tokens of other requests that came at its end."""
    waiting: int
    """Requests that waited for their first token at some time in it."""


@dataclass(frozen=True)
class Window:
    """What came while all places were taken."""

    seconds: float
    tokens: int
    answers: int
    """First tokens among them."""
    waiting_s: float
    """That requests spent before their first tokens, all together."""
    decoding_s: float
    """That they spent after. With ``waiting_s`` it makes ``seconds`` times the requests at once,
    but for the moments between an answer and the next request."""
    steps: list[Step]
    """In the order in which they ended."""

    @property
    def later_tokens(self) -> int:
        """Those that were decoded, not the first of an answer."""
        return self.tokens - self.answers


def window(generation: Generation, concurrency: int) -> Window:
    """The part of what came of :func:`requests` in which all places were taken. One request at a
    time is whole: the place is taken from asking to the end."""
    completions = generation.completions
    if concurrency == 1:
        begin, end = 0.0, generation.wall_s
    else:
        begin = max(c.first_token_at for c in completions[:concurrency])
        # Each that ends is followed by the next of the list, until none is left.
        end = sorted(c.end_at for c in completions)[len(completions) - concurrency]

    begun = sorted(c.begin_at for c in completions)
    answered = sorted(c.first_token_at for c in completions)
    first = Counter(answered)
    # By end and begin of a step, its tokens for each request that met it.
    met: dict[tuple[float, float], list[int]] = {}
    for c in completions:
        for (since, _), (until, n) in itertools.pairwise(c.outputs):
            if begin <= since and until <= end:
                met.setdefault((until, since), []).append(n)

    def within(since: float, until: float) -> float:
        return max(0.0, min(until, end) - max(since, begin))

    return Window(
        end - begin,
        sum(n for c in completions for at, n in c.outputs if begin < at <= end),
        sum(begin < c.first_token_at <= end for c in completions),
        sum(within(c.begin_at, c.first_token_at) for c in completions),
        sum(within(c.first_token_at, c.end_at) for c in completions),
        [
            Step(
                until - since,
                len(tokens),
                sum(tokens),
                first[until],
                bisect_left(begun, until) - bisect_right(answered, since),
            )
            for (until, since), tokens in sorted(met.items())
        ],
    )


def waiting(steps: Sequence[Step]) -> dict[str, float] | None:
    """What tells how much longer a step takes for each request that waits in it for its first
    token, JSON-able; each step counts as often as a request met it. None without a step.

    A prompt is read in one step, but an asynchronous engine starts that one before it hands out
    the last one's output, and so delays this: steps are known by who waits, not by whose first
    token comes.

    Returns:
        ``requests``, the mean number that wait in a step; ``square``, the sum of squared deviations
        from it; ``product``, that of their products with the deviations of the seconds.
    """
    if not steps:
        return None
    met = [step.requests for step in steps]
    count = np.array([step.waiting for step in steps], dtype=float)
    seconds = np.array([step.seconds for step in steps])
    off = count - np.average(count, weights=met)
    return {
        "requests": float(np.average(count, weights=met)),
        "square": float((met * off**2).sum()),
        "product": float((met * off * seconds).sum()),
    }


MOST_STEPS = 1024
"""Kept in a record of a pair's one side: 16 kB."""


def packed(steps: Sequence[Step]) -> str | None:
    """Steps for a record, with which another rule of what disturbs one can be tried: the five
    fields of each, seconds as whole microseconds. None for more than a record should hold."""
    if len(steps) > MOST_STEPS:
        return None
    rows = ((round(1e6 * s.seconds), s.requests, s.tokens, s.first, s.waiting) for s in steps)
    return " ".join(",".join(map(str, row)) for row in rows)


def unpacked(text: str) -> list[Step]:
    """What :func:`packed` wrote."""
    rows = (map(int, row.split(",")) for row in text.split())
    return [Step(microseconds / 1e6, *others) for microseconds, *others in rows]


def whole(generation: Generation, limits: Sequence[int], concurrency: int) -> list[Completion]:
    """Of what came of :func:`requests`, the answers that are whole and did not begin together."""
    skip = 0 if concurrency == 1 else concurrency
    both = zip(generation.completions[skip:], limits[skip:], strict=True)
    return [completion for completion, limit in both if limit == max(limits)]
