"""Drafting offline, exactly as the server would from the same states.

Serving at position i: the head's cache holds the keys of positions 0..i computed from the
target's states and the true next tokens. The first draft comes from there; each later one appends
a row made from the draft before it and the head's own state. What was rejected is overwritten by
true rows before the next draft, so chains from different positions do not touch each other, and
all positions can be drafted at once.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.errors import DraftheadError
from drafthead.head.model import Eagle3Head


class ChainAttention(Protocol):
    """Attention of one row of each of M chains, over the prefix and the chain's own rows."""

    def __call__(
        self,
        q: Tensor,
        rows: Tensor,
        k: Tensor,
        v: Tensor,
        own_k: list[Tensor],
        own_v: list[Tensor],
        window: int | None = None,
    ) -> Tensor:
        """q [M, heads, d], rows int [M], k and v [N, kv_heads, d] -> [M, heads, d].

        Query m sees the prefix keys 0..rows[m] and row m of each tensor [M, kv_heads, d] in
        `own_k`; with `window` of these the last `window` (more than there are tensors)."""
        ...


SCORE_BYTES = 128 << 20  # what the scores of one chunk of queries may take
LOGIT_BYTES = 128 << 20


def prefix_attention(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: list[Tensor],
    own_v: list[Tensor],
    window: int | None = None,
) -> Tensor:
    """The plain `ChainAttention`: float32 softmax, queries in chunks of bounded memory."""
    (m, heads, d), (n, kv_heads, _) = q.shape, k.shape
    q = q.float().view(m, kv_heads, heads // kv_heads, d) * d**-0.5
    k, v = k.float(), v.float()
    out = torch.empty_like(q)
    for part in torch.arange(m, device=q.device).split(max(1, SCORE_BYTES // (4 * heads * n))):
        scores = torch.einsum("mhgd,nhd->mhgn", q[part], k)
        keys = torch.arange(n, device=q.device)
        hidden = keys > rows[part, None]
        if window is not None:  # the chain's own rows come first, the prefix has the rest
            hidden |= keys <= rows[part, None] + len(own_k) - window
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        own = [torch.einsum("mhgd,mhd->mhg", q[part], x[part].float()) for x in own_k]
        weights = torch.cat([scores, *(s[..., None] for s in own)], dim=-1).softmax(dim=-1)
        mixed = torch.einsum("mhgn,nhd->mhgd", weights[..., :n], v)
        for s, x in enumerate(own_v):
            mixed += weights[..., n + s, None] * x[part].float()[:, :, None]
        out[part] = mixed
    return out.view(m, heads, d)


@torch.no_grad()
def draft_chain(
    head: Eagle3Head,
    embedding: Tensor,
    aux: Tensor,
    ids: Tensor,
    k: int,
    rows: Tensor | None = None,
    attend: ChainAttention = prefix_attention,
) -> Tensor:
    """Greedy chains of k drafts from many positions of one sequence at once.

    embedding [V, H]: the target's. aux [T', A, Ht]: the target's states at positions 0..T'-1.
    ids int [T]: the sequence. rows int [M]: the positions to draft from, all if None; position i
    is where ids[i + 1] is known and ids[i + 2] comes next. Returns target ids int64 [M, k]:
    entry [m, j] is the draft for ids[rows[m] + 2 + j].
    """
    drafts: list[Tensor] = []
    follow = (drafts[-1] for _ in range(k - 1))
    for decoded in decoded_chain(head, embedding, aux, ids, rows, follow, attend):
        drafts.append(greedy(head, decoded))
    return torch.stack(drafts, dim=1)


def true_tokens(ids: Tensor, rows: Tensor, k: int) -> Iterator[Tensor]:
    """What the drafts of positions 1..k - 1 would be if each were right: target ids int64 [M]. ids
    int [T] and rows int [M] as in `draft_chain`; beyond the end of ids its last one."""
    for step in range(k - 1):
        yield ids[(rows + 2 + step).clamp(max=len(ids) - 1).to(ids.device)].long()


@torch.no_grad()
def decoded_chain(
    head: Eagle3Head,
    embedding: Tensor,
    aux: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    follow: Iterable[Tensor],
    attend: ChainAttention = prefix_attention,
) -> Iterator[Tensor]:
    """What the layers of the head give at each draft position [M, H] (see `Eagle3Head.decode`).

    Arguments as in `draft_chain`. follow: target ids int64 [M] of the drafts at position 1, 2, …,
    each asked for once what it is drafted from was given out.
    """
    n = min(len(aux), len(ids) - 1)
    dtype, device = head.fc.weight.dtype, head.fc.weight.device
    positions = torch.arange(n, device=device)
    rows = positions if rows is None else rows.to(device)
    if n < 1 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n):
        raise DraftheadError(f"cannot draft from rows {rows.tolist()[:8]}: states of 0..{n - 1}")
    prefix: dict[int, tuple[Tensor, Tensor]] = {}
    own: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def first(layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prefix[layer], own[layer] = (key, value), ([], [])
        return attend(q, positions, key, value, [], [], head.config.window(layer)).to(dtype)

    def later(layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own[layer][0].append(key)
        own[layer][1].append(value)
        window = head.config.window(layer)
        return attend(q, rows, *prefix[layer], *own[layer], window).to(dtype)

    embeds = F.embedding(ids[1 : n + 1].to(embedding.device).long(), embedding)
    hidden = head.fuse(aux[:n].to(device, dtype))
    decoded = head.decode(embeds.to(device, dtype), hidden, positions, first)[rows]
    yield decoded
    for step, tokens in enumerate(follow, 1):
        embeds = F.embedding(tokens.to(embedding.device), embedding).to(device, dtype)
        decoded = head.decode(embeds, head.feedback(decoded), rows + step, later)
        yield decoded


def greedy(head: Eagle3Head, decoded: Tensor) -> Tensor:
    """decoded [M, H] (see `Eagle3Head.decode`) -> the likeliest target ids int64 [M]."""
    chunk = max(1, LOGIT_BYTES // (4 * head.config.draft_vocab_size))
    best = [head.logits(head.output(x)).argmax(dim=-1) for x in decoded.split(chunk)]
    return head.target_ids()[torch.cat(best)]
