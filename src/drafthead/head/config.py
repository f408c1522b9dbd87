"""The configuration of an EAGLE-3 head: widths, norms, vocabulary, and the cost of drafting with
it."""

from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from drafthead.errors import DraftheadError
from drafthead.fsio import shortened
from drafthead.recipe import HeadSection
from drafthead.targets.target import Target

LARGEST = 1 << 24  # no width or vocabulary comes near; keeps a hostile config from taking memory
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, lt=1e15)]
SMALLEST_WINDOW = 32
"""Positions. More than the drafts of a chain, so that a window always reaches the prefix."""


class LinearRope(TypedDict):
    """RoPE whose positions are divided by `factor`."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    rope_type: Literal["linear"]
    factor: Positive


class Llama3Rope(TypedDict):
    """Llama 3.1's RoPE, low frequencies divided by `factor`."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    rope_type: Literal["llama3"]
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size


@dataclass(frozen=True, config=ConfigDict(strict=True))
class HeadConfig:
    """Shape of a head, under the names that vLLM's `config.json` uses.

    The norm flags mean what they mean in vLLM 0.32 (`model_executor/models/llama_eagle3.py`):

    - `norm_before_residual`: the residual of the first layer is the *normed* hidden state.
    - `norm_before_fc`: one RMSNorm over the concatenated aux states before `fc`.
    - `fc_norm`: an RMSNorm of its own for each aux state before `fc`.
    - `norm_output`: the state after the final norm, not before it, feeds the next draft step.

    A layer whose `layer_types` entry is `sliding_attention` sees the last `sliding_window`
    positions, its own among them. Without `layer_types` every layer sees all positions.

    Raises `DraftheadError`, which names each wrong field.
    """

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, Field(ge=2, le=LARGEST, multiple_of=2)]  # RoPE turns pairs
    vocab_size: Size
    draft_vocab_size: Size
    target_hidden_size: Size
    aux_layer_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=LARGEST, strict=True)], ...],
        Field(min_length=1, max_length=64, strict=False),
    ]
    max_position_embeddings: Size
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: Annotated[LinearRope | Llama3Rope, Field(discriminator="rope_type")] | None = (
        field(default=None, hash=False)
    )
    num_hidden_layers: Annotated[int, Field(ge=1, le=64)] = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False
    hidden_act: Literal["silu"] = "silu"  # vLLM's head has no other
    layer_types: (
        Annotated[tuple[Literal["full_attention", "sliding_attention"], ...], Field(strict=False)]
        | None
    ) = None
    sliding_window: Annotated[int, Field(ge=SMALLEST_WINDOW, le=LARGEST)] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn what pydantic finds into a `DraftheadError`, and check the fields together."""
        try:
            config = handler(values)
        except ValidationError as error:
            lines = [
                f"head: {item['loc'][0]}: {item['msg']}, found {shortened(item['input'])}"
                for item in error.errors()
            ]
            raise DraftheadError("\n".join(lines)) from None
        if problem := config._contradiction():
            raise DraftheadError(f"head: {problem}")
        return config

    def _contradiction(self) -> str | None:
        """The first pair of fields that do not go together."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            return (
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if self.hidden_size % heads:
            return (
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}: "
                "transformers refuses it, and with it vLLM"
            )
        if self.draft_vocab_size > self.vocab_size:
            return (
                f"draft_vocab_size {self.draft_vocab_size} is larger than the target's vocab_size "
                f"{self.vocab_size}"
            )
        ids = list(self.aux_layer_ids)
        if ids != sorted(set(ids)):
            return (
                f"aux layer ids {ids} must ascend without repeats (vLLM hands the states over "
                "sorted, whatever the order written here)"
            )
        kinds = self.layer_types or ()
        if kinds and len(kinds) != self.num_hidden_layers:
            return f"layer_types names {len(kinds)} layers of {self.num_hidden_layers}"
        if "sliding_attention" in kinds and self.sliding_window is None:
            return "layer_types has sliding_attention, but sliding_window is missing"
        return None

    def window(self, layer: int) -> int | None:
        """How many positions a layer sees, its own among them; None: all before it."""
        kinds = self.layer_types
        return self.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

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
    # vLLM gives the head the window of a target whose layers all have one, whatever it says.
    kinds: Any = ("sliding_attention",) * section.layers
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
        layer_types=kinds if target.sliding_window else None,
        sliding_window=target.sliding_window,
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
