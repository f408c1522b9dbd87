"""Packing done plainly, document by document: what `eagle3/packing.py` is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.drafters.eagle3.batch import Batch
from drafthead.ops.attention import Documents
from drafthead.states import Sample


def plain_row(
    samples: list[Sample], steps: int, to_draft: Tensor, tokens: int, embedding: Tensor
) -> Batch | None:
    """Pack samples for `steps` of training-time test; None if nothing in them is supervised.

    to_draft int [V] (see `draft_ids`). embedding [V, H]: the target's, on the CPU. Of a document
    only the first `tokens` positions are used.
    """
    names, next_ids, positions, aux, last, labels = [], [], [], [], [], []
    live, student, q_lengths, k_lengths = [], [], [], []
    start = first_live = 0
    for sample in samples:
        known = min(len(sample.ids) - 1, len(sample.last), tokens + 1)
        supervised = sample.loss_mask[: known + 1].nonzero()[:, 0]
        supervised = supervised[supervised >= 2]
        if not len(supervised):
            continue
        count = int(supervised[-1]) - 1
        begin = max(0, int(supervised[0]) - 1 - steps)
        names.append(sample.conversation)
        next_ids.append(sample.ids[1 : count + 1].long())
        positions.append(torch.arange(count))
        aux.append(sample.aux[:count])
        last.append(sample.last[supervised - 1])
        labels.append(to_draft[sample.ids[supervised].long()])
        live.append(torch.arange(start + begin, start + count))
        at = supervised - 2 - torch.arange(steps)[:, None]
        student.append(torch.where(at >= 0, at - begin + first_live, -1))
        q_lengths.append(count - begin)
        k_lengths.append(count)
        start, first_live = start + count, first_live + count - begin
    if not names:
        return None
    rows = torch.cat(student, dim=1)
    live_rows, total = torch.cat(live), rows.shape[1]
    live_of = torch.full((start,), -1)
    live_of[live_rows] = torch.arange(len(live_rows))
    student_of = torch.full((steps, len(live_rows) + 1), -1)  # the last column takes the -1
    student_of.scatter_(1, rows % (len(live_rows) + 1), torch.arange(total).expand(steps, -1))
    return Batch(
        names=tuple(names),
        embeds=F.embedding(torch.cat(next_ids), embedding),
        positions=torch.cat(positions),
        aux=torch.cat(aux),
        live=live_rows,
        live_of=live_of,
        documents=Documents.of(q_lengths, k_lengths),
        last=torch.cat(last),
        labels=torch.cat(labels),
        student=rows.clamp(min=0),
        student_of=student_of[:, :-1],
        has_row=rows >= 0,
        rows=int((rows >= 0).sum()),
    )
