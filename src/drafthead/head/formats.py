"""The two `config.json` of an EAGLE-3 head: vLLM's own and the speculators library's.

What others write is read too: vLLM-native configs of SpecForge and ModelOpt keep the aux layer
ids inside `eagle_config`, where they count layer *outputs*, one lower than vLLM's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from drafthead import __version__
from drafthead.errors import DraftheadError
from drafthead.head.config import HeadConfig

Format = Literal["vllm", "speculators"]
NATIVE_ARCHITECTURES = ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3", "LlamaForCausalLM")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class Provenance:
    """Where a head comes from; written under `drafthead` in its config, which vLLM ignores."""

    target: str = ""
    """The target's name or path as the recipe gave it."""
    target_fingerprint: str = ""
    """`Target.fingerprint`: the exact files."""
    target_architectures: tuple[str, ...] = ()
    drafthead_version: str = __version__
    trained: dict[str, Any] = field(default_factory=dict)
    """What training left: step, accepted length."""


@dataclass(frozen=True)
class ReadConfig:
    """A `config.json` understood."""

    config: HeadConfig
    format: Format
    logit_scale: float
    provenance: dict[str, Any] | None
    notes: tuple[str, ...]
    """What had to be assumed."""


def write_config(
    config: HeadConfig, format: Format, provenance: Provenance, speculative_tokens: int
) -> dict[str, Any]:
    """The `config.json` of a head as a dict. `speculative_tokens`: k, only in speculators'."""
    about = {
        "drafthead_version": provenance.drafthead_version,
        "target": provenance.target,
        "target_fingerprint": provenance.target_fingerprint,
        "trained": provenance.trained,
    }
    flags = {flag: getattr(config, flag) for flag in FLAGS}
    aux = list(config.aux_layer_ids)
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    layer = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        # vLLM counts the aux states by this field; in speculators' format it looks nowhere else
        # and takes 3 if it is missing.
        "num_aux_hidden_states": len(aux),
    }
    common = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": aux,
        **flags,
        "dtype": "bfloat16",
        "drafthead": about,
    }
    if format == "vllm":
        return {
            "architectures": ["Eagle3LlamaForCausalLM"],
            **layer,
            **common,
            "eagle_config": {"use_aux_hidden_state": True},
        }
    # No `model_type` at the top: with one, vLLM does not see that this is speculators' format.
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
            ],
            "verifier": {
                "name_or_path": provenance.target,
                "architectures": list(provenance.target_architectures),
            },
        },
        "transformer_layer_config": {"architectures": ["LlamaForCausalLM"], **layer},
        "tie_word_embeddings": False,
        **common,
    }


def read_config(
    raw: Any, where: str, default_aux: tuple[int, ...] | None = None, num_layers: int | None = None
) -> ReadConfig:
    """Understand a head's `config.json`.

    Args:
        raw: the parsed JSON.
        where: what errors call it.
        default_aux: the aux layers that vLLM takes for this target when none are named.
        num_layers: the target's, to tell apart the two ways of counting layers.

    Raises:
        DraftheadError: no EAGLE-3 head, or one that this network cannot compute.
    """
    if not isinstance(raw, dict):
        raise DraftheadError(f"{where}: holds {type(raw).__name__}, not a configuration")
    notes: list[str] = []
    speculators = "speculators_model_type" in raw or "speculators_config" in raw
    if speculators:
        kind = raw.get("speculators_model_type")
        if kind != "eagle3":
            raise DraftheadError(f"{where}: speculators_model_type is {kind!r}, not 'eagle3'")
        layer = _dict(raw.get("transformer_layer_config"), where, "transformer_layer_config")
        nested: dict[str, Any] = {}
    else:
        names = raw.get("architectures")
        if not isinstance(names, list) or not names or names[0] not in NATIVE_ARCHITECTURES:
            raise DraftheadError(
                f"{where}: architectures is {names!r}, not an EAGLE-3 head that drafthead knows "
                f"({', '.join(NATIVE_ARCHITECTURES)}, or speculators' format)"
            )
        layer = raw
        nested = _dict(raw.get("eagle_config") or {}, where, "eagle_config")
    _refuse_unknown(layer, nested, where)

    flags = {flag: _bool(raw.get(flag, False), where, flag) for flag in FLAGS}
    if speculators and "norm_before_residual" not in raw:
        flags["norm_before_residual"] = True
        notes.append("norm_before_residual is missing, which means true in speculators' format")
    if "norm_before_fc" in nested:
        flags["norm_before_fc"] = _bool(nested["norm_before_fc"], where, "norm_before_fc")
    llama = _llama_defaults(layer, where)
    hidden = layer.get("hidden_size", llama.hidden_size)
    heads = llama.num_attention_heads
    scaling = {k: v for k, v in (llama.rope_parameters or {}).items() if k != "rope_theta"}
    scaling.pop("partial_rotary_factor", None)
    vocab = layer.get("vocab_size", llama.vocab_size)
    if not speculators and "draft_vocab_size" not in raw:
        notes.append("draft_vocab_size is missing: the head drafts the whole vocabulary")
    scale = raw.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6:
        raise DraftheadError(f"{where}: logit_scale is {scale!r}, must be a positive number")
    aux_layer_ids = _aux_ids(raw, nested, where, default_aux, num_layers, notes)
    try:
        config = HeadConfig(
            hidden_size=hidden,
            intermediate_size=llama.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=llama.num_key_value_heads,
            head_dim=llama.head_dim,
            vocab_size=vocab,
            draft_vocab_size=raw.get("draft_vocab_size") or vocab,
            target_hidden_size=raw.get("target_hidden_size") or hidden,
            aux_layer_ids=aux_layer_ids,
            max_position_embeddings=llama.max_position_embeddings,
            rms_norm_eps=llama.rms_norm_eps,
            rope_theta=(llama.rope_parameters or {}).get("rope_theta", 10000.0),
            rope_scaling=None if scaling.get("rope_type", "default") == "default" else scaling,
            num_hidden_layers=layer.get("num_hidden_layers", 1),
            attention_bias=_bool(llama.attention_bias, where, "attention_bias"),
            hidden_act=llama.hidden_act,
            **flags,
        )
    except DraftheadError as error:
        raise DraftheadError(f"{where}: {error}") from None
    about = raw.get("drafthead")
    return ReadConfig(
        config=config,
        format="speculators" if speculators else "vllm",
        logit_scale=float(scale),
        provenance=about if isinstance(about, dict) else None,
        notes=tuple(notes),
    )


