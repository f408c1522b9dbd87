"""What an engine would write whose times are known: requests, so many at once, each place for
itself."""

import heapq

from drafthead.prove.engine import Completion, Generation


def serve(limits, concurrency, *, first_s, step_s, length=1.0):
    """Answer to their limits requests that wait ``first_s`` for their first token and then get
    ``length`` tokens a step, on average, of ``step_s``; both may be functions of the request's
    index. Token ids count from 0."""
    step_of = step_s if callable(step_s) else lambda i: step_s
    length_of = length if callable(length) else lambda i: length
    places, found = [0.0] * min(concurrency, len(limits)), []
    for i, limit in enumerate(limits):
        begin = heapq.heappop(places)
        outputs, written, due, at = [(begin + first_s, 1)], 1, 1.0, begin + first_s
        while written < limit:
            at, due = at + step_of(i), due + length_of(i)
            now = min(limit, int(due + 1e-9)) - written
            outputs.append((at, now))
            written += now
        found.append(Completion(list(range(limit)), "length", begin, outputs))
        heapq.heappush(places, at)
    return Generation(found, max(places))
