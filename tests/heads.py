"""Small random heads, and states for them."""

import torch

from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.states import Sample

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "draft_vocab_size": 23,
    "target_hidden_size": 32,
    "aux_layer_ids": (1, 2, 4),
    "max_position_embeddings": 256,
}


def small_head(seed: int = 0, **changes) -> Eagle3Head:
    """A float32 head with every weight random, norms and biases included."""
    config = HeadConfig(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(seed)
    head = Eagle3Head(config)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    chosen = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size]
    head.set_vocab(chosen.sort().values - torch.arange(config.draft_vocab_size))
    return head


def states(head: Eagle3Head, tokens: int, seed: int = 1):
    """embedding [V, H], aux [T, A, Ht], ids [T] for a head."""
    c, generator = head.config, torch.Generator().manual_seed(seed)
    embedding = torch.randn(c.vocab_size, c.hidden_size, generator=generator)
    aux = torch.randn(tokens, len(c.aux_layer_ids), c.target_hidden_size, generator=generator)
    ids = torch.randint(0, c.vocab_size, (tokens,), generator=generator, dtype=torch.int32)
    return embedding, aux, ids


def sample(ids: torch.Tensor, prompt_len: int, aux: torch.Tensor) -> Sample:
    """A held-out sample: ids [T], aux [T', A, Ht]; its last states are zero."""
    return Sample(
        ids=ids,
        loss_mask=torch.arange(len(ids)) >= prompt_len,
        states=torch.cat([aux, torch.zeros_like(aux[:, :1])], dim=1),
        num_aux=aux.shape[1],
        prompt_len=prompt_len,
        conversation="some",
        split="heldout",
    )