def _dict(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DraftheadError(f"{where}: {name} is {value!r:.80}, must be a mapping")
    return value


def _bool(value: Any, where: str, name: str) -> bool:
    if not isinstance(value, bool):
        raise DraftheadError(f"{where}: {name} is {value!r:.80}, must be true or false")
    return value


def _refuse_unknown(layer: dict[str, Any], nested: dict[str, Any], where: str) -> None:
    """Refuse what vLLM would compute and this network does not."""
    if (kind := layer.get("model_type", "llama")) not in ("llama", "eagle"):
        raise DraftheadError(
            f"{where}: model_type is {kind!r:.80}; drafthead's head is Llama-like (no norms on "
            "queries and keys)"
        )
    if nested.get("use_aux_hidden_state", True) is not True:
        raise DraftheadError(f"{where}: use_aux_hidden_state is off: that is EAGLE-1, not EAGLE-3")
    if layer.get("mlp_bias"):
        raise DraftheadError(f"{where}: mlp_bias is set; drafthead's MLP has no biases")
    kinds = layer.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise DraftheadError(f"{where}: layer_types is {kinds!r:.80}; only full attention")
    if layer.get("quantization_config"):
        raise DraftheadError(f"{where}: the head is quantized; drafthead reads bf16, fp16 and fp32")


def _llama_defaults(layer: dict[str, Any], where: str) -> Any:
    """What vLLM reads: the fields, and Llama's defaults where they are missing."""
    from transformers import LlamaConfig

    fields = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "max_position_embeddings",
        "attention_bias",
        "vocab_size",
    )
    try:
        return LlamaConfig(**{f: layer[f] for f in fields if layer.get(f) is not None})
    except Exception as error:  # transformers raises what it likes for what it dislikes
        raise DraftheadError(f"{where}: not a Llama configuration: {error}") from error


def _aux_ids(
    raw: dict[str, Any],
    nested: dict[str, Any],
    where: str,
    default_aux: tuple[int, ...] | None,
    num_layers: int | None,
    notes: list[str],
) -> tuple[int, ...]:
    """Aux layer ids as vLLM counts them (id i enters layer i), from wherever they stand."""
    name = "eagle_aux_hidden_state_layer_ids"
    ids = raw.get(name) or nested.get(name)
    if not ids:
        if default_aux is None:
            raise DraftheadError(
                f"{where}: {name} is missing: vLLM then takes (2, n//2, n-3) of its target; say "
                "which target it is for"
            )
        notes.append(f"{name} is missing: vLLM takes {list(default_aux)} for this target")
        return default_aux
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise DraftheadError(f"{where}: {name} is {ids!r:.80}, must be a list of integers")
    if not raw.get(name) and _counts_outputs(ids, num_layers):
        notes.append(
            f"{name} {ids} stands inside eagle_config and counts layer outputs, as SpecForge and "
            f"ModelOpt do; vLLM's ids for the same states are {[i + 1 for i in ids]}"
        )
        ids = [i + 1 for i in ids]
    return tuple(ids)


def _counts_outputs(ids: list[int], num_layers: int | None) -> bool:
    """Whether ids are SpecForge's and ModelOpt's default: 1, n//2 - 1, n - 4 for n layers."""
    if num_layers is None:
        return ids[0] == 1  # vLLM's default starts with 2
    return ids == [1, num_layers // 2 - 1, num_layers - 4]
