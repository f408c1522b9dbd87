"""Check every sample before it counts. Samples without usable states are left out; states that do
not explain the served tokens stop the work."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from drafthead.errors import DraftheadError
from drafthead.states import Sample, StoreMeta
from drafthead.states.format import gathered
from drafthead.targets import Target
from drafthead.targets.logits import PLAIN, LogitRule

MIN_AGREEMENT = 0.9
"""Below this share of greedy tokens that the states explain, they are not the served ones. Rounding
(bf16 logits, quantized kernels) moves single near-ties, not one token in ten."""
CHECKED = 512
"""Greedy tokens of a unit that are compared with the teacher's argmax, as far as it has so many:
more than chance could fail on, and of 256 answers no more work for a CPU (an LM head of 65,000 rows
of 2048) than the bytes of their states are."""
_POSITIONS_BLOCK = 4096
_VOCAB_BLOCK = 1024
"""Rows of the LM head widened at once: 8 MB at a width of 2048, which malloc keeps for the next.
Pieces of 32 MB it gives back, and the next one is touched for the first time again."""
_VALUES_BLOCK = 32
"""Positions whose values are looked at at once: few enough to stay in a core's cache."""


def teacher_argmax(
    last: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    lm_head: torch.Tensor,
    rule: LogitRule = PLAIN,
) -> torch.Tensor:
    """The target's most likely next token at each position, ``lm_head(final_norm(last))``. What
    ``rule`` does after that changes no order, and is left out.

    In fp32, on the device of ``last``, so many positions and a block of the vocabulary at a time
    that it takes less than 200 MB at a width of 2048.

    Args:
        last: [n, Ht], the stream before the final norm.
        norm: [Ht], weight of the final norm.
        eps: of that norm.
        lm_head: [V, Ht].
        rule: says what kind of norm it is.

    Returns:
        int64 [n].
    """
    norm = norm.to(last.device).float()
    best = torch.full((len(last),), -torch.inf, device=last.device)
    token = torch.zeros(len(last), dtype=torch.int64, device=last.device)
    for first in range(0, len(last), _POSITIONS_BLOCK):
        at = slice(first, first + _POSITIONS_BLOCK)
        hidden = rule.norm(last[at].float(), norm, eps)
        for start in range(0, len(lm_head), _VOCAB_BLOCK):
            rows = lm_head[start : start + _VOCAB_BLOCK].to(last.device).float()
            value, index = (hidden @ rows.T).max(-1)
            better = value > best[at]
            best[at] = torch.where(better, value, best[at])
            token[at] = torch.where(better, index + start, token[at])
    return token


NOT_FINITE = "the target's states are not finite"
ALL_ZERO = "the target's states are all zero at some position"
MISSING = "vLLM computed no states for a part"
FIXES = {
    NOT_FINITE: "Numbers overflow in the target: if engine.dtype is float16, set bfloat16 or "
    "float32; else look for NaN in its weights",
    ALL_ZERO: "A layer of the engine hands out nothing: let `drafthead doctor` look at it",
    MISSING: "Something else than the engine computed it: take KV connectors out of engine.extra, "
    "or set `enable_prefix_caching: false` there",
}
"""Reason why a sample's states are of no use -> what to do if it concerns many."""


def check_share(
    unusable: Mapping[str, Sequence[str]],
    conversations: int,
    share: float,
    labels: Mapping[str, str],
    *,
    more_to_come: bool,
) -> None:
    """Check that few enough samples have unusable states.

    Args:
        unusable: reason -> conversations.
        conversations: in all, usable or not.
        share: ``capture.max_unusable``.
        labels: of conversations, for the error.
        more_to_come: these are the first ones only: more of them may be unusable by chance.

    Raises:
        DraftheadError: above ``share``; one conversation is none too many, unless it is 0.
    """
    count = sum(map(len, unusable.values()))
    allowed = max(1.0, share * conversations) if share else 0.0
    if more_to_come:
        allowed += 3 * (share * conversations) ** 0.5
    if count > allowed:
        reason, names = max(unusable.items(), key=lambda item: len(item[1]))
        examples = "; ".join(labels.get(name, name) for name in names[:3])
        raise DraftheadError(
            f"capture.max_unusable is {share:g}, and {count} of {conversations} conversations have "
            f"unusable states: {reason} ({examples}). {FIXES[reason]}"
        )


