"""Which conversations go into which step: fixed by the data and the seed, whoever computes it."""

from dataclasses import dataclass

from drafthead.errors import DraftheadError
from drafthead.fsio import fingerprint
from drafthead.states import Samples
from drafthead.train.batches import pack


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
            DraftheadError: not one full step.
        """
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
                f"step takes {rows_per_step}; generate more answers, or lower train.row_tokens or "
                "train.rows_per_step"
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
