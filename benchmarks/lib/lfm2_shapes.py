"""LFM2.5-8B-A1B's exact shapes, with made-up weights that route, and a random head for them.

The target is in ModelOpt NVFP4 without what the real checkpoint is known to leave out; its weights
are those of `spread_weights`. The head lies on disk, with a draft vocabulary of its own: beside
weights that were not loaded vLLM would give it the target's LM head. Acceptance is synthetic.
"""

import json
from pathlib import Path

VOCAB, DRAFT_VOCAB = 128_000, 32_000
ATTENTION = (2, 6, 10, 14, 18, 21)
AUX = (2, 12, 21)
SPREAD = {
    "load_format": "spread",
    "worker_extension_cls": "benchmarks.lib.spread_weights.Spread",
}
"""Settings of vLLM for weights of `spread_weights`."""


def synthetic_acceptance(k: int) -> list[float]:
    """Share of steps whose draft at position 1 … k is accepted: 0.6 of those still right there."""
    return [0.6**i for i in range(1, k + 1)]


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


def draft_vocab(tiny: bool) -> int:
    """Rows of the head's LM head."""
    return 128 if tiny else DRAFT_VOCAB


def write_head(
    folder: Path,
    tiny: bool,
    rows: int,
    *,
    shape: dict | None = None,
    aux: tuple[int, ...] | None = None,
    norms: tuple[str, ...] = (),
) -> None:
    """Write a random head, unless the folder has one.

    Args:
        folder: where to.
        tiny: for the target that a CPU can run.
        rows: of its LM head, the draft vocabulary.
        shape: the target's config.json, if it is not LFM2.5-8B-A1B's.
        aux: ids of its auxiliary layers, then.
        norms: norms that the head has, as `HeadConfig` names them.
    """
    import torch

    from drafthead.head.checkpoint import save_head
    from drafthead.head.config import HeadConfig
    from drafthead.head.formats import Provenance
    from drafthead.head.model import Eagle3Head

    if folder.exists():
        return
    shape = shape or target_config(tiny, False)
    config = HeadConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=4 * shape["hidden_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        vocab_size=shape["vocab_size"],
        draft_vocab_size=rows,
        target_hidden_size=shape["hidden_size"],
        aux_layer_ids=aux or ((2, 4, 5) if tiny else AUX),
        max_position_embeddings=shape["max_position_embeddings"],
        rope_theta=5e6,
        **dict.fromkeys(norms, True),
    )
    torch.manual_seed(0)
    ids = torch.arange(rows) * (shape["vocab_size"] // rows)
    head = Eagle3Head(config)
    head.set_vocab(ids - torch.arange(rows))
    save_head(head, folder, Provenance())


def write_models(work: Path, tiny: bool) -> None:
    """The target's configurations and the random head."""
    for name, quantized in (("bf16", False), ("nvfp4", True)):
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(target_config(tiny, quantized)))
    write_head(work / "head", tiny, draft_vocab(tiny))


def speculation(head: Path | str, k: int, tiny: bool) -> dict:
    """vLLM's `speculative_config` for a head on disk, of its own weights beside a target with
    made-up ones. Acceptance is synthetic, which vLLM's CPU build (``tiny``) does not have."""
    config = {
        "method": "eagle3",
        "model": str(head),
        "num_speculative_tokens": k,
        "draft_load_config": {"load_format": "safetensors"},
    }
    if tiny:
        return config
    synthetic = {"rejection_sample_method": "synthetic"}
    return config | synthetic | {"synthetic_acceptance_rates": synthetic_acceptance(k)}


def start_engine(
    work: Path | str,
    target: str,
    k: int,
    tiny: bool,
    *,
    cache_bytes: int,
    share: float,
    head: str = "head",
    kv: str = "auto",
):
    """An ``LLM`` with spread weights and, for ``k`` above 0, the random head on disk.

    Args:
        work: folder of :func:`write_models`.
        target: ``bf16`` or ``nvfp4``, or what else ``work`` has.
        k: drafts a step; acceptance is synthetic except if ``tiny``.
        tiny: eager, for a CPU.
        cache_bytes: of the KV cache (64 MiB if ``tiny``).
        share: of the GPU's memory, which vLLM only compares with what is free at start.
        head: its name in ``work``.
        kv: dtype of the KV cache.
    """
    from vllm import LLM

    speculative = speculation(f"{work}/{head}", k, tiny) if k else None
    memory = {"kv_cache_memory_bytes": (64 << 20) if tiny else cache_bytes}
    if not tiny:
        memory["gpu_memory_utilization"] = share
    return LLM(
        f"{work}/{target}",
        **SPREAD,
        skip_tokenizer_init=True,
        max_model_len=512 if tiny else 2048,
        max_num_seqs=4,
        kv_cache_dtype=kv,
        enforce_eager=tiny,
        speculative_config=speculative,
        **memory,
    )
