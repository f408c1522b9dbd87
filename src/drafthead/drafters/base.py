"""The interface of a kind of draft head: create, train, draft, save, load, serve.

`drafters.DRAFTERS` names the kinds. Training, walks, proof and report know only this interface.

Shapes: H head width, Ht target width, A aux layers, Vd draft vocabulary, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drafthead.head.formats import Format, Provenance
from drafthead.ops.graphs import Graphs
from drafthead.ops.losses import Teacher
from drafthead.recipe import HeadSection, Recipe, TrainSection
from drafthead.states import Sample
from drafthead.targets import Target


class Batch(Protocol):
    """A packed row on its device."""

    @property
    def tokens(self) -> int:
        """Positions in it."""

    @property
    def bytes(self) -> int:
        """What its tensors take."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""


class Row(Protocol):
    """A packed row on the host."""

    def batch(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The row on a device, its floating-point tensors in `dtype`, or as they are."""


@dataclass(frozen=True)
class TargetSide:
    """What of the target a head is trained and drafted with; on one device, in one type."""

    embedding: Tensor
    """[V, H], on the CPU in training: only the rows of a batch go to the device."""
    teacher: Teacher | None = None
    """For training."""
    lm_head: Tensor | None = None
    """[V, H]: for heads without an LM head of their own."""


class Trainer(Protocol):
    """Training of one head on packed rows."""

    steps: int
    """Drafted positions whose accuracy is told apart: T."""
    graphs: Graphs
    """What its steps are replayed by."""

    def pack(self, samples: list[Sample], number: int, pinned: bool) -> Row | None:
        """Pack row `number` of the plan; None if nothing in it is supervised."""

    def backward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate gradients of the loss summed over a row. Returns it, and for each drafted
        position how many predictions were right and how many there were: int64 [T]."""

    def supervised(self, batch: Any) -> int:
        """How many terms the summed loss of a row has: gradients are divided by it."""

    def operations(self, batch: Any) -> float:
        """Floating-point operations of a row, forward and backward."""


class Drafter(Protocol):
    """One kind of draft head."""

    kind: str
    """`head.kind` in the recipe, and vLLM's speculative method."""
    name: str
    """What people call it."""
    prefixes: bool
    """Whether k drafts are the first k of more."""

    def matches(self, raw: dict[str, Any]) -> bool:
        """Whether a `config.json` is of this kind."""

    def default_k(self, recipe: Recipe) -> Sequence[int]:
        """Numbers of drafts a step to prove and measure where the recipe names none."""

    def training_words(self, recipe: Recipe) -> str:
        """How a recipe trains such a head, as far as only this kind is trained so."""

    def new(
        self,
        section: HeadSection,
        target: Target,
        aux_layers: tuple[int, ...],
        d2t: Tensor,
        seed: int,
    ) -> nn.Module:
        """A head before its first step, float32. d2t int64 [Vd]: offsets of the vocabulary."""

    def shape(
        self, section: HeadSection, target: Target, aux_layers: tuple[int, ...], vocab: int
    ) -> Any:
        """The configuration of such a head with a draft vocabulary of `vocab` tokens.

        Raises:
            DraftheadError: the recipe's `head` section and the target do not fit together.
        """

    def read(self, folder: Path, target: Target | None = None) -> Any:
        """The configuration of the head in `folder`."""

    def trainer(
        self,
        head: Any,
        target: TargetSide,
        settings: TrainSection,
        k: int,
        rate: float,
    ) -> Trainer:
        """Training of `head`, which lies on its device in its type. k: drafts a step when served.
        rate: the device's operations per second."""

    def by_muon(self, name: str) -> bool:
        """Whether Muon steps the matrix of that name, rather than AdamW."""

    def draft(
        self, head: Any, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Tensor:
        """Greedy drafts from many positions of one sequence at once, as served.

        aux [T', A, Ht]: states at positions 0..T'-1. ids int [T]. rows int [M]: position i is where
        ids[i + 1] is known and ids[i + 2] comes next. Returns target ids int64 [M, k].
        """

    def true_path_logits(
        self, head: Any, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Iterator[Tensor]:
        """Draft logits [M, Vd] of positions 1..k, as `draft` has them where every draft before was
        the true token; beyond the end of `ids` they mean nothing."""

    def most_drafts(self, config: Any) -> float:
        """How many tokens a step a head of that configuration can draft at most."""

    def target_ids(self, head: Any) -> Tensor:
        """The target id of each draft id, ascending: int64 [Vd]."""

    def save(
        self,
        head: Any,
        folder: Path,
        provenance: Provenance,
        *,
        k: int,
        format: Format = "vllm",
        embedding: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Write `folder`, as vLLM or as speculators reads it. k: what speculators' format proposes.
        embedding [V, H] if the head has its own."""

    def speculative_config(self, folder: str, k: int, method: str) -> dict[str, Any]:
        """vLLM's ``speculative_config`` for k drafts a step with a head (folder or hub id). method:
        its `draft_sample_method`.

        Raises:
            DraftheadError: the head cannot draft so many.
        """

    def inspect(self, folder: Path, target: Target | None, deep: bool) -> dict[str, Any]:
        """What the head in `folder` is and what is wrong with it, JSON-able; never raises. Without
        `deep` no weights are read, as far as possible. See `drafters.inspect.inspect_head`."""

    def load(self, folder: Path, target: Target | None = None) -> tuple[Any, Tensor | None]:
        """The head in `folder` and its own embedding [V, H], if it has one."""


def architecture(raw: dict[str, Any]) -> str | None:
    """The class that a `config.json` names first, if it names one."""
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None
