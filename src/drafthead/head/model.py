"""The EAGLE-3 head in plain PyTorch, tensor for tensor what vLLM 0.32 runs.

Everything works on flat rows: N positions of one or many sequences, as vLLM packs them. Which
positions see which is the business of the `attention` callable alone, so that training (packed
rows, flash attention), drafting and vLLM itself can share this one network.

Shapes: N rows, H head width, Ht target width, A aux layers, Vd draft vocabulary, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafthead.errors import DraftheadError
from drafthead.head.config import HeadConfig

ABSOLUTE = "holds target ids, not offsets; to convert it: d2t -= torch.arange(len(d2t))"
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [N, heads, d], k [N, kv_heads, d], v [N, kv_heads, d]) -> [N, heads, d]`.

q and k carry their RoPE already; the scale is d ** -0.5."""


class SelfAttention(nn.Module):
    """The four projections of a layer."""

    def __init__(self, config: HeadConfig, input_size: int):
        super().__init__()
        d, bias = config.head_dim, config.attention_bias
        self.head_dim = d
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, config.hidden_size, bias=bias)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H or 2H], cos and sin [N, 1, d] -> q [N, heads, d], k and v [N, kv_heads, d]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in self._projections())
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Llama layer; the first one reads [embedding, hidden state], twice the width."""

    def __init__(self, config: HeadConfig, index: int):
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        self.first = index == 0
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = nn.RMSNorm(h, eps=eps)
        if self.first:
            self.hidden_norm = nn.RMSNorm(h, eps=eps)
        self.self_attn = SelfAttention(config, 2 * h if self.first else h)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=eps)
        self.mlp = MLP(config)

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """embeds and hidden [N, H] -> what q, k, v are projected from [N, H or 2H], residual."""
        if not self.first:
            return self.input_layernorm(hidden), hidden
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        return torch.cat([self.input_layernorm(embeds), normed], dim=-1), residual

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        """attended [N, heads, d], residual [N, H] -> the residual stream after the layer [N, H]."""
        residual = residual + self.self_attn.o_proj(attended.flatten(-2))
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Head(nn.Module):
    """The head, with vLLM's parameter names. The target's embedding is not part of it.

    A draft step: `fuse` the aux states (or take the previous step's `feedback`), `decode`,
    `output`, `logits`. The buffers `d2t` (int64 [Vd], offsets: target id = draft id + d2t[draft
    id]) and `t2d` (bool [V]) hold the draft vocabulary; see `set_vocab`.
    """

    d2t: Tensor
    t2d: Tensor
    inv_freq_bits: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        h, eps, aux = config.hidden_size, config.rms_norm_eps, config.num_aux_hidden_states
        ht = config.target_hidden_size
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(aux * ht, eps=eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(ht, eps=eps) for _ in range(aux))
        self.fc = nn.Linear(aux * ht, h, bias=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(h, eps=eps)
        self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """(Re)make the buffers on the current default device; the vocabulary is the first Vd ids.

        For a head built on the meta device, which has none.
        """
        c = self.config
        self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(c.vocab_size) < c.draft_vocab_size)
        # Kept as bits: `.to(bfloat16)` would round a float buffer, and far positions with it.
        bits = inverse_frequencies(c).view(torch.int32)
        self.register_buffer("inv_freq_bits", bits, persistent=False)

    def set_vocab(self, d2t: Tensor) -> None:
        """Take the draft vocabulary: offsets `d2t` int64 [Vd]. Raises if it is no ascending map."""
        check_d2t(d2t, self.config.draft_vocab_size, self.config.vocab_size)
        self.d2t.copy_(d2t)
        self.t2d.fill_(False)
        self.t2d[self.target_ids()] = True

    def target_ids(self) -> Tensor:
        """The target id of each draft id, ascending: int64 [Vd]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def fuse(self, aux: Tensor) -> Tensor:
        """Aux states [N, A, Ht], layers ascending -> the first step's hidden state [N, H]."""
        if self.config.norm_before_fc:
            aux = self.input_norm(aux.flatten(-2)).view_as(aux)
        if self.config.fc_norm:
            aux = torch.stack([n(aux[..., a, :]) for a, n in enumerate(self.fc_norm)], dim=-2)
        return self.fc(aux.flatten(-2))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, d] at positions [N], rounded to `dtype` as vLLM's cache is."""
        inv_freq = self.inv_freq_bits.view(torch.float32)
        angles = (positions.float()[:, None] * inv_freq).repeat(1, 2)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def decode(
        self, embeds: Tensor, hidden: Tensor, positions: Tensor, attention: Attention
    ) -> Tensor:
        """All decoder layers once.

        embeds [N, H]: the target's embedding of the token after each position; hidden [N, H];
        positions int [N]: RoPE positions. Returns the residual stream before the final norm [N, H].
        """
        cos, sin = self.rotary(positions, hidden.dtype)
        for index, layer in enumerate(self.layers):
            x, residual = layer.inputs(embeds, hidden)
            q, k, v = layer.self_attn.qkv(x, cos, sin)
            hidden = layer.outputs(attention(index, q, k, v), residual)
        return hidden

    def output(self, decoded: Tensor) -> Tensor:
        """What `decode` returned [N, H] -> the state that the LM head reads [N, H]."""
        return self.norm(decoded)

    def feedback(self, decoded: Tensor) -> Tensor:
        """What `decode` returned [N, H] -> the hidden state of the next draft step [N, H]."""
        return self.norm(decoded) if self.config.norm_output else decoded

    def logits(self, normed: Tensor) -> Tensor:
        """What `output` returned [N, H] -> logits over the draft vocabulary [N, Vd]."""
        return self.lm_head(normed)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split (NeoX) layout of Llama: x [N, heads, d], cos and sin [N, 1, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def inverse_frequencies(config: HeadConfig) -> Tensor:
    """RoPE's angular frequencies, float32 [d / 2]: theta ** (-2j / d), scaled where asked."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    if config.rope_scaling is None:
        return 1.0 / config.rope_theta**exponents
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={**config.rope_scaling, "rope_theta": config.rope_theta},
    )
    return ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](llama, device=None)[0]


def check_d2t(d2t: Tensor, draft_vocab_size: int, vocab_size: int) -> None:
    """Raise `DraftheadError` unless `d2t` [Vd] holds offsets to strictly ascending target ids."""
    if d2t.shape != (draft_vocab_size,) or d2t.dtype != torch.int64:
        raise DraftheadError(
            f"d2t is {d2t.dtype} {list(d2t.shape)}, must be torch.int64 [{draft_vocab_size}]"
        )
    ids = torch.arange(draft_vocab_size, device=d2t.device) + d2t
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        looks_absolute = bool((d2t[1:] > d2t[:-1]).all()) and int(d2t.min()) >= 0
        looks_absolute &= int(d2t.max()) < vocab_size
        hint = f"; it seems that it {ABSOLUTE}" if looks_absolute else ""
        raise DraftheadError(
            f"d2t leads to target ids {int(ids.min())}..{int(ids.max())}, outside the vocabulary "
            f"of {vocab_size}{hint}"
        )
    if bool((ids[1:] <= ids[:-1]).any()):
        at = int((ids[1:] <= ids[:-1]).nonzero()[0]) + 1
        raise DraftheadError(
            f"d2t: target ids must ascend; draft id {at} leads to {int(ids[at])} after "
            f"{int(ids[at - 1])}"
        )
