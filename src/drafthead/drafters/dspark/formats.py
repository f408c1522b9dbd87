"""The `config.json` of a DSpark head: vLLM's own and the speculators library's.

Layers are counted in two ways: `eagle_aux_hidden_state_layer_ids` (and speculators'
`aux_hidden_state_layer_ids`) mean the input of layer i, `target_layer_ids` the output of layer i,
one lower for the same states. Others write less, or put it elsewhere: SpecForge and ModelOpt nest
Markov's settings, Liquid has names of its own. What could mean two things is refused.
"""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import ValidationError

from drafthead.drafters.base import architecture
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.errors import DraftheadError, UnsupportedHead

Format = Literal["vllm", "speculators"]
ARCHITECTURE = "Qwen3DSparkModel"
KNOWN = (ARCHITECTURE, "DSparkDraftModel", "DSparkSpeculator", "Lfm2DSparkDraftModel")
SHARED = "DFlashDraftModel"
"""ModelOpt gives its DSpark heads the architecture of DFlash heads."""


def write_config(
    config: DSparkConfig, format: Format, about: dict[str, Any], verifier: dict[str, Any]
) -> dict[str, Any]:
    """The `config.json` of a head. about: written under `drafthead`, which others ignore.
    verifier: speculators' name and architectures of the target."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    layer = {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "tie_word_embeddings": False,
    }
    common = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": True,
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_with_markov,
        "dtype": "bfloat16",
        "drafthead": about,
    }
    aux = list(config.aux_layer_ids)
    if format == "speculators":
        if config.causal or not config.is_neox_style:
            raise DraftheadError(
                "speculators' format cannot say that a head's blocks are causal or its RoPE "
                "interleaved"
            )
        return {
            "architectures": ["DSparkSpeculator"],
            "speculators_model_type": "dspark",
            "speculators_version": "0.9.0",
            "speculators_config": {
                "algorithm": "dspark",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": config.block_size}
                ],
                "verifier": verifier,
            },
            "transformer_layer_config": {"architectures": ["Qwen3ForCausalLM"], **layer},
            "aux_hidden_state_layer_ids": aux,
            "tie_word_embeddings": False,
            **common,
        }
    outputs = [layer_id - 1 for layer_id in aux]
    nested: dict[str, Any] = {
        "projector_type": "dspark",
        "target_layer_ids": outputs,
        "mask_token_id": config.mask_token_id,
        "use_aux_hidden_state": True,
    }
    if config.num_target_layers is not None:  # mlx-vlm wants it to be the target's
        nested["num_target_layers"] = config.num_target_layers
    causal: dict[str, Any] = {}
    if config.causal:
        nested["causal"] = causal["is_causal"] = True
    return {
        "architectures": [ARCHITECTURE],
        **layer,
        "is_neox_style": config.is_neox_style,  # vLLM's name
        "rope_is_neox_style": config.is_neox_style,  # SGLang's, mlx-vlm's and llama.cpp's
        **causal,
        "eagle_aux_hidden_state_layer_ids": aux,
        "target_layer_ids": outputs,
        "dflash_config": nested,
        **common,
    }


def is_dspark(raw: Any) -> bool:
    """Whether a `config.json` is of a DSpark head, in any dialect."""
    if not isinstance(raw, dict):
        return False
    name, nested = architecture(raw), raw.get("dflash_config")
    if name == SHARED and isinstance(nested, dict):
        projector = nested.get("projector_type")
        markov = nested.get("markov_rank") or raw.get("markov_rank")
        return projector == "dspark" or (projector is None and bool(markov))
    return raw.get("speculators_model_type") == "dspark" or name in KNOWN


def read_config(raw: Any, where: str) -> DSparkConfig:
    """Understand a head's `config.json`. where: what errors call it.

    Raises:
        DraftheadError: no DSpark head, one that this network cannot compute, or one whose
            settings contradict each other.
    """
    if not isinstance(raw, dict) or not is_dspark(raw):
        raise DraftheadError(f"{where}: no configuration of a DSpark head ({', '.join(KNOWN)})")
    speculators = "speculators_model_type" in raw
    layer = _mapping(raw, "transformer_layer_config", where) if speculators else raw
    nested, dspark = (_mapping(raw, name, where) for name in ("dflash_config", "dspark_config"))
    rope = _mapping(layer, "rope_parameters", where) or _mapping(layer, "rope_scaling", where)

    def given(*names: str, default: Any = None) -> Any:
        """A setting that may stand in several places, or have several names, where it must be the
        same."""
        values = {
            f"{place}{name}": part[name]
            for place, part in (("", raw), ("dflash_config.", nested), ("dspark_config.", dspark))
            for name in names
            if part.get(name) is not None
        }
        found = list(values.values())
        if any(value != found[0] for value in found[1:]):
            said = " and ".join(f"{name} is {value!r:.80}" for name, value in values.items())
            raise DraftheadError(f"{where}: {said}: which?", field=names[0])
        return found[0] if found else default

    bonus = given("dspark_bonus_anchor")
    anchor = given("sample_from_anchor", "shift_label", default=not (bonus or speculators))
    _refuse(raw, layer, nested, given, anchor, rope, where)
    if bonus is not None and bonus is anchor:
        raise DraftheadError(
            f"{where}: sample_from_anchor is {anchor} (a block's first slot drafts) and "
            f"dspark_bonus_anchor is {bonus} (it does not): which?",
            field="sample_from_anchor",
        )
    hidden, heads = layer.get("hidden_size"), layer.get("num_attention_heads")
    vocab = layer.get("vocab_size")
    values = {
        "hidden_size": hidden,
        "intermediate_size": layer.get("intermediate_size"),
        "num_hidden_layers": layer.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": layer.get("num_key_value_heads") or heads,
        "head_dim": layer.get("head_dim") or _quotient(hidden, heads),
        "vocab_size": vocab,
        "draft_vocab_size": given("draft_vocab_size") or vocab,
        "target_hidden_size": given("target_hidden_size") or hidden,
        "num_target_layers": given("num_target_layers"),
        "aux_layer_ids": _aux_layers(raw, nested, dspark, where),
        "max_position_embeddings": layer.get("max_position_embeddings"),
        "block_size": given("block_size"),
        "mask_token_id": given("mask_token_id"),
        "markov_rank": given("markov_rank"),
        "confidence_head": given("enable_confidence_head", "use_confidence_head", default=False),
        "confidence_with_markov": given("confidence_head_with_markov", default=False),
        "causal": given("is_causal", "causal", default=False),
        "rms_norm_eps": layer.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or layer.get("rope_theta") or 1e6,
        "is_neox_style": given("is_neox_style", "rope_is_neox_style", default=True),
        "own_lm_head": True,
    }
    try:
        return DSparkConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        value = f" is {first['input']!r:.80}" if field else ""
        raise DraftheadError(f"{where}: {field}{value}: {first['msg']}", field=field) from None


def _aux_layers(raw: dict, nested: dict, dspark: dict, where: str) -> tuple[int, ...]:
    """The layers whose inputs the head reads, from all places that name them."""
    inputs = [
        place[name]
        for place in (raw, dspark)
        for name in ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
        if place.get(name)
    ]
    outputs = [
        place["target_layer_ids"]
        for place in (raw, nested, dspark)
        if place.get("target_layer_ids")
    ]
    try:
        layers = [list(ids) for ids in inputs] + [[i + 1 for i in ids] for ids in outputs]
    except TypeError:
        raise DraftheadError(f"{where}: its layer ids are no lists of integers") from None
    if not layers:
        raise DraftheadError(f"{where}: names no layers of the target to read")
    if any(ids != layers[0] for ids in layers):
        raise DraftheadError(
            f"{where}: eagle_aux_hidden_state_layer_ids (inputs of layers) and target_layer_ids "
            f"(outputs, one lower) name different states: {layers!r:.200}, as inputs"
        )
    return tuple(layers[0])


def _mapping(place: dict, name: str, where: str) -> dict[str, Any]:
    """A part of a configuration, empty if it is not there."""
    value = place.get(name)
    if value is not None and not isinstance(value, dict):
        raise DraftheadError(f"{where}: {name} is {value!r:.80}, must be a mapping", field=name)
    return value or {}


def _quotient(a: Any, b: Any) -> int | None:
    """a // b of whole numbers; None of anything else, which is refused as such."""
    return a // b if type(a) is int and type(b) is int and b else None


