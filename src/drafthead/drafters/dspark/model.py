"""The DSpark head in plain PyTorch, tensor for tensor what vLLM 0.32 runs.

Everything works on flat rows: N context positions of one or many sequences, and Q query positions
of their blocks. Which positions see which is the business of the `attention` callable.

Shapes: H head width, Ht target width, A aux layers, Vd draft vocabulary, V vocabulary, r rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafthead.drafters.dspark.config import DSparkConfig

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [Q, heads, d], k [Q, kv_heads, d], v [Q, kv_heads, d]) -> [Q, heads, d]`: over the
layer's context and these keys and values of the blocks themselves. q and k carry their RoPE; the
scale is d ** -0.5."""
Rotation = tuple[Tensor, Tensor]
"""cos and sin [N, 1, d]."""


class SelfAttention(nn.Module):
    """Qwen3's projections and its norms of queries and keys."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        d, h = config.head_dim, config.hidden_size
        self.head_dim, self.neox = d, config.is_neox_style
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x [Q, H] -> [Q, heads, d], rotated."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        return rotate(q, rotation, self.neox)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """x [N, H] -> keys [N, kv_heads, d], rotated, and values [N, kv_heads, d]."""
        k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(k), rotation, self.neox), v


class MLP(nn.Module):
    """Qwen3's gated MLP."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Qwen3 layer."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(h, eps=eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=eps)
        self.mlp = MLP(config)

    def qkv(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream x [Q, H] -> q [Q, heads, d], k and v [Q, kv_heads, d]."""
        normed = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(normed, rotation)
        return self.self_attn.queries(normed, rotation), k, v

    def outputs(self, attended: Tensor, x: Tensor) -> Tensor:
        """attended [Q, heads, d], residual stream x [Q, H] -> the stream after the layer [Q, H]."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class MarkovHead(nn.Module):
    """Low-rank logits of a token by the one before: w2 @ w1[token]."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)

    def forward(self, previous: Tensor) -> Tensor:
        """Target ids int [M] -> logits [M, Vd]."""
        return self.markov_w2(self.markov_w1(previous))


class ConfidenceHead(nn.Module):
    """The chance that a draft is accepted."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.with_markov = config.confidence_with_markov
        width = config.hidden_size + config.markov_rank * config.confidence_with_markov
        self.proj = nn.Linear(width, 1)

    def forward(self, normed: Tensor, markov: Tensor) -> Tensor:
        """What the LM head reads [M, H], Markov embeddings [M, r] -> log-odds fp32 [M]."""
        x = torch.cat([normed, markov], dim=-1) if self.with_markov else normed
        weight, bias = self.proj.weight.float(), self.proj.bias.float()
        return F.linear(x.float(), weight, bias).squeeze(-1)


class DSparkHead(nn.Module):
    """The head, with vLLM's parameter names. The target's embedding is not part of it.

    The buffer `d2t` (int64 [Vd], offsets: target id = draft id + d2t[draft id]) holds the draft
    vocabulary. Where `config.own_lm_head` is false, `lm_head` is None: the target's is to be used.
    """

    d2t: Tensor
    inv_freq_bits: Tensor

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.config = config
        h, eps = config.hidden_size, config.rms_norm_eps
        aux = config.num_aux_hidden_states * config.target_hidden_size
        self.fc = nn.Linear(aux, h, bias=False)
        self.hidden_norm = nn.RMSNorm(h, eps=eps)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(h, eps=eps)
        self.markov_head = MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        rows = config.draft_vocab_size
        self.lm_head = nn.Linear(h, rows, bias=False) if config.own_lm_head else None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """(Re)make the buffers on the current default device; the vocabulary is the first Vd ids.

        For a head built on the meta device, which has none.
        """
        c = self.config
        self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
        exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        # Kept as bits: `.to(bfloat16)` would round a float buffer, and far positions with it.
        bits = (1.0 / c.rope_theta**exponents).view(torch.int32)
        self.register_buffer("inv_freq_bits", bits, persistent=False)

    def target_ids(self) -> Tensor:
        """The target id of each draft id, ascending: int64 [Vd]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """cos and sin at positions [N], rounded to `dtype` as vLLM's cache is."""
        angles = positions.float()[:, None] * self.inv_freq_bits.view(torch.float32)
        angles = (
            angles.repeat(1, 2) if self.config.is_neox_style else angles.repeat_interleave(2, 1)
        )
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def fuse(self, aux: Tensor) -> Tensor:
        """Aux states [N, A, Ht], layers ascending -> what keys and values are made from [N, H]."""
        return self.hidden_norm(self.fc(aux.flatten(-2)))

    def context(self, aux: Tensor, rotation: Rotation) -> list[tuple[Tensor, Tensor]]:
        """Aux states [N, A, Ht] -> each layer's keys and values of the context [N, kv_heads, d]."""
        fused = self.fuse(aux)
        return [layer.self_attn.keys_values(fused, rotation) for layer in self.layers]

    def decode(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """All layers over the blocks, and the last norm.

        x [Q, H]: the target's embedding of each block's anchor, and of the mask token elsewhere.
        Returns what the LM head reads [Q, H].
        """
        for index, layer in enumerate(self.layers):
            x = layer.outputs(attention(index, *layer.qkv(x, rotation)), x)
        return self.norm(x)

    def logits(self, normed: Tensor, lm_head: Tensor | None = None) -> Tensor:
        """What `decode` returned [M, H] -> base logits [M, Vd]; lm_head [V, H]: the target's, for a
        head that has none."""
        weight = self.lm_head.weight if self.lm_head is not None else lm_head
        assert weight is not None
        return F.linear(normed, weight)


def rotate(x: Tensor, rotation: Rotation, neox: bool) -> Tensor:
    """RoPE: x [N, heads, d], cos and sin [N, 1, d]."""
    cos, sin = rotation
    if neox:
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin
