"""The two `config.json` of an EAGLE-3 head: vLLM's own and the speculators library's.

A head is read as vLLM 0.32 reads it, with the same defaults (`tests/odd_heads.py` has what was seen
of vLLM). SGLang, SpecForge and ModelOpt keep the aux layer ids inside `eagle_config` alone, where
they count layer *outputs*, one lower than vLLM's; vLLM's older runner takes those for inputs. So
ids that stand only there are refused, unless something else in the file says whose they are.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from drafthead import __version__
from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.head.config import SMALLEST_WINDOW, HeadConfig
from drafthead.targets import Target

Format = Literal["vllm", "speculators"]
NATIVE_ARCHITECTURES = ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3", "LlamaForCausalLM")
OTHER_KINDS = ("peagle", "dflash", "dflash2", "mtp")
"""Other drafters of speculators' that vLLM serves."""
OTHER_ARCHITECTURES = {
    "DFlashDraftModel": "DFlash (z-lab's, vLLM's method dflash)",
    "DFlash2DraftModel": "DFlash2 (vLLM's method dflash)",
    "PEagleDraftModel": "P-EAGLE",
    "PeagleLlamaForCausalLM": "P-EAGLE",
}
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# What vLLM takes for a missing field: in its own format transformers' LlamaConfig, in speculators'
# only what the model's code asks for with a default.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = {"max_position_embeddings": 8192, "attention_bias": False}
# Keys of `eagle_config` that ModelOpt alone writes (0.47, `export/plugins/hf_spec_configs.py`).
MODELOPT = {"use_input_layernorm_in_first_layer", "use_last_layernorm", "use_mtp_layernorm"}


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
    tied: bool
    """`tie_word_embeddings`, which vLLM ignores in a head."""
    notes: tuple[str, ...]
    """What had to be assumed."""
    problems: tuple[str, ...]
    """What vLLM cannot serve, though the head can be read."""


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
        **(
            {"layer_types": list(config.layer_types), "sliding_window": config.sliding_window}
            if config.layer_types
            else {}
        ),
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
            # Of vLLM's names the one that SGLang and llama.cpp have, too.
            "architectures": ["LlamaForCausalLMEagle3"],
            **layer,
            **common,
            # SGLang reads the layers here and nowhere else, as outputs; TensorRT-LLM the norm.
            "eagle_config": {
                "use_aux_hidden_state": True,
                AUX_IDS: [i - 1 for i in aux],
                **({"norm_before_fc": True} if config.norm_before_fc else {}),
            },
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


