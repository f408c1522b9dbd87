"""Drafting one row at a time: what `drafthead.head.drafting.draft_chain` is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.head.model import Eagle3Head


@torch.no_grad()
def draft_at(
    head: Eagle3Head, embedding: Tensor, aux: Tensor, ids: Tensor, position: int, k: int
) -> Tensor:
    """The plain twin of `draft_chain` for one position: a prefill, then one row at a time.

    Same arguments; returns int64 [k]. A key-value cache grows as the server's does.
    """
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def attention(layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer in cache:
            key = torch.cat([cache[layer][0], key])
            value = torch.cat([cache[layer][1], value])
        cache[layer] = (key, value)
        causal = torch.ones(len(q), len(key), dtype=torch.bool).tril(len(key) - len(q))
        if window := head.config.window(layer):
            causal &= causal.triu(len(key) - len(q) - window + 1)
        q, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=causal, enable_gqa=True)
        return out[0].transpose(0, 1)

    seen = position + 1
    hidden = head.fuse(aux[:seen].to(head.fc.weight.dtype))
    embeds = embedding[ids[1 : seen + 1].long()].to(hidden.dtype)
    decoded = head.decode(embeds, hidden, torch.arange(seen), attention)[-1:]
    drafts = []
    for step in range(k):
        drafts.append(head.target_ids()[head.logits(head.output(decoded)).argmax(dim=-1)])
        if step < k - 1:
            embeds = embedding[drafts[-1]].to(hidden.dtype)
            at = torch.tensor([position + 1 + step])
            decoded = head.decode(embeds, head.feedback(decoded), at, attention)
    return torch.cat(drafts)
