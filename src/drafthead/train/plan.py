"""Which conversations go into which step: fixed by the data and the seed, whoever computes it."""

from dataclasses import dataclass

import numpy as np

from drafthead.errors import DraftheadError
from drafthead.fsio import fingerprint
from drafthead.states import Samples
from drafthead.train.batches import pack


def beyond(reader: Samples, tokens: int) -> float:
    """Share of the training answers' tokens that rows of `tokens` positions cut off: what comes so
    late in its conversation is not trained on."""
    train = reader.indices("train")
    ends, begins = reader.tokens[train], reader.prompt[train]
    lost = np.maximum(ends - np.maximum(begins, tokens + 2), 0).sum()
    return float(lost / max(1, (ends - begins).sum()))


@dataclass(frozen=True)
class Plan:
    """All packed rows of a run, in order. Step s takes rows s * rows_per_step and on."""

    rows: list[list[int]]
    """Indices into the store, row by row."""
    rows_per_step: int

    @classmethod
    def make(
        cls, reader: Samples, epochs: float, tokens: int, rows_per_step: int, seed: int
    ) -> "Plan":
        """Shuffle and pack each epoch by itself; a fraction of an epoch is its first rows.

        Raises:
            DraftheadError: not one full step, or one without a token to be trained on.
        """
        if beyond(reader, tokens) == 1.0:
            raise DraftheadError(
                f"{reader.path}: every training answer comes after the first {tokens:,} tokens of "
                "its conversation, where rows cut it off; raise train.row_tokens"
            )
        rows: list[list[int]] = []
        left, epoch = epochs, 0
        while left > 0:
            order = reader.order(seed=seed * 1_000_003 + epoch, split="train")
            packed = pack(reader.tokens - 2, order, tokens)
            rows += packed[: round(len(packed) * min(1.0, left))]
            left, epoch = left - 1, epoch + 1
        if len(rows) < rows_per_step:
            raise DraftheadError(
                f"{reader.path}: its training answers fill {len(rows)} rows of {tokens} tokens, a "
                f"step takes {rows_per_step}; generate more answers, lower train.row_tokens or "
                "train.rows_per_step, or start fewer processes"
            )
        return cls(rows, rows_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps; rows that do not fill one are left out."""
        return len(self.rows) // self.rows_per_step

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.rows, self.rows_per_step])

    def row_numbers(self, step: int, rank: int = 0, processes: int = 1) -> range:
        """The rows of a step that one of several processes takes: together all, each once."""
        first = step * self.rows_per_step
        return range(first + rank, first + self.rows_per_step, processes)
