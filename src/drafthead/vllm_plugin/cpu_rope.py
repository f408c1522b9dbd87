"""Rotary embedding of [tokens, heads, head size] tensors on the CPU.

The C++ kernel takes [tokens, heads * head size] and rotates only a part of anything else; LFM2
passes three dimensions.
"""

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform

from .patch import step_aside, wrap


def apply() -> None:
    if not current_platform.is_cpu():
        return
    if _kernel_rotates_heads():
        step_aside("cpu_rope")
        return
    wrap(RotaryEmbedding, "forward_cpu", _flat)


def _kernel_rotates_heads() -> bool:
    from vllm import _custom_ops as ops

    positions = torch.tensor([1, 2])
    cache = torch.randn(4, 8)
    flat = torch.randn(2, 2 * 8)
    heads = flat.clone().view(2, 2, 8)
    ops.rotary_embedding(positions, flat, flat.clone(), 8, cache, True)
    ops.rotary_embedding(positions, heads, heads.clone(), 8, cache, True)
    return bool(torch.allclose(flat, heads.view(2, 16)))


def _flat(stock):
    def forward_cpu(self, positions, query, key=None):
        if query.ndim == 2:
            return stock(self, positions, query, key)
        flat_key = None if key is None else key.flatten(1).contiguous()
        rotated, rotated_key = stock(self, positions, query.flatten(1).contiguous(), flat_key)
        return rotated.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward_cpu
