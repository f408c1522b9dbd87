"""Documents packed into one row, with blocks at random anchors.

Of a document with tokens x[0..L-1] and states for 0..L'-1, an anchor p is a supervised token whose
next one is supervised too. Its block sees the states before p; slot j of it stands at position
p + j and predicts x[p+1+j], whose teacher is the target's last state at p + j. A block ends to be
supervised at the first token that is not, or that is outside the draft vocabulary: when served, a
chain never gets beyond it.
"""

from collections import defaultdict
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from drafthead.ops.block_attention import Blocks
from drafthead.states import Sample
from drafthead.states.format import aux_layers, last_layer
from drafthead.states.tensor_layout import Place, joined


@dataclass(frozen=True)
class BlockBatch:
    """One packed row. N positions, B blocks of S slots, R supervised slots, U teacher rows; int is
    int64."""

    names: tuple[str, ...]
    """The conversations in it, for messages."""
    positions: Tensor
    """int [N]: index of each position in its document."""
    aux: Tensor
    """[N, A, Ht]: the target's auxiliary states."""
    anchors: Tensor
    """[B, H]: the embedding of each block's first token."""
    anchor_positions: Tensor
    """int [B]: where in its document each anchor is."""
    blocks: Blocks
    """What each block sees of the N positions."""
    slots: Tensor
    """int [R]: the supervised slots, as rows of the B * S queries, by their teacher rows."""
    slot_of: Tensor
    """int [B * S]: the inverse of `slots`, -1 for those that are not supervised."""
    previous: Tensor
    """int [R]: the target id of the token before the one that each slot predicts."""
    teacher_of: Tensor
    """int [R], not decreasing: the teacher row of each slot."""
    last: Tensor
    """[U, Ht]: the target's last hidden states that predicted the supervised tokens."""
    labels: Tensor
    """int [U]: those tokens as draft ids."""
    teacher_ends: tuple[int, ...]
    """How many slots have a teacher row below u, for u = 0 .. U; on the host."""

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(x.nbytes for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor))

    def map(self, change) -> "BlockBatch":
        """The batch with every tensor changed."""
        tensors = {
            f.name: change(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        blocks = self.blocks
        blocks = replace(blocks, start=change(blocks.start), end=change(blocks.end))
        return replace(self, blocks=blocks, **tensors)


@dataclass(frozen=True)
class BlockRow:
    """A packed row on the host, in one piece of memory: what `BlockBatch` holds under the same
    names, and beside it

    - what samples store (`states`, `scale`, `final`), [N, ...];
    - `rows`, int [U]: the positions whose last states are the teacher rows.
    """

    names: tuple[str, ...]
    memory: Tensor
    places: dict[str, Place]
    num_aux: int
    size: int
    causal: bool
    teacher_ends: tuple[int, ...]

    def batch(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BlockBatch:
        """The row on a device, in one transfer, with floating-point tensors in `dtype`, or as they
        are."""
        whole = self.memory.to(device, non_blocking=True)
        parts = {name: place.of(whole) for name, place in self.places.items()}
        stored: dict[str, Tensor] = {
            n: parts.pop(n) for n in ("states", "scale", "final") if n in parts
        }
        blocks = Blocks(parts.pop("start"), parts.pop("end"), self.size, self.causal)
        batch = BlockBatch(
            names=self.names,
            aux=aux_layers(stored, self.num_aux),
            last=last_layer(stored)[parts.pop("rows")],
            blocks=blocks,
            teacher_ends=self.teacher_ends,
            **parts,
        )
        return batch.map(lambda x: x.to(dtype) if dtype and x.is_floating_point() else x)


def pack_blocks(
    samples: list[Sample],
    size: int,
    share: float,
    to_draft: Tensor,
    tokens: int,
    embedding: Tensor,
    seed: tuple[int, ...],
    causal: bool = False,
    pinned: bool = False,
) -> BlockRow | None:
    """Pack samples with blocks of `size` slots; None if nothing in them is supervised.

    share: of a document's possible anchors, how many get a block, at least one. to_draft int [V]
    (see `batches.draft_ids`). embedding [V, H]: the target's, on the CPU. Of a document only the
    first `tokens` positions are used. seed: with the same one come the same anchors. pinned: into
    memory that a GPU copies from.
    """
    generator = np.random.default_rng(seed)
    stored: list[dict[str, Tensor]] = []
    index: dict[str, list[np.ndarray]] = defaultdict(list)
    begin = blocks = 0
    for sample in samples:
        length = min(len(sample.ids), len(sample.states) + 1, tokens + 1)
        x, supervised = sample.ids.numpy()[:length], sample.loss_mask.numpy()[:length]
        # How many tokens from each on can be learnt: up to the next that cannot.
        good = supervised & (to_draft.numpy()[x] >= 0)
        places = np.arange(length)
        run = np.minimum.accumulate(np.where(good, length, places)[::-1])[::-1] - places
        possible = np.flatnonzero(supervised[:-1] & (run[1:] > 0))
        possible = possible[possible >= 1]  # there is no context before the first token
        if not len(possible):
            continue
        count = max(1, round(share * len(possible)))
        anchors = np.sort(generator.choice(possible, count, replace=False))
        # One entry for each supervised slot: its block and its step in it.
        each = np.minimum(run[anchors + 1], size)
        block = np.repeat(np.arange(count), each)
        step = np.arange(each.sum()) - np.repeat(each.cumsum() - each, each)
        at = anchors[block] + step
        for name, array in {
            "positions": places[:-1],
            "anchor_positions": anchors,
            "anchor_ids": x[anchors],
            "start": np.full(count, begin, dtype=np.int32),
            "end": (begin + anchors).astype(np.int32),
            "slots": (blocks + block) * size + step,
            "teacher": begin + at,
            "previous": x[at].astype(np.int64),
            "label": x[at + 1],
        }.items():
            index[name].append(array)
        stored.append({name: tensor[: length - 1] for name, tensor in sample.stored.items()})
        begin, blocks = begin + length - 1, blocks + count
    if not stored:
        return None
    joint = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in index.items()}
    # By teacher row, so that a chunk of slots needs a run of teacher rows.
    order = torch.argsort(joint["teacher"], stable=True)
    slots = joint.pop("slots")[order]
    rows, teacher_of, counts = torch.unique_consecutive(
        joint.pop("teacher")[order], return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0)
    slot_of = torch.full((blocks * size,), -1)
    slot_of[slots] = torch.arange(len(slots))
    parts: dict[str, list[Tensor]] = {n: [s[n] for s in stored] for n in stored[0]}
    parts |= {
        "anchors": [embedding[joint.pop("anchor_ids").long()]],
        "slots": [slots],
        "slot_of": [slot_of],
        "previous": [joint.pop("previous")[order]],
        "teacher_of": [teacher_of],
        "rows": [rows],
        "labels": [to_draft[joint.pop("label")[order][ends - 1].long()]],
        **{name: [tensor] for name, tensor in joint.items()},
    }
    memory, where = joined(parts, pinned)
    names = tuple(s.conversation for s in samples)
    num_aux = samples[0].num_aux
    return BlockRow(names, memory, where, num_aux, size, causal, (0, *ends.tolist()))
