"""What a DSpark head looks like."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST = 1 << 24  # no width or vocabulary comes near; keeps a hostile config from taking memory
Size = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, lt=1e15, allow_inf_nan=False)]


class DSparkConfig(BaseModel):
    """Shape of a head, under the names that vLLM 0.32 reads (`models/qwen3_dspark.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(strict=True, ge=1, le=64)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size
    draft_vocab_size: Size
    target_hidden_size: Size
    num_target_layers: Size | None = None
    """Layers of the target, where they are known: mlx-vlm asks for them."""
    aux_layer_ids: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0, le=LARGEST)], ...],
        Field(min_length=1, max_length=64),
    ]
    """Ascending; id i is the residual stream that enters layer i of the target."""
    max_position_embeddings: Size
    block_size: Annotated[int, Field(strict=True, ge=1, le=64)]
    """Positions of a block in training: the most drafts a step."""
    mask_token_id: Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
    """Row of the target's embedding that stands for a token not known yet; no text has it."""
    markov_rank: Size
    confidence_head: bool = True
    """Whether there is a head that estimates the chance of each draft to be accepted."""
    confidence_with_markov: bool = True
    """Whether it also reads the Markov embedding of the token before."""
    own_lm_head: bool = True
    """Whether the head has an LM head of its own; without, the target's whole vocabulary and LM
    head."""
    causal: bool = False
    """Whether a position of a block sees only the earlier ones."""
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1e6
    is_neox_style: bool = True
    """Whether RoPE turns halves (Llama) or neighbours (interleaved)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even: RoPE turns pairs")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError("draft_vocab_size must not be larger than vocab_size")
        if not self.own_lm_head and self.draft_vocab_size < self.vocab_size:
            raise ValueError("a reduced draft vocabulary needs an LM head of its own")
        if list(self.aux_layer_ids) != sorted(set(self.aux_layer_ids)):
            raise ValueError("aux_layer_ids must ascend without repeats: vLLM sorts the states")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError("mask_token_id must be a row of the target's embedding")
        return self

    @property
    def num_aux_hidden_states(self) -> int:
        return len(self.aux_layer_ids)
