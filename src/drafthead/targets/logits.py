"""What an architecture computes between its last hidden state and its logits, as vLLM 0.32 does.

Most have an RMS norm and the LM head. A teacher that left out what others add would be wrong
without a word: the likeliest token stays the same, its probability does not.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from drafthead.errors import DraftheadError

_GRANITE = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
_COHERE = ("cohere", "cohere2", "cohere2_moe")
_GEMMA = ("gemma", "gemma2", "gemma3_text", "gemma4_text")
_MINICPM = ("minicpm", "minicpm3")
_QWEN_NEXT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Their norms hold the weight less one as well, some only by a setting. No teacher was held against
# them.
_UNTRIED = ("minimax_m3_vl_text", "muse_glimmer_text", "qwen4_exp_text", "step3p5")

# Fields by which a configuration changes logits or what the LM head reads, and what they hold where
# they change nothing.
_FIELDS = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "output_multiplier": (None, 1.0),
    "output_multiplier_scale": (None, 1.0),
    "dim_model_base": (None,),
}


@dataclass(frozen=True)
class LogitRule:
    """logits = scale * cap(lm_head @ norm(x)), cap(c) = soft_cap * tanh(c / soft_cap) if there is
    one."""

    centered: bool = False
    """The final norm takes the mean off first: a LayerNorm without bias, not an RMS norm."""
    stored_less_one: bool = False
    """Checkpoints hold the final norm's weight less one."""
    scale: float = 1.0
    soft_cap: float | None = None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The final norm: x [..., Ht] and weight [Ht], of one type, -> [..., Ht]."""
        if self.centered:
            return F.layer_norm(x, weight.shape, weight, None, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def finish(self, products: Tensor) -> Tensor:
        """What the LM head gives [..., V] -> logits, in place."""
        if self.soft_cap is not None:
            products.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return products if self.scale == 1.0 else products.mul_(self.scale)


PLAIN = LogitRule()


def logit_rule(config: Any, where: str) -> LogitRule:
    """The rule of a text model's transformers configuration.

    Raises:
        DraftheadError: it is of an architecture that does something else, or holds no such numbers.
    """
    kind = config.model_type
    handled: tuple[str, ...] = ()

    def number(name: str) -> float:
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise DraftheadError(f"{where}: `{name}` is {value!r:.80}, must be a positive number")
        return float(value)

    rule = PLAIN
    if kind in _GRANITE:
        handled, rule = ("logits_scaling",), LogitRule(scale=1 / number("logits_scaling"))
    elif kind in _COHERE:
        centered = getattr(config, "rms_norm_eps", None) is None
        handled, rule = ("logit_scale",), LogitRule(centered, scale=number("logit_scale"))
    elif kind in _MINICPM:
        scale = number("dim_model_base") / config.hidden_size
        # transformers' own MiniCPM3 derives `logits_scaling` from the other.
        handled, rule = ("dim_model_base", "logits_scaling"), LogitRule(scale=scale)
    elif kind in _GEMMA:
        capped = getattr(config, "final_logit_softcapping", None) is not None
        handled = ("final_logit_softcapping",)
        rule = LogitRule(
            stored_less_one=kind != "gemma4_text",
            soft_cap=number("final_logit_softcapping") if capped else None,
        )
    elif kind in _QWEN_NEXT:
        rule = LogitRule(stored_less_one=True)
    elif "gemma" in kind or kind in _UNTRIED:
        raise DraftheadError(f"{where}: {kind}'s final norm is not handled yet")
    for field, neutral in _FIELDS.items():
        if field not in handled and getattr(config, field, None) not in neutral:
            raise DraftheadError(
                f"{where}: `{field}` is set: {kind} changes its logits after the LM head, in a way "
                "that drafthead's teacher does not do yet"
            )
    return rule