class Checker:
    """Checks the samples of a unit on their way to the store.

    Args:
        target: whose final norm and LM head are the teacher.
        greedy: whether the answers are greedy, so that teacher and answer must agree.
        strict: whether unusable samples are left out and a failed comparison with the served
            tokens raises; else both are counted as ``faults``.
    """

    def __init__(self, target: Target, greedy: bool, strict: bool = True):
        self.greedy, self.strict = greedy, strict
        self._norm, self._eps = target.final_norm()
        self._lm_head, self._rule = target.lm_head(), target.logits

    def watch(
        self,
        samples: Iterable[tuple[str, Sample | None]],
        count: int,
        meta: StoreMeta,
        checks: dict[str, Any],
    ) -> Iterator[Sample]:
        """The usable ones of ``count`` samples, given with their conversations. After the last,
        ``checks`` holds ``samples``, ``tokens`` (of states), ``greedy_checked``, ``greedy_agree``,
        and ``left_out`` (reason -> conversations) if there are any.

        Raises:
            DraftheadError: the states are not those of the served tokens.
        """
        picked = []
        checks.update(samples=0, tokens=0, greedy_checked=0, greedy_agree=0)
        for conversation, sample in samples:
            fault = unusable(sample, meta)
            if fault and self.strict:
                checks.setdefault("left_out", {}).setdefault(fault, []).append(conversation)
                continue
            if fault:
                checks["faults"] = checks.get("faults", 0) + 1
            assert sample is not None
            picked.append(self.pick(sample, count))
            checks["samples"] += 1
            checks["tokens"] += len(sample.states)
            yield sample
        if not (self.greedy and picked):
            return
        try:
            self.agreement(picked, checks)
        except DraftheadError:
            if self.strict:
                raise
            checks["faults"] = checks.get("faults", 0) + 1

    def pick(self, sample: Sample, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher needs of one of ``count`` samples: last-layer states [n, Ht] at some
        positions, evenly spread, and the token int64 [n] that the target served after each."""
        at = _spread(sample, -(-CHECKED // count))
        return sample.map(lambda stored: gathered(stored, at)).last, sample.ids[at + 1].long()

    def agreement(
        self,
        picked: list[tuple[torch.Tensor, torch.Tensor]],
        checks: dict[str, Any] | None = None,
    ) -> None:
        """Compare greedily served tokens with the teacher's. ``checks`` gets how many there are and
        how many agree.

        Raises:
            DraftheadError: too few are.
        """
        last, served = (torch.cat(parts) for parts in zip(*picked))
        predicted = teacher_argmax(last, self._norm, self._eps, self._lm_head, self._rule)
        agree = int((predicted == served).sum())
        if checks is not None:
            checks.update(greedy_checked=len(predicted), greedy_agree=agree)
        check_agreement(agree, len(predicted))


def _spread(sample: Sample, most: int) -> torch.Tensor:
    """At most ``most`` positions, ascending, whose next token the target wrote; the last ones."""
    first, stop = sample.prompt_len - 1, min(len(sample.states), len(sample.ids) - 1)
    count = max(0, min(most, stop - first))
    return torch.linspace(first, max(first, stop - 1), count).round().long()


def check_agreement(agree: int, positions: int) -> None:
    """Check that the states explain the served tokens.

    Raises:
        DraftheadError: fewer of the greedily served tokens are the teacher's than ``MIN_AGREEMENT``
            lets expect, by more than three standard deviations: a near-tie in a unit's only answer,
            of three tokens, is no fault, and would come again with every try.
    """
    mean, variance = MIN_AGREEMENT * positions, MIN_AGREEMENT * (1 - MIN_AGREEMENT) * positions
    if agree < int(mean - 3 * variance**0.5):
        raise DraftheadError(
            f"captured states explain only {agree} of {positions} tokens that the target served "
            "greedily: final norm and LM head, applied to them, predict others. drafthead does not "
            "compute this target's logits as vLLM does: report it with the target's config.json. "
            "Nothing of this unit was kept"
        )


def unusable(sample: Sample | None, meta: StoreMeta) -> str | None:
    """Why a sample's states are of no use, as ``FIXES`` names it; None if every state is finite and
    none zero."""
    if sample is None:
        return MISSING
    rows = []  # (finite, zero) bool [T', layers]
    if sample.scale is not None:
        rows.append((sample.scale.isfinite(), _largest(sample.states) == 0))
    wide = sample.states if sample.scale is None else sample.final
    if wide is not None:
        largest = _largest(wide if wide.ndim == 3 else wide[:, None])
        rows.append((largest < _bits(torch.tensor(torch.inf, dtype=wide.dtype)), largest == 0))
    finite, zero = (torch.cat(parts, dim=1) for parts in zip(*rows))
    if meta.layers[0] == 0:
        zero[:, 0] = False  # what enters layer 0 is the embedding; a padding token's may be zero
    if not finite.all():
        return NOT_FINITE
    return ALL_ZERO if zero.any() else None


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Floating point as whole numbers that are in the order of the magnitudes; NaN's are above
    infinity's. Comparing them takes a seventh of the time that comparing bf16 takes on a CPU."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    return values.view(raw) & ((1 << (8 * values.dtype.itemsize - 1)) - 1)


def _largest(states: torch.Tensor) -> torch.Tensor:
    """[...]: the ``_bits`` of the largest magnitude of each row of ``states`` [..., Ht]."""
    return torch.cat([_bits(block).amax(-1) for block in states.split(_VALUES_BLOCK)])