def _refuse(
    raw: dict,
    layer: dict,
    nested: dict,
    given: Callable[..., Any],
    anchor: Any,
    rope: dict,
    where: str,
) -> None:
    """Raise for what this network does not compute, and for what is no DSpark head after all."""
    if architecture(raw) == "DSparkDraftModel" and layer.get("model_type") != "qwen3":
        raise DraftheadError(
            f"{where}: architectures is DSparkDraftModel and model_type "
            f"{layer.get('model_type')!r:.80}: SpecForge's heads (model_type qwen3) and "
            "DeepSeek-V4's (deepseek_v4) both have that name; write the model_type",
            field="model_type",
        )
    if architecture(raw) == SHARED and nested.get("projector_type") is None:
        raise DraftheadError(
            f"{where}: architectures is {SHARED} and there is a markov_rank: a DFlash head (which "
            "has none), or ModelOpt's DSpark (dflash_config.projector_type: dspark); write which",
            field="dflash_config.projector_type",
        )
    projector = nested.get("projector_type", "dspark")
    kind = given("markov_head_type", default="vanilla")
    rope_type = rope.get("rope_type", rope.get("type"))
    kinds = layer.get("layer_types") or []
    sliding = not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    for wrong, what in (
        (projector != "dspark", f"projector_type {projector!r:.80}, not 'dspark'"),
        (kind != "vanilla", f"markov_head_type {kind!r:.80}: vLLM serves only 'vanilla'"),
        (anchor is not True, "sample_from_anchor is false: its first slot drafts nothing"),
        (rope_type not in (None, "default"), f"rope_type {rope_type!r:.80}"),
        (sliding or nested.get("use_swa"), f"layer_types {kinds!r:.80}: sliding attention"),
        (nested.get("attention_sink_bias"), "attention_sink_bias"),
        (layer.get("attention_bias"), "attention_bias"),
        (layer.get("hidden_act", "silu") != "silu", f"hidden_act {layer.get('hidden_act')!r:.80}"),
        (layer.get("quantization_config"), "quantized weights"),
    ):
        if wrong:
            raise UnsupportedHead(f"{where}: {what}; drafthead does not compute that")
