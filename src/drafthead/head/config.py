"""What an EAGLE-3 head looks like: widths, norms, vocabulary, and what drafting with it costs."""

from dataclasses import dataclass, field
from typing import Any

from drafthead.errors import DraftheadError
from drafthead.recipe import HeadSection
from drafthead.targets.target import Target

ROPE_SCALINGS = ("llama3", "linear")


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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DraftheadError(f"head: {name} is {value!r}, must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise DraftheadError(f"head: {name} is {value!r}, must be a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DraftheadError(
                f"head: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise DraftheadError(f"head: head_dim {self.head_dim} is odd, RoPE needs pairs")
        if self.draft_vocab_size > self.vocab_size:
            raise DraftheadError(
                f"head: draft_vocab_size {self.draft_vocab_size} is larger than the target's "
                f"vocab_size {self.vocab_size}"
            )
        ids = self.aux_layer_ids
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise DraftheadError(f"head: aux layer ids {list(ids)} must be integers >= 0")
        if list(ids) != sorted(set(ids)):
            raise DraftheadError(
                f"head: aux layer ids {list(ids)} must ascend without repeats (vLLM hands the "
                "states over sorted, whatever the order written here)"
            )
        if self.hidden_act != "silu":
            raise DraftheadError(f"head: hidden_act {self.hidden_act!r}; vLLM's head has only silu")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if kind not in ROPE_SCALINGS:
                raise DraftheadError(
                    f"head: rope_type {kind!r}; known are default, {', '.join(ROPE_SCALINGS)}"
                )

    @property
    def num_aux_hidden_states(self) -> int:
        return len(self.aux_layer_ids)


def head_config(
    section: HeadSection, target: Target, aux_layer_ids: tuple[int, ...], draft_vocab_size: int
) -> HeadConfig:
    """The head that a recipe's `head` section asks for, for this target.

    What the section leaves open is the target's own figure; the MLP is 4 x hidden, rounded up to
    128. vLLM shares the target's embedding with the head, so another width than the target's is
    refused (`DraftheadError`).
    """
    hidden = section.hidden_size or target.hidden_size
    if hidden != target.hidden_size:
        raise DraftheadError(
            f"recipe: head.hidden_size is {hidden}, the target's is {target.hidden_size}; the head "
            "reads the target's embedding, so leave it out"
        )
    return HeadConfig(
        hidden_size=hidden,
        intermediate_size=section.intermediate_size or -(-4 * hidden // 128) * 128,
        num_attention_heads=section.num_attention_heads or target.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads or target.num_key_value_heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=target.hidden_size,
        aux_layer_ids=aux_layer_ids,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        norm_before_residual=section.norm_before_residual,
        norm_before_fc=section.norm_before_fc,
        fc_norm=section.fc_norm,
    )
