"""A packed row of an EAGLE-3 head's training-time test, on its device."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from drafthead.ops.attention import Documents


@dataclass(frozen=True)
class Batch:
    """One packed row. N positions, n of them live, M supervised tokens, T steps; int is int64."""

    names: tuple[str, ...]
    """The conversations in it, for messages."""
    embeds: Tensor
    """[N, H]: the embedding of the token after each position. Gathered on the host: a vocabulary's
    embedding takes half a gigabyte of a device's memory, a row of it 33 MB."""
    positions: Tensor
    """int [N]: index of each position in its document."""
    aux: Tensor
    """[N, A, Ht]: the target's auxiliary states."""
    live: Tensor
    """int [n]: the live positions, ascending."""
    live_of: Tensor
    """int [N]: which live position each is, -1 for the others (the inverse of `live`)."""
    documents: Documents
    """Documents by live positions (queries) and positions (keys)."""
    last: Tensor
    """[M, Ht]: the target's last hidden state that predicted each supervised token."""
    labels: Tensor
    """int [M]: the supervised tokens as draft ids, -1 outside the draft vocabulary."""
    student: Tensor
    """int [T, M]: the live position of each row; 0 where the token has no row at that step."""
    student_of: Tensor
    """int [T, n]: the supervised token of each live position at each step, -1 for none."""
    has_row: Tensor
    """bool [T, M]: False where the token has no row at that step (it stands too early)."""
    rows: int
    """How many rows there are: the sum of `has_row`, known on the host."""

    @property
    def tokens(self) -> int:
        """N: the positions that are packed."""
        return len(self.positions)

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(x.nbytes for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        tensors = {
            f.name: change(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        docs = self.documents
        docs = replace(docs, cu_q=change(docs.cu_q), cu_k=change(docs.cu_k))
        return replace(self, documents=docs, **tensors)
