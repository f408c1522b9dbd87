"""A row's documents copied once, into one piece of memory that goes to the device as it is.

Threads do this beside the one that starts a GPU's kernels, and all of them share one interpreter:
so there are a few NumPy operations for a whole row, and a copy or two for each of its documents.
What is left to do with large tensors, decoding and picking, is done where the row goes.

Of a document with tokens x[0..L-1] and states for 0..L'-1, position i takes the embedding of
x[i+1+t] at step t and predicts x[i+2+t], whose teacher row is `last[i+1+t]`. Let p be the indices
of the supervised tokens (loss mask set, 2 <= p <= L'). Positions 0..p_last-2 are packed; what comes
after them is of no use to any row. Those from p_first-2-(T-1) on are *live*: only they run through
queries and MLP, the others are keys. Each step t < T and token p has one row, at position p-2-t.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafthead.drafters.eagle3.batch import Batch
from drafthead.ops.attention import Documents
from drafthead.states import Sample, buffer_pool
from drafthead.states.format import aux_layers, last_layer
from drafthead.states.tensor_layout import Place, lay_out


@dataclass(frozen=True)
class Row:
    """A packed row on the host. N, M as for `Batch`, D documents.

    In `memory`, uint8, lies what `Batch` has under the same names, `cu_q` and `cu_k` of its
    documents, and:

    - what samples store (`states`, `scale`, `final`), [N + D, ...]: the packed positions, and
      behind them of each document the next one, which predicted its last supervised token;
    - `teacher`, int [M]: which of these predicted each supervised token.
    """

    names: tuple[str, ...]
    memory: Tensor
    places: dict[str, Place]
    num_aux: int
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    rows: int

    def batch(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The row on a device, in one transfer, with floating-point tensors in `dtype`, or as they
        are. From pinned memory a GPU does all of it in its own time."""
        whole = self.memory.to(device, non_blocking=True)
        parts = {name: place.of(whole) for name, place in self.places.items()}
        stored: dict[str, Tensor] = {
            name: parts.pop(name) for name in ("states", "scale", "final") if name in parts
        }
        packed = {name: tensor[: sum(self.k_lengths)] for name, tensor in stored.items()}
        lengths = self.q_lengths, self.k_lengths, parts.pop("cu_q"), parts.pop("cu_k")
        batch = Batch(
            names=self.names,
            aux=aux_layers(packed, self.num_aux),
            documents=Documents(*lengths),
            last=last_layer(stored)[parts.pop("teacher")],
            rows=self.rows,
            **parts,
        )
        return batch.map(lambda x: x.to(dtype) if dtype and x.is_floating_point() else x)


def pack_row(
    samples: list[Sample],
    steps: int,
    to_draft: Tensor,
    tokens: int,
    embedding: Tensor,
    pinned: bool = False,
) -> Row | None:
    """Pack samples for `steps` of training-time test; None if nothing in them is supervised.

    to_draft int [V] (see `draft_ids`). embedding [V, H]: the target's, on the CPU. Of a document
    only the first `tokens` positions are used. pinned: into memory that a GPU copies from.
    """
    lengths = [min(len(s.ids), len(s.states) + 1, tokens + 2) for s in samples]
    ids = np.concatenate([s.ids.numpy()[:length] for s, length in zip(samples, lengths)])
    mask = np.concatenate([s.loss_mask.numpy()[:length] for s, length in zip(samples, lengths)])
    drafts = to_draft.numpy()[ids]  # raises for an id that there is not, as `take` below does not
    at, used, p, each = _supervised(mask, np.array(lengths))
    if not len(at):
        return None
    last = np.cumsum(each) - 1
    count = p[last] - 1
    width = np.minimum(count, count + 1 + steps - p[last - each + 1])
    index = _indices(p, each, count, width, steps) | {"labels": drafts[at]}
    ends = np.cumsum(count)
    first = (np.cumsum(lengths) - lengths)[used]
    after = ids[np.repeat(first + 1 - (ends - count), count) + np.arange(ends[-1])]

    stored, positions = [samples[d].stored for d in used], len(after)
    shapes = {n: (t.dtype, (positions + len(used), *t.shape[1:])) for n, t in stored[0].items()}
    shapes["embeds"] = embedding.dtype, (positions, *embedding.shape[1:])
    shapes |= {name: (torch.from_numpy(a).dtype, a.shape) for name, a in index.items()}
    places, size = lay_out(shapes)
    if pinned:
        whole = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    else:
        whole = buffer_pool.empty([size], torch.uint8)
    out = whole.numpy()
    room = {name: out[place.begin : place.end] for name, place in places.items()}

    for name in stored[0]:
        rows = room[name].reshape(positions + len(used), -1)
        for d, (tensors, end, n) in enumerate(zip(stored, ends.tolist(), count.tolist())):
            source = _bytes(tensors[name])
            rows[end - n : end] = source[:n]
            rows[positions + d] = source[n]
    _bytes(embedding).take(after, 0, room["embeds"].reshape(positions, -1), "clip")
    for name, array in index.items():
        room[name][:] = array.reshape(-1).view(np.uint8)
    return Row(
        names=tuple(samples[d].conversation for d in used),
        memory=whole,
        places=places,
        num_aux=samples[0].num_aux,
        q_lengths=tuple(width.tolist()),
        k_lengths=tuple(count.tolist()),
        rows=int(np.count_nonzero(index["has_row"])),
    )


def _supervised(
    mask: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of documents one behind the other, mask bool [sum of lengths]: where supervised tokens are
    [M], which documents have some [D], where in its document each is [M], how many each has [D]."""
    at = np.flatnonzero(mask)
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, at, side="right")
    p = at - (ends - lengths)[document]
    late = p >= 2
    used, each = np.unique(document[late], return_counts=True)
    return at[late], used, p[late], each


def _indices(
    p: np.ndarray, each: np.ndarray, count: np.ndarray, width: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """All that a row says of places: p int [M], where in its document each supervised token is;
    each, count, width int [D]: how many of these, of positions and of live ones a document has."""
    k_end, q_end = np.cumsum(count), np.cumsum(width)
    k_start, last = k_end - count, np.cumsum(each) - 1
    positions = np.arange(k_end[-1])
    live = np.arange(q_end[-1]) + np.repeat(k_end - q_end, width)
    live_of = np.full(len(positions), -1)
    live_of[live] = np.arange(len(live))
    teacher = p - 1 + np.repeat(k_start, each)
    teacher[last] = len(positions) + np.arange(len(each))
    student = p - 2 - np.arange(steps)[:, None]
    has_row = student >= 0
    student += np.repeat(q_end - count, each)
    student_of = np.full((steps, len(live)), -1)
    step, token = np.nonzero(has_row)
    student_of[step, student[step, token]] = token
    return {
        "positions": positions - np.repeat(k_start, count),
        "live": live,
        "live_of": live_of,
        "student": student * has_row,
        "student_of": student_of,
        "has_row": has_row,
        "teacher": teacher,
        "cu_q": np.concatenate([[0], q_end]).astype(np.int32),
        "cu_k": np.concatenate([[0], k_end]).astype(np.int32),
    }


def _bytes(x: Tensor) -> np.ndarray:
    """x [n, ...], on the CPU, as uint8 [n, b]: NumPy has not all of PyTorch's types."""
    return x.view(torch.uint8).numpy().reshape(len(x), -1)
