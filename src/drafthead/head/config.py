"""What an EAGLE-3 head looks like: widths, norms, vocabulary, and what drafting with it costs."""

from dataclasses import dataclass, field
from typing import Any

from drafthead.errors import DraftheadError
from drafthead.recipe import HeadSection
from drafthead.targets.target import Target

LARGEST = 1 << 24  # no width or vocabulary comes near; keeps a hostile config from taking memory
ROPE_SCALINGS = ("llama3", "linear")
ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head, under the names that vLLM's `config.json` uses.

    The norm flags mean what they mean in vLLM 0.32 (`model_executor/models/llama_eagle3.py`):

    - `norm_before_residual`: the residual of the first layer is the *normed* hidden state.
    - `norm_before_fc`: one RMSNorm over the concatenated aux states before `fc`.
    - `fc_norm`: an RMSNorm of its own for each aux state before `fc`.
    - `norm_output`: the state after the final norm, not before it, feeds the next draft step.

    Raises `DraftheadError` where the numbers contradict each other.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_layer_ids: tuple[int, ...]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    num_hidden_layers: int = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_layer_ids", tuple(self.aux_layer_ids))
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "draft_vocab_size",
            "target_hidden_size",
            "max_position_embeddings",
            "num_hidden_layers",
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise DraftheadError(f"head: {name} is {value!r:.80}, must be in 1..{LARGEST}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e15:
                raise DraftheadError(f"head: {name} is {value!r:.80}, must be a positive number")
        if self.num_hidden_layers > 64:
            raise DraftheadError(f"head: num_hidden_layers is {self.num_hidden_layers}, at most 64")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DraftheadError(
                f"head: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise DraftheadError(
                f"head: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: transformers refuses it, and with it vLLM"
            )
        if self.head_dim % 2:
            raise DraftheadError(f"head: head_dim {self.head_dim} is odd, RoPE needs pairs")
        if self.draft_vocab_size > self.vocab_size:
            raise DraftheadError(
                f"head: draft_vocab_size {self.draft_vocab_size} is larger than the target's "
                f"vocab_size {self.vocab_size}"
            )
        ids = self.aux_layer_ids
        if not 1 <= len(ids) <= 64 or any(type(i) is not int or not 0 <= i < LARGEST for i in ids):
            raise DraftheadError(f"head: aux layer ids {list(ids)!r:.80} must be integers >= 0")
        if list(ids) != sorted(set(ids)):
            raise DraftheadError(
                f"head: aux layer ids {list(ids)} must ascend without repeats (vLLM hands the "
                "states over sorted, whatever the order written here)"
            )
        if self.hidden_act != "silu":
            raise DraftheadError(
                f"head: hidden_act {self.hidden_act!r:.80}; vLLM's head has only silu"
            )
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if kind not in ROPE_SCALINGS:
                raise DraftheadError(
                    f"head: rope_type {kind!r:.80}; known are default, {', '.join(ROPE_SCALINGS)}"
                )
            for name in ROPE_NUMBERS:
                value = self.rope_scaling.get(name, 1.0)
                if type(value) not in (int, float) or not 0 < value < 1e15:
                    raise DraftheadError(
                        f"head: rope's {name} is {value!r:.80}, must be a positive number"
                    )

    @property
    def num_aux_hidden_states(self) -> int:
        return len(self.aux_layer_ids)


def head_config(
    section: HeadSection, target: Target, aux_layer_ids: tuple[int, ...], draft_vocab_size: int
) -> HeadConfig:
    """The head that a recipe's `head` section asks for, for this target.

    What the section leaves open is the target's own figure; the MLP is 4 x hidden, rounded up to
    128. A target's query heads that do not divide its width (GLM-4.5's 96 of 5120) no Llama may
    have: the most below that do. vLLM shares the target's embedding with the head, so another width
    than the target's is refused (`DraftheadError`).
    """
    hidden = section.hidden_size or target.hidden_size
    if hidden != target.hidden_size:
        raise DraftheadError(
            f"recipe: head.hidden_size is {hidden}, the target's is {target.hidden_size}; the head "
            "reads the target's embedding, so leave it out"
        )
    shared = section.num_key_value_heads or target.num_key_value_heads
    most = target.num_attention_heads
    fit = (n for n in range(most, 0, -1) if hidden % n == 0 and n % shared == 0)
    return HeadConfig(
        hidden_size=hidden,
        intermediate_size=section.intermediate_size or -(-4 * hidden // 128) * 128,
        num_attention_heads=section.num_attention_heads or next(fit, most),
        num_key_value_heads=shared,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=target.hidden_size,
        aux_layer_ids=aux_layer_ids,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        num_hidden_layers=section.layers,
        norm_before_residual=section.norm_before_residual,
        norm_before_fc=section.norm_before_fc,
        fc_norm=section.fc_norm,
        norm_output=section.norm_output,
    )


@dataclass(frozen=True)
class DraftCost:
    """What drafting with a head costs, counted from its shapes (not measured)."""

    parameters: int
    """Weights of the head, without the target's embedding."""
    bytes_per_draft_step: int
    """Weights read for one draft token at batch 1, LM head included: at small batches a step is
    bound by memory, so this over the card's bandwidth is its least time."""
    bytes_first_step: int
    """The same for the first draft of a chain, which also reads `fc`."""
    flops_per_draft_token: int
    """Multiplications and additions (2 per weight) of one draft token, attention scores left
    out: 4 * heads * head_dim for each position of context."""
    lm_head_share: float
    """Share of `bytes_per_draft_step` that the draft vocabulary's rows take."""
    kv_bytes_per_token: int
    """Cache that the head adds for each token of context."""


def estimate_cost(config: HeadConfig, weight_bytes: int = 2, kv_bytes: int = 2) -> DraftCost:
    """Count what a head costs. `weight_bytes`, `kv_bytes`: bytes of a weight, of a cached value."""
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    fc = config.num_aux_hidden_states * config.target_hidden_size * h
    mlp = 3 * h * config.intermediate_size
    first = (q + 2 * kv) * 2 * h + q * h + mlp
    other = (q + 2 * kv) * h + q * h + mlp
    step = first + (config.num_hidden_layers - 1) * other
    lm_head = config.draft_vocab_size * h
    norms = (2 + 2 * config.num_hidden_layers) * h
    if config.norm_before_fc:
        norms += config.num_aux_hidden_states * config.target_hidden_size
    if config.fc_norm:
        norms += config.num_aux_hidden_states * config.target_hidden_size
    biases = (q + 2 * kv + h) * config.num_hidden_layers * config.attention_bias
    read = (step + lm_head + norms + biases) * weight_bytes
    return DraftCost(
        parameters=fc + step + lm_head + norms + biases,
        bytes_per_draft_step=read,
        bytes_first_step=read + fc * weight_bytes,
        flops_per_draft_token=2 * (step + lm_head),
        lm_head_share=lm_head * weight_bytes / read,
        kv_bytes_per_token=2 * kv * kv_bytes * config.num_hidden_layers,
    )
