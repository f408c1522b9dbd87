"""Accepted drafts, counted as vLLM counts them: served, or walked over held-out answers."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any


@dataclass
class Acceptance:
    """Counts over some steps; in the lists draft position j is at index j - 1.

    A server's counters have the first three. ``known``, ``outside`` and ``past_end`` need the true
    tokens, which only a walk has (:func:`drafthead.train.evaluate.walk`).
    """

    drafts: int = 0
    """Steps that drafted."""
    draft_tokens: int = 0
    """Tokens drafted in them: k a step, less what a grammar or the end of the context cut off."""
    accepted: list[int] = field(default_factory=list)
    """Steps whose draft at this position was accepted, and so all before it."""
    known: list[int] = field(default_factory=list)
    """Steps whose drafts before this position were accepted and whose true token is known."""
    outside: list[int] = field(default_factory=list)
    """Of the known ones those that no draft could get right: the true token is outside the draft
    vocabulary."""
    past_end: list[int] = field(default_factory=list)
    """Steps whose chain was right up to the end of the answer and went on beyond it."""

    @classmethod
    def zeros(cls, k: int) -> "Acceptance":
        """A walk with ``k`` drafts a step before its first step."""
        return cls(0, 0, [0] * k, [0] * k, [0] * k, [0] * k)

    @classmethod
    def total(cls, parts: Iterable["Acceptance"]) -> "Acceptance":
        """The sum of several counts."""
        whole = cls()
        for part in parts:
            whole = whole._combined(part, 1)
        return whole

    def since(self, earlier: "Acceptance") -> "Acceptance":
        """Counts between ``earlier`` and now."""
        return self._combined(earlier, -1)

    def _combined(self, other: "Acceptance", sign: int) -> "Acceptance":
        def combine(a: Any, b: Any) -> Any:
            if isinstance(a, list):
                return [x + sign * y for x, y in zip_longest(a, b, fillvalue=0)]
            return a + sign * b

        return Acceptance(
            **{f.name: combine(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    @property
    def k(self) -> int:
        """Tokens drafted a step."""
        return len(self.accepted)

    @property
    def accepted_length(self) -> float | None:
        """Mean tokens of a step: 1 (the target's own) + accepted drafts; None without a step."""
        return 1 + sum(self.accepted) / self.drafts if self.drafts else None

    @property
    def by_position(self) -> list[float]:
        """Share of steps whose draft at position 1, 2, … was accepted (unconditional)."""
        return [n / self.drafts for n in self.accepted] if self.drafts else []

    @property
    def conditional(self) -> list[float]:
        """The same given that all drafts before were accepted (and the true token is known)."""
        reached = self.known or [self.drafts, *self.accepted][: self.k]
        return [n / m if m else 0.0 for n, m in zip(self.accepted, reached, strict=True)]

    def summary(self) -> dict:
        """JSON-able, of a walk: rates, and the counts that they come from."""
        return {
            "k": self.k,
            "steps": self.drafts,
            "accepted_length": self.accepted_length,
            "acceptance_by_position": self.by_position,
            "conditional_acceptance_by_position": self.conditional,
            "accepted": self.accepted,
            "outside_draft_vocabulary": self.outside,
            "past_end": self.past_end,
        }
