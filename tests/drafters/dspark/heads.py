"""Small random DSpark heads."""

import torch

from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.model import DSparkHead

VOCAB, DRAFT, MASK = 40, 30, 39


def config(**changes) -> DSparkConfig:
    base = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT,
        "target_hidden_size": 16,
        "aux_layer_ids": (1, 2),
        "max_position_embeddings": 64,
        "block_size": 4,
        "mask_token_id": MASK,
        "markov_rank": 3,
    }
    return DSparkConfig(**(base | changes))


def small_head(seed=0, dtype=torch.float32, **changes) -> DSparkHead:
    """A head of random weights; its draft vocabulary leaves out target ids 5 to 14."""
    head = DSparkHead(config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        if head.config.draft_vocab_size == DRAFT:
            head.d2t[5:] = VOCAB - DRAFT
    return head.to(dtype)
