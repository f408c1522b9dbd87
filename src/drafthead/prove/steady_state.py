"""Requests under steady load: which to give in, and which part of what came of them to count.

Users keep a server at one load: who is answered asks again. A list of requests has a beginning, in
which all prompts are read at once, and an end, in which places fall empty, and with a head they do
so one by one, for its answers differ in speed. Neither is the load that is asked about. So only a
window counts: from the first token of the last of the first requests, for then every place is at
its work, to the moment in which a place falls free and no request is left to take it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    rising = [-(-max_new_tokens * i // concurrency) for i in range(1, concurrency + 1)]
    rest = [max_new_tokens - limit for limit in rising if limit < max_new_tokens]
    limits = [*rising, *[max_new_tokens] * len(others), *rest]
    return [*first, *others, *first[: len(rest)]], limits


@dataclass(frozen=True)
class Window:
    """What came while all places were taken."""

    seconds: float
    tokens: int
    answers: int
    """First tokens among them."""
    decoding_s: float
    """That requests spent after their first tokens, all together."""

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

    def within(since: float, until: float) -> float:
        return max(0.0, min(until, end) - max(since, begin))

    return Window(
        end - begin,
        sum(n for c in completions for at, n in c.outputs if begin < at <= end),
        sum(begin < c.first_token_at <= end for c in completions),
        sum(within(c.first_token_at, c.end_at) for c in completions),
    )


def whole(generation: Generation, limits: Sequence[int], concurrency: int) -> list[Completion]:
    """Of what came of :func:`requests`, the answers that are whole and did not begin together."""
    skip = 0 if concurrency == 1 else concurrency
    both = zip(generation.completions[skip:], limits[skip:], strict=True)
    return [completion for completion, limit in both if limit == max(limits)]
