"""Drafting offline, exactly as the server would from the same states.

Serving with anchor p, the last token known: the head's cache holds keys and values of the target's
states at positions 0 .. p - 1. k queries, the anchor and k - 1 masks, go through the head at once.
Their base logits are fixed then; what the Markov head adds follows the drafts from left to right.
No block leaves anything behind for the next one, so blocks of all anchors can be drafted at once.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from drafthead.drafters.dspark.model import DSparkHead
from drafthead.errors import DraftheadError
from drafthead.head.drafting import true_tokens
from drafthead.ops.block_attention import Blocks, block_attention

LOGIT_BYTES = 128 << 20  # what the logits of one chunk of blocks may take


@torch.no_grad()
def draft_blocks(
    head: DSparkHead,
    embedding: Tensor,
    aux: Tensor,
    ids: Tensor,
    k: int,
    rows: Tensor | None = None,
    lm_head: Tensor | None = None,
) -> Tensor:
    """Greedy drafts of k tokens from many anchors of one sequence at once.

    embedding [V, H]: the target's. aux [T', A, Ht]: the target's states at positions 0..T'-1. ids
    int [T]: the sequence. rows int [M], ascending: the anchor of row i is position i + 1, all if
    None. lm_head [V, H]: the target's, for a head without. Returns target ids int64 [M, k]: entry
    [m, j] is the draft for ids[rows[m] + 2 + j].

    Raises:
        DraftheadError: k is more than the head's block, or a row has no states.
    """
    normed, first = _block_states(head, embedding, aux, ids, k, rows)
    chunk = max(1, LOGIT_BYTES // (4 * k * head.config.draft_vocab_size))
    parts = zip(normed.split(chunk), first.split(chunk))
    drafts = [_chain(head, states, previous, lm_head) for states, previous in parts]
    return torch.cat(drafts) if drafts else first.new_empty(0, k)


@torch.no_grad()
def told_blocks(
    head: DSparkHead,
    embedding: Tensor,
    aux: Tensor,
    ids: Tensor,
    k: int,
    rows: Tensor,
    lm_head: Tensor | None = None,
) -> Iterator[Tensor]:
    """Draft logits [M, Vd] of positions 1..k, where every draft before was the true token; beyond
    the end of ids its last one. Arguments as in `draft_blocks`."""
    normed, anchors = _block_states(head, embedding, aux, ids, k, rows)
    for step, previous in enumerate(itertools.chain([anchors], true_tokens(ids, rows, k))):
        bias = head.markov_head(previous.to(anchors.device))
        yield head.logits(normed[:, step], lm_head) + bias


def _block_states(
    head: DSparkHead, embedding: Tensor, aux: Tensor, ids: Tensor, k: int, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the LM head reads [M, k, H], and the anchors int64 [M]. Arguments as in
    `draft_blocks`."""
    config, device, dtype = head.config, head.fc.weight.device, head.fc.weight.dtype
    if k > config.block_size:
        raise DraftheadError(
            f"{k} drafts a step: the head was trained for blocks of {config.block_size} at most",
        )
    n = min(len(aux), len(ids) - 1)
    rows = torch.arange(n, device=device) if rows is None else rows.to(device)
    if n < 1 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n):
        raise DraftheadError(f"cannot draft from rows {rows.tolist()[:8]}: states of 0..{n - 1}")
    anchors = rows + 1
    positions = torch.arange(n, device=device)
    context = head.context(aux[:n].to(device, dtype), head.rotary(positions, dtype))
    own = (anchors[:, None] + torch.arange(k, device=device)).flatten()
    own = own.clamp(max=config.max_position_embeddings - 1)  # as vLLM clamps them
    end = anchors.int()
    blocks = Blocks(torch.zeros_like(end), end, k, config.causal)

    def attend(layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_attention(q, *context[layer], key, value, blocks).to(dtype)

    tokens = ids.new_full((len(rows), k), config.mask_token_id)
    tokens[:, 0] = ids.to(tokens.device)[anchors.to(tokens.device)]
    x = F.embedding(tokens.flatten().to(embedding.device).long(), embedding).to(device, dtype)
    normed = head.decode(x, head.rotary(own, dtype), attend).unflatten(0, (-1, k))
    return normed, tokens[:, 0].to(device).long()


def _chain(head: DSparkHead, normed: Tensor, previous: Tensor, lm_head: Tensor | None) -> Tensor:
    """normed [M, k, H], anchors int64 [M] -> the likeliest chains of target ids int64 [M, k]."""
    base, target_ids, drafts = head.logits(normed, lm_head), head.target_ids(), []
    for step in range(normed.shape[1]):
        logits = base[:, step] + head.markov_head(previous)
        previous = target_ids[logits.argmax(-1)]
        drafts.append(previous)
    return torch.stack(drafts, dim=1)
