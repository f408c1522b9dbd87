"""Held-out acceptance as it would be served.

A head's accuracy over all positions is not what a server sees: the server drafts only where the
last draft ended, and counts position 2 only if position 1 was right. So each held-out answer is
walked the way vLLM decodes it, and counted the way its counters count
(`vllm/v1/core/sched/scheduler.py`, `SpecDecodingStats`):

- The prefill yields the answer's first token, which no draft has a part in. If the answer ends
  there, no step follows.
- Every later step verifies k drafts, all counted as drafted, and ends with one token of the
  target's own. The count is of drafts, not of tokens delivered: a draft accepted together with
  the end of the answer still counts.
- What the target would have said after the end of the answer is not known here. A draft reaching
  there counts as a miss; `past_end` says how many did, so the engine's own counters lie between
  `acceptance` and that plus `past_end / steps`. Position 1 never reaches past the end.
- Not simulated: a prompt of which a single token is left to compute when it is admitted beside
  running requests. The scheduler pads it with k placeholder drafts and counts them as rejected.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from drafthead.drafters.base import Drafter, TargetSide
from drafthead.errors import DraftheadError
from drafthead.head.acceptance import Acceptance
from drafthead.states import Sample, Samples


def walk(chains: np.ndarray, answer: np.ndarray, drafted: np.ndarray) -> Acceptance:
    """Decode one answer as the server would.

    chains int [n - 1, k]: row c holds the drafts for answer[c + 1], answer[c + 2], …; answer
    int [n]; drafted bool [V]: the draft vocabulary (`t2d`).
    """
    n, k = len(answer), chains.shape[1]
    counts = Acceptance.zeros(k)
    current = 0  # the last token that is settled; the prefill settles the first
    while current < n - 1:
        counts.drafts += 1
        counts.draft_tokens += k
        j = 0
        while j < k:
            if current + 1 + j >= n:
                for beyond in range(j, k):
                    counts.past_end[beyond] += 1
                break
            truth = answer[current + 1 + j]
            counts.known[j] += 1
            if chains[current, j] != truth:
                counts.outside[j] += int(not drafted[truth])
                break
            counts.accepted[j] += 1
            j += 1
        current += j + 1
    return counts


def heldout(reader: Samples) -> list[int]:
    """The held-out samples that have a draft to be accepted: answers of two tokens or more.

    Raises:
        DraftheadError: there are none, and so no telling which head is the best.
    """
    usable = [i for i in reader.indices("heldout") if reader.tokens[i] - reader.prompt[i] > 1]
    if not usable:
        raise DraftheadError(
            f"{reader.path}: no held-out answer of two tokens or more; raise prompts.heldout and "
            "capture again"
        )
    return usable


def evaluate(
    drafter: Drafter,
    head: nn.Module,
    target: TargetSide,
    samples: Iterable[Sample],
    k: int | Sequence[int],
) -> list[Acceptance]:
    """Walk every sample, once for each k.

    target: its embedding lies where drafts are to be embedded. Raises `DraftheadError` if states
    are missing or no answer is long enough for one step.
    """
    ks = [k] if isinstance(k, int) else list(k)
    totals = [Acceptance.zeros(n) for n in ks]
    drafted = np.zeros(len(target.embedding), dtype=bool)
    drafted[drafter.target_ids(head).numpy(force=True)] = True
    for sample in samples:
        length, start = len(sample.ids), sample.prompt_len
        if start < 1 or len(sample.aux) < length - 1:
            raise DraftheadError(
                f"held-out conversation {sample.conversation}, {length} tokens: prompt_len "
                f"{start}, states of {len(sample.aux)} positions, {length - 1} needed; capture it "
                "again"
            )
        if length - start < 2 or not sample.loss_mask.any():  # of no use: capture said why
            continue
        rows = sample.ids.new_tensor(range(start - 1, length - 2)).long()
        answer = sample.ids[start:].numpy(force=True)
        draft = lambda n: drafter.draft(head, target, sample.aux, sample.ids, n, rows)  # noqa: B023
        longest = draft(max(ks)).numpy(force=True) if drafter.prefixes else None
        walks = [
            walk(draft(n).numpy(force=True) if longest is None else longest[:, :n], answer, drafted)
            for n in ks
        ]
        totals = [Acceptance.total(both) for both in zip(totals, walks, strict=True)]
    if not totals[0].drafts:
        raise DraftheadError(
            "held-out evaluation: no answer has two tokens or more", field="heldout"
        )
    return totals
