"""The tiny LFM2-MoE, and a forward pass of it that trains fast.

The parameters are transformers' own (`Lfm2MoeForCausalLM`), so saving is `save_pretrained`; only
the arithmetic differs. transformers walks the experts in a Python loop with a host sync each. Here
all experts run as one wide MLP whose activations are multiplied by the routing weights, zero for
the experts not chosen: the same sum, four times the expert FLOPs, and two plain GEMMs a layer.
`tests/benchmarks/test_tiny_hybrid.py` holds the two together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

ATTENTION_LAYERS = (2, 6, 8)  # LFM2.5's way: the third layer first, and two convolutions last


def config(vocab_size: int, tiny: bool) -> Lfm2MoeConfig:
    """12.0 M parameters (24 MB in bf16); `tiny` is for rehearsing on a CPU.

    Widths are multiples of 128, so that every NVFP4 kernel of vLLM takes them unpadded.
    """
    layers = 9 if tiny else 11
    return Lfm2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128 if tiny else 256,
        intermediate_size=256 if tiny else 768,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i in ATTENTION_LAYERS else "conv" for i in range(layers)],
        num_attention_heads=2 if tiny else 4,
        num_key_value_heads=2,
        num_dense_layers=2,
        num_experts=4 if tiny else 8,
        num_experts_per_tok=2,
        use_expert_bias=True,
        norm_topk_prob=True,
        conv_L_cache=3,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=7,
        tie_word_embeddings=True,
        dtype="float32",
    )


def conv(block, x: Tensor) -> Tensor:
    """LFM2's gated short convolution. x [B, T, H] -> [B, T, H]."""
    b, c, x = block.in_proj(x).chunk(3, dim=-1)
    x = b * x
    taps = block.conv.weight  # [H, 1, K], the last tap is the present
    width = taps.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    length = x.shape[1]
    x = sum(taps[:, 0, k].to(x.dtype) * padded[:, k : k + length] for k in range(width))
    return block.out_proj(c * x)


def rope(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding, halves rotated (the Llama way), positions 0..T-1. x [B, heads, T, D]."""
    length, dim = x.shape[-2:]
    step = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] / theta**step
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(block, x: Tensor, theta: float, eps: float) -> Tensor:
    """Causal grouped-query attention with normed queries and keys. x [B, T, H] -> [B, T, H]."""
    rows, length, _ = x.shape
    split = lambda y: y.view(rows, length, -1, block.head_dim)
    norm = lambda y, w: F.rms_norm(y, (block.head_dim,), w, eps).to(y.dtype)
    q = norm(split(block.q_proj(x)), block.q_layernorm.weight).transpose(1, 2)
    k = norm(split(block.k_proj(x)), block.k_layernorm.weight).transpose(1, 2)
    v = split(block.v_proj(x)).transpose(1, 2)
    q, k = rope(q, theta), rope(k, theta)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return block.out_proj(y.transpose(1, 2).reshape(rows, length, -1))


def moe(block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sparse experts as one gated MLP. x [N, H] -> ([N, H], tokens each expert got [E])."""
    gate = block.gate
    scores = F.linear(x, gate.weight).float().sigmoid()  # [N, E]
    chosen = torch.topk(scores + block.expert_bias, gate.top_k, dim=-1).indices  # bias only selects
    mask = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
    weights = scores * mask
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6) * gate.routed_scaling_factor
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj  # [E, 2I, H], [E, H, I]
    experts, width = down.shape[0], down.shape[2]
    h = F.linear(x, gate_up.flatten(0, 1)).view(-1, experts, 2, width)
    h = F.silu(h[:, :, 0]) * h[:, :, 1] * weights[..., None].to(h.dtype)
    y = h.flatten(1) @ down.permute(0, 2, 1).flatten(0, 1).to(h.dtype)
    return y, mask.sum(0)


def forward(model: Lfm2MoeForCausalLM, ids: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """ids [B, T] -> (logits [B, T, V], tokens each expert got [MoE layers, E]).

    `dropout` is that of the embedding and of what each block adds to the residual stream.
    """
    body, eps = model.model, model.config.norm_eps
    theta = model.config.rope_parameters["rope_theta"]
    norm = lambda y, module: F.rms_norm(y, y.shape[-1:], module.weight, eps)
    drop = lambda y: F.dropout(y, dropout) if dropout else y
    x = drop(body.embed_tokens(ids))
    loads = []
    for layer in body.layers:
        y = norm(x, layer.operator_norm)
        if layer.is_attention_layer:
            x = x + drop(attention(layer.self_attn, y, theta, eps))
        else:
            x = x + drop(conv(layer.conv, y))
        y = norm(x, layer.ffn_norm)
        if hasattr(layer.feed_forward, "experts"):
            y, load = moe(layer.feed_forward, y.flatten(0, 1))
            x = x + drop(y).view_as(x)
            loads.append(load)
        else:
            x = x + drop(layer.feed_forward(y))
    return F.linear(norm(x, body.embedding_norm), body.embed_tokens.weight), torch.stack(loads)


@torch.no_grad()
def balance(model: Lfm2MoeForCausalLM, loads: Tensor, rate: float) -> None:
    """Move each expert's bias against the sign of its load error (auxiliary-loss-free balancing,
    arXiv:2408.15664). loads [MoE layers, E]."""
    blocks = [b.feed_forward for b in model.model.layers if hasattr(b.feed_forward, "experts")]
    steps = rate * (loads.mean(-1, keepdim=True) - loads).sign()
    for block, step in zip(blocks, steps):
        block.expert_bias.add_(step)
