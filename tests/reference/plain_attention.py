"""The attention of training by its definition: what `drafthead.ops.attention` is tested against."""

import torch
from torch import Tensor

from drafthead.ops.attention import Documents


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal_k: Tensor,
    diagonal_v: Tensor,
    documents: Documents,
    window: int | None = None,
) -> Tensor:
    """The definition, with one dense mask over all rows. Arguments as for `attention`."""
    n, heads, d = q.shape
    groups = heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    diagonal_k, diagonal_v = (x.repeat_interleave(groups, dim=2) for x in (diagonal_k, diagonal_v))
    seen = torch.zeros(n, k.shape[0], dtype=torch.bool, device=q.device)
    for rows, keys in documents.spans():
        a, b = rows.stop - rows.start, keys.stop - keys.start
        seen[rows, keys] = torch.ones(a, b, dtype=torch.bool, device=q.device).tril(b - a)
        if window is not None:
            seen[rows, keys] &= seen[rows, keys].triu(b - a - window + 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k).masked_fill(~seen, -torch.inf)
    own = torch.einsum("nhd,tnhd->hnt", q, diagonal_k)
    weights = (torch.cat([scores, own], dim=-1) * d**-0.5).softmax(-1)
    prefix, diagonal = weights.split([k.shape[0], own.shape[-1]], dim=-1)
    return torch.einsum("hnm,mhd->nhd", prefix, v) + torch.einsum(
        "hnt,tnhd->nhd", diagonal, diagonal_v
    )
