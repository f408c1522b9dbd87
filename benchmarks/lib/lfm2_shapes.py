"""LFM2.5-8B-A1B's exact shapes, with made-up weights that route, and random heads for them.

The target is in ModelOpt NVFP4 without what the real checkpoint is known to leave out; its weights
are those of `spread_weights`. A head lies on disk, with a draft vocabulary of its own: beside
weights that were not loaded vLLM would give it the target's LM head. Acceptance is synthetic, by
position as a trained head's was measured.
"""

import json
from collections.abc import Sequence
from pathlib import Path

VOCAB, DRAFT_VOCAB = 128_000, 32_000
ATTENTION = (2, 6, 10, 14, 18, 21)
AUX = (2, 12, 21)
DSPARK_AUX = (3, 7, 11, 15, 19)
DSPARK = {"num_hidden_layers": 3, "block_size": 8, "markov_rank": 256}
HEADS = {"eagle3": "head", "dspark": "dspark"}
"""Folders of the heads, by kind."""
SPREAD = {
    "load_format": "spread",
    "worker_extension_cls": "benchmarks.lib.spread_weights.Spread",
}
"""Settings of vLLM for weights of `spread_weights`."""


CURVE = {"target": "smollm2-nvfp4", "head": "duel/drafthead", "k": 5}
"""The served head in quality.json whose acceptance stands in for that of the random ones."""


def measured_curve() -> list[float]:
    """Share of steps whose draft at position 1 … 5 was accepted: `CURVE`, an EAGLE-3 head's."""
    record = json.loads((Path(__file__).parents[1] / "results" / "quality.json").read_text())
    served = (one for run in record["runs"] for one in run.get("served", ()))
    found = next(one for one in served if CURVE.items() <= one.items())
    return found["timed"]["acceptance_by_position"]


def synthetic_acceptance(k: int, curve: Sequence[float] = ()) -> list[float]:
    """Share of steps whose draft at position 1 … k is accepted: ``curve``, by default
    `measured_curve`; behind its end each position keeps the last one's share of those before."""
    rates = list(curve) or measured_curve()
    kept = rates[-1] / rates[-2] if len(rates) > 1 and rates[-2] else rates[-1]
    while len(rates) < k:
        rates.append(rates[-1] * kept)
    return rates[:k]


def target_config(tiny: bool, quantized: bool) -> dict:
    """LFM2.5-8B-A1B's config.json, or one of its layer pattern that a CPU can run."""
    layers = 8 if tiny else 24
    attention = (2, 6) if tiny else ATTENTION
    config = {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "hidden_size": 64 if tiny else 2048,
        "intermediate_size": 128 if tiny else 7168,
        "moe_intermediate_size": 64 if tiny else 1792,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 if tiny else 32,
        "num_key_value_heads": 1 if tiny else 8,
        "num_dense_layers": 2,
        "num_experts": 4 if tiny else 32,
        "num_experts_per_tok": 2 if tiny else 4,
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(layers)],
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "vocab_size": 512 if tiny else VOCAB,
        "max_position_embeddings": 512 if tiny else VOCAB,
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "dtype": "float32" if tiny else "bfloat16",
    }
    if quantized:
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "producer": {"name": "modelopt", "version": "0.44.0"},
            "config_groups": {
                "group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}
            },
            "ignore": ["lm_head", "model.embed_tokens", "*.conv.*", "*.feed_forward.gate"],
        }
    return config


def write_heads(
    work: Path,
    shape: dict,
    rows: int,
    aux: tuple[int, ...],
    dspark_aux: tuple[int, ...],
) -> None:
    """Write a random head of each kind into ``work`` (`HEADS`), as `drafthead` makes them by
    default (DSpark: three layers, blocks of eight); those that lie there are kept.

    Args:
        work: folder.
        shape: the target's config.json.
        rows: of the LM heads, the draft vocabulary.
        aux: ids of the auxiliary layers, as those that enter a layer.
        dspark_aux: those of the DSpark head.
    """
    import torch

    from drafthead.drafters.dspark import checkpoint
    from drafthead.drafters.dspark.config import DSparkConfig
    from drafthead.drafters.dspark.model import DSparkHead
    from drafthead.head.checkpoint import save_head
    from drafthead.head.config import HeadConfig
    from drafthead.head.formats import Provenance
    from drafthead.head.model import Eagle3Head

    common = {
        "hidden_size": shape["hidden_size"],
        "intermediate_size": 4 * shape["hidden_size"],
        "num_attention_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape["num_key_value_heads"],
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "vocab_size": shape["vocab_size"],
        "draft_vocab_size": rows,
        "target_hidden_size": shape["hidden_size"],
        "max_position_embeddings": shape["max_position_embeddings"],
        "rope_theta": 5e6,
    }
    offsets = torch.arange(rows) * (shape["vocab_size"] // rows - 1)
    torch.manual_seed(0)
    if not (work / HEADS["eagle3"]).exists():
        norms = dict.fromkeys(("fc_norm", "norm_before_residual", "norm_output"), True)
        head = Eagle3Head(HeadConfig(aux_layer_ids=aux, **norms, **common))
        head.set_vocab(offsets)
        save_head(head, work / HEADS["eagle3"], Provenance())
    if not (work / HEADS["dspark"]).exists():
        last = shape["vocab_size"] - 1
        layers = {"aux_layer_ids": dspark_aux, "num_target_layers": shape["num_hidden_layers"]}
        block = DSparkHead(DSparkConfig(mask_token_id=last, **layers, **DSPARK, **common))
        block.d2t.copy_(offsets)
        checkpoint.save_head(block, work / HEADS["dspark"], {})


def write_models(work: Path, tiny: bool) -> None:
    """The target's configurations and the random heads."""
    for name, quantized in (("bf16", False), ("nvfp4", True)):
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(target_config(tiny, quantized)))
    aux, dspark_aux = ((2, 4, 5), (2, 4, 6)) if tiny else (AUX, DSPARK_AUX)
    write_heads(work, target_config(tiny, False), 128 if tiny else DRAFT_VOCAB, aux, dspark_aux)


def speculation(
    head: Path | str, k: int, tiny: bool, curve: Sequence[float] = (), kind: str = "eagle3"
) -> dict:
    """vLLM's `speculative_config` for a head on disk, of its own weights beside a target with
    made-up ones. Acceptance is synthetic (see `synthetic_acceptance`), which vLLM's CPU build
    (``tiny``) does not have."""
    config = {
        "method": kind,
        "model": str(head),
        "num_speculative_tokens": k,
        "draft_load_config": {"load_format": "safetensors"},
    }
    if tiny:
        return config
    synthetic = {"rejection_sample_method": "synthetic"}
    return config | synthetic | {"synthetic_acceptance_rates": synthetic_acceptance(k, curve)}


def engine_arguments(target: Path | str, tiny: bool, *, sequences: int, cache_bytes: int) -> dict:
    """vLLM's arguments for ``target``, a folder, with spread weights.

    Args:
        target: a folder with config.json.
        tiny: eager, for a CPU.
        sequences: at once, at most.
        cache_bytes: of the KV cache (128 MiB if ``tiny``).
    """
    return {
        "model": str(target),
        **SPREAD,
        "skip_tokenizer_init": True,
        "max_model_len": 512 if tiny else 2048,
        "max_num_seqs": sequences,
        "kv_cache_memory_bytes": (128 << 20) if tiny else cache_bytes,
        # vLLM only compares this share with what is free at start.
        **({"enforce_eager": True} if tiny else {"gpu_memory_utilization": 0.05}),
    }
