"""Rotary embedding of [tokens, heads, head size] tensors on the CPU.

The C++ kernel takes [tokens, heads * head size] and rotates only a part of anything else; LFM2
passes three dimensions.
"""

from types import SimpleNamespace

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from .patch import Replacement, original


def needed() -> bool:
    """Whether heads are rotated otherwise where they are a dimension of their own."""
    cache = torch.linspace(-1, 1, 32).view(4, 8)
    rope = SimpleNamespace(
        head_size=8, is_neox_style=True, _match_cos_sin_cache_dtype=lambda query: cache
    )
    rotate, positions = original(RotaryEmbedding, "forward_cpu"), torch.tensor([1, 2])
    flat = torch.linspace(1, 2, 32).view(2, 16)
    heads, _ = rotate(rope, positions, flat.clone().view(2, 2, 8), flat.clone().view(2, 2, 8))
    flat, _ = rotate(rope, positions, flat.clone(), flat.clone())
    return not torch.allclose(flat, heads.reshape(2, 16))


def _flat(stock):
    def forward_cpu(self, positions, query, key=None):
        if query.ndim == 2:
            return stock(self, positions, query, key)
        flat_key = None if key is None else key.flatten(1).contiguous()
        rotated, rotated_key = stock(self, positions, query.flatten(1).contiguous(), flat_key)
        return rotated.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward_cpu


REPLACEMENTS = (
    Replacement(
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_cpu",
        "self positions query key",
        _flat,
    ),
)