def read_config(raw: Any, where: str, target: Target | None = None) -> ReadConfig:
    """Understand a head's `config.json`.

    Args:
        raw: the parsed JSON.
        where: what errors call it.
        target: the model that the head is for. It says which aux layers vLLM takes when none are
            named, tells apart the two ways of counting them, and may have a window.

    Raises:
        UnsupportedHead: vLLM may serve it, drafthead cannot compute it.
        DraftheadError: no EAGLE-3 head, or one that vLLM cannot serve.
    """
    if not isinstance(raw, dict):
        raise DraftheadError(f"{where}: holds {type(raw).__name__}, not a configuration")
    notes: list[str] = []
    problems: list[str] = []
    # Which format, and where it keeps the decoder layer's fields.
    speculators = "speculators_model_type" in raw or "speculators_config" in raw
    if speculators:
        kind = raw.get("speculators_model_type")
        if kind in OTHER_KINDS:
            raise UnsupportedHead(f"{where}: speculators_model_type is {kind!r}, not 'eagle3'")
        if kind != "eagle3":
            raise DraftheadError(f"{where}: speculators_model_type is {kind!r:.80}, not 'eagle3'")
        layer = _dict(raw.get("transformer_layer_config"), where, "transformer_layer_config")
        nested: dict[str, Any] = {}
    else:
        layer = raw
        nested = _dict(raw.get("eagle_config") or {}, where, "eagle_config")
        _check_architecture(raw.get("architectures"), where)
    _refuse_unsupported(layer, nested, where)

    # The layer's fields, and for missing ones what vLLM takes.
    given: dict[str, Any] = {**(SPECULATORS if speculators else LLAMA), **layer}
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    if speculators:
        for name in LLAMA:
            if name not in given:
                raise DraftheadError(
                    f"{where}: transformer_layer_config.{name} is missing; vLLM has no default "
                    "for it in speculators' format"
                )
        kv_heads = given.get("num_key_value_heads", heads)
        target_hidden = raw.get("target_hidden_size") or hidden
    else:
        kv_heads = (
            heads if given.get("num_key_value_heads") is None else layer["num_key_value_heads"]
        )
        target_hidden = raw.get("target_hidden_size", hidden)
        if "draft_vocab_size" not in raw:
            notes.append("draft_vocab_size is missing: the head drafts the whole vocabulary")
    head_dim = given.get("head_dim")
    if not head_dim and type(heads) is type(hidden) is int and heads > 0:
        head_dim = hidden // heads

    # The head's own fields.
    flags = {flag: _flag(raw, where, flag) for flag in FLAGS}
    if speculators and "norm_before_residual" not in raw:
        flags["norm_before_residual"] = True
        notes.append("norm_before_residual is missing, which means true in speculators' format")
    if "norm_before_fc" in nested:
        flags["norm_before_fc"] = _flag(nested, where, "norm_before_fc")
    scale = raw.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6:
        raise DraftheadError(f"{where}: logit_scale is {scale!r:.80}, must be a positive number")
    theta, scaling = _rope(given, where, notes)
    aux_layer_ids = _aux_ids(raw, nested, where, target, notes)
    windows = _windows(given, where, target, notes)
    if raw.get(AUX_IDS) or nested.get(AUX_IDS):
        problems += _aux_count(layer, nested, len(aux_layer_ids))
    fields: dict[str, Any] = {name: given[name] for name in LLAMA} | {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "draft_vocab_size": raw.get("draft_vocab_size") or given["vocab_size"],
        "target_hidden_size": target_hidden,
        "aux_layer_ids": aux_layer_ids,
        "rope_theta": theta,
        "rope_scaling": scaling,
        **windows,
        **flags,
    }
    try:
        config = HeadConfig(**fields)
    except DraftheadError as error:
        raise DraftheadError("\n".join(f"{where}: {x}" for x in str(error).split("\n"))) from None
    about = raw.get("drafthead")
    return ReadConfig(
        config=config,
        format="speculators" if speculators else "vllm",
        logit_scale=float(scale),
        provenance=about if isinstance(about, dict) else None,
        tied=layer.get("tie_word_embeddings") is True,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _dict(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DraftheadError(f"{where}: {name} is {value!r:.80}, must be a mapping")
    return value


def _flag(holder: dict[str, Any], where: str, name: str) -> bool:
    """A flag of a head; null is false to vLLM."""
    value = holder.get(name)
    if value is not None and not isinstance(value, bool):
        raise DraftheadError(f"{where}: {name} is {value!r:.80}, must be true or false")
    return bool(value)


def _check_architecture(names: Any, where: str) -> None:
    """Refuse heads that are not EAGLE-3, and report vLLM's heads that are not Llama-like as
    unsupported."""
    name = names[0] if isinstance(names, list) and names else None
    if name in NATIVE_ARCHITECTURES:
        return
    if isinstance(name, str) and name in OTHER_ARCHITECTURES:
        raise UnsupportedHead(
            f"{where}: a head of the kind {OTHER_ARCHITECTURES[name]}; drafthead computes EAGLE-3 "
            "and DSpark, and has no conversion to these"
        )
    if isinstance(name, str) and "Eagle3" in name:
        raise UnsupportedHead(
            f"{where}: architectures is {names!r:.80}; drafthead has Llama's only"
        )
    raise DraftheadError(
        f"{where}: architectures is {names!r:.80}, not an EAGLE-3 head that drafthead knows "
        f"({', '.join(NATIVE_ARCHITECTURES)}, or speculators' format)"
    )


def _refuse_unsupported(layer: dict[str, Any], nested: dict[str, Any], where: str) -> None:
    """Refuse what vLLM would compute and this network does not."""
    if nested.get("use_aux_hidden_state", True) is not True:
        raise DraftheadError(f"{where}: use_aux_hidden_state is off: that is EAGLE-1, not EAGLE-3")
    if (kind := layer.get("model_type", "llama")) not in ("llama", "eagle"):
        raise UnsupportedHead(
            f"{where}: model_type is {kind!r:.80}; drafthead's head is Llama-like (no norms on "
            "queries and keys)"
        )
    for name, has in (
        ("quantization_config", "weights in bf16, fp16 and fp32"),
        ("mlp_bias", "no biases in its MLP"),
        ("bias", "no such field; attention_bias is for all four projections"),
    ):
        if value := layer.get(name):
            raise UnsupportedHead(f"{where}: {name} is {value!r:.80}; drafthead has {has}")
    if layer.get("is_causal", True) is not True:
        raise UnsupportedHead(f"{where}: is_causal is off; drafthead's attention is causal")


def _rope(given: dict[str, Any], where: str, notes: list[str]) -> tuple[Any, dict[str, Any] | None]:
    """RoPE's theta and its scaling, as transformers finds them in what older and newer versions of
    it write: `rope_scaling` before `rope_parameters`, and theta inside of these before outside."""
    rope = _dict(given.get("rope_scaling") or given.get("rope_parameters") or {}, where, "rope")
    outside = given.get("rope_theta", 10000.0)
    theta = rope.get("rope_theta", outside)
    if theta != outside and "rope_theta" in given:
        notes.append(
            f"rope_theta is {outside!r:.40}, and {theta!r:.40} in rope_parameters: vLLM takes that"
        )
    part = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if part not in (None, 1) or rope.get("rope_dim"):
        raise UnsupportedHead(
            f"{where}: RoPE over a part of each head; drafthead rotates the whole head"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UnsupportedHead(
            f"{where}: rope_type is {kind!r:.80}; drafthead has default, linear, llama3"
        )
    left_out = ("rope_theta", "partial_rotary_factor", "type")
    scaling = {k: v for k, v in rope.items() if k not in left_out} | {"rope_type": kind}
    if kind == "llama3":
        name = "original_max_position_embeddings"
        scaling.setdefault(name, given.get(name, given["max_position_embeddings"]))
    return theta, scaling


def _windows(
    given: dict[str, Any], where: str, target: Target | None, notes: list[str]
) -> dict[str, Any]:
    """`layer_types` and `sliding_window` of `HeadConfig`. A layer without a window gets the
    target's, if all of the target's layers have one."""
    layers, kinds = given["num_hidden_layers"], given.get("layer_types")
    shared = target.sliding_window if target else None
    if kinds is None and shared is None:
        return {}
    if kinds is None and type(layers) is int:
        kinds = ["full_attention"] * min(layers, 64)  # HeadConfig takes no more
    if not isinstance(kinds, list):
        raise DraftheadError(f"{where}: layer_types is {kinds!r:.80}, must be a list")
    if not all(isinstance(kind, str) for kind in kinds):
        raise DraftheadError(f"{where}: layer_types is {kinds!r:.80}, must be a list of names")
    if others := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedHead(f"{where}: layer_types has {others!r:.80}")
    sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and "sliding_window" not in given:
        raise DraftheadError(f"{where}: sliding_window is missing, layer_types is {kinds!r:.80}")
    window_size = given.get("sliding_window")
    windows = [window_size if slides and window_size is not None else shared for slides in sliding]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1 or any(type(w) is int and 0 < w < SMALLEST_WINDOW for w in sizes):
        raise UnsupportedHead(
            f"{where}: sliding_window {windows} of its layers; drafthead has one for all, of at "
            f"least {SMALLEST_WINDOW} positions"
        )
    if None in windows and sizes:
        notes.append(
            "layer_types has layers with a window and without: vLLM's V1 model runner does not "
            "start with such a head"
        )
    return {
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "sliding_window": sizes.pop() if sizes else None,
    }


def _aux_ids(
    raw: dict[str, Any],
    nested: dict[str, Any],
    where: str,
    target: Target | None,
    notes: list[str],
) -> tuple[int, ...]:
    """Aux layer ids as vLLM counts them (id i enters layer i), from wherever they stand."""
    top, inner = raw.get(AUX_IDS), nested.get(AUX_IDS)
    for ids in (top, inner):
        if ids and (not isinstance(ids, list) or not all(type(i) is int for i in ids)):
            raise DraftheadError(f"{where}: {AUX_IDS} is {ids!r:.80}, must be a list of integers")
    if not top and not inner:
        if target is None:
            raise DraftheadError(
                f"{where}: {AUX_IDS} is missing: vLLM then takes (2, n//2, n-3) of its target; say "
                "which target it is for"
            )
        default = target.default_aux_layers()
        notes.append(f"{AUX_IDS} is missing: vLLM takes {list(default)} for this target")
        return default
    moved = [i + 1 for i in inner or ()]
    if top:
        if inner and top not in (inner, moved):
            raise DraftheadError(
                f"{where}: {AUX_IDS} is {top} at the top (vLLM: inputs of layers) and {inner} in "
                f"eagle_config (SGLang: outputs, so inputs of {moved}): which of the two?",
                field=AUX_IDS,
            )
        return tuple(top)
    if not (MODELOPT & nested.keys() or _default_outputs(inner, target)):
        raise DraftheadError(
            f"{where}: {AUX_IDS} {inner} stands only inside eagle_config and could mean two "
            f"things: outputs of layers (SGLang, SpecForge, ModelOpt), which are the inputs of "
            f"{moved}, or inputs (vLLM's older model runner). Say which: `drafthead convert HEAD "
            "OUT --layer-ids outputs` (or inputs)",
            field=AUX_IDS,
        )
    notes.append(
        f"{AUX_IDS} {inner} stands inside eagle_config and counts layer outputs, as SpecForge "
        f"and ModelOpt do; vLLM's ids for the same states are {moved}"
    )
    return tuple(moved)


def _default_outputs(ids: Any, target: Target | None) -> bool:
    """Whether ids are SpecForge's and ModelOpt's default: 1, n//2 - 1, n - 4 for n layers."""
    return target is not None and ids == [1, target.num_layers // 2 - 1, target.num_layers - 4]


def _aux_count(layer: dict[str, Any], nested: dict[str, Any], count: int) -> list[str]:
    """vLLM does not count the ids at the top: it takes `num_aux_hidden_states`, else the number of
    ids inside `eagle_config`, else 3."""
    name = "num_aux_hidden_states"
    taken = layer.get(name)
    if taken is None:
        taken = len(nested[AUX_IDS]) if nested.get(AUX_IDS) else 3
    if taken == count:
        return []
    return [
        f"{name} is {layer.get(name)}, so vLLM takes {taken}, of {count} aux layers: write {count}"
    ]
