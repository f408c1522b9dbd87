"""LFM2.5-8B-A1B's exact shapes with dummy weights: does every k start and run?

    python -m benchmarks.lib.lfm2_shapes --out results/shapes                 # k = 1..7
    python -m benchmarks.lib.lfm2_shapes --out /tmp/s --tiny                  # rehearsal on a CPU

The target's weights are dummies (`load_format="dummy"`) in ModelOpt NVFP4, with what the real
checkpoint is known to leave out left out; the head is random, with a draft vocabulary of its own,
written to disk and loaded, because with dummy weights vLLM would give it the target's LM head.

Engines run side by side, so only "started and ran" is claimed; what a step costs is measured by
`step_cost.py`. Acceptance is synthetic and so stated. Writes OUT/lfm2_shapes.json after every
engine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VOCAB, DRAFT_VOCAB = 128_000, 32_000
ATTENTION = (2, 6, 10, 14, 18, 21)
AUX = (2, 12, 21)


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
    """A random head with a draft vocabulary of so many rows; one that is there is kept.

    Args:
        folder: where to.
        tiny: for the target that a CPU can run.
        rows: of its LM head.
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
    """vLLM's `speculative_config` for a head on disk, of its own weights beside a target with dummy
    ones. Acceptance is synthetic, which vLLM's CPU build (``tiny``) does not have."""
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
    log_stats: bool = False,
    worker_extension_cls: str = "",
):
    """An ``LLM`` with dummy weights and, for ``k`` above 0, the random head on disk.

    Args:
        work: folder of :func:`write_models`.
        target: ``bf16`` or ``nvfp4``, or what else ``work`` has.
        k: drafts a step; acceptance is synthetic except if ``tiny``.
        tiny: eager, for a CPU.
        cache_bytes: of the KV cache (64 MiB if ``tiny``).
        share: of the GPU's memory, which vLLM only compares with what is free at start.
        head: its name in ``work``.
        kv: dtype of the KV cache.
        log_stats: keep the engine's counters.
        worker_extension_cls: as in vLLM.
    """
    from vllm import LLM

    speculative = speculation(f"{work}/{head}", k, tiny) if k else None
    memory = {"kv_cache_memory_bytes": (64 << 20) if tiny else cache_bytes}
    if not tiny:
        memory["gpu_memory_utilization"] = share
    return LLM(
        f"{work}/{target}",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512 if tiny else 2048,
        max_num_seqs=4,
        kv_cache_dtype=kv,
        enforce_eager=tiny,
        disable_log_stats=not log_stats,
        speculative_config=speculative,
        worker_extension_cls=worker_extension_cls,
        **memory,
    )


def run_engine(spec: dict) -> None:
    """Child process: one engine; prints its result as the last line."""
    from vllm import SamplingParams

    tiny = spec["tiny"]
    begun = time.monotonic()
    engine = start_engine(
        spec["work"],
        spec["target"],
        spec["k"],
        tiny,
        cache_bytes=2 << 30,
        share=spec["share"],
        kv=spec["kv"],
        log_stats=True,
    )
    started = time.monotonic() - begun
    tokens = 16 if tiny else 256
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": [1 + (i * 31) % 500 for i in range(64)]}
    out = engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert len(out) == tokens
    counters = {
        m.name: getattr(m, "value", None)
        for m in engine.get_metrics()
        if m.name.startswith("vllm:spec_decode_num")
    }
    drafts = counters.get("vllm:spec_decode_num_drafts")
    accepted = counters.get("vllm:spec_decode_num_accepted_tokens")
    result = {
        "started_s": round(started, 1),
        "tokens_a_step": round(1 + accepted / drafts, 3) if drafts else 1.0,
    }
    print("RESULT " + json.dumps(result), flush=True)


def launch(spec: dict, limit: float, out: Path) -> dict:
    """Run one engine in a process of its own, with a limit."""
    name = "-".join(str(spec[key]) for key in ("target", "kv")) + f"-k{spec['k']}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--engine", json.dumps(spec), "--out", str(out)],
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        output = done.stdout
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        found = json.loads(lines[-1][7:]) if lines else {"failed": output[-1500:]}
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        found = {"failed": f"not done in {limit} s; " + text[-800:]}
    print(name, json.dumps(found)[:300], flush=True)
    return {"name": name, "target": spec["target"], "kv": spec["kv"], "k": spec["k"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/lfm2_shapes"))
    parser.add_argument("--k", default="1,2,3,4,5,6,7")
    parser.add_argument("--kv", default="auto,fp8")
    parser.add_argument("--targets", default="nvfp4")
    parser.add_argument("--jobs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=280)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(json.loads(args.engine))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_models(args.work, args.tiny)
    ks = [int(k) for k in args.k.split(",")]
    specs = [
        {"target": target, "kv": kv, "k": k}
        for target in args.targets.split(",")
        for kv in (["auto"] if args.tiny else args.kv.split(","))
        for k in ks
    ]
    jobs = 1 if args.tiny else args.jobs
    for spec in specs:
        spec |= {"work": str(args.work), "tiny": args.tiny, "share": 0.85 / jobs}
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda spec: launch(spec, args.limit, args.out), specs):
            results.append(found)
            record = {
                "command": " ".join(["python", *sys.argv]),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "acceptance": "synthetic, 0.6 at every position",
                "engines": results,
            }
            (args.out / "lfm2_shapes.json").write_text(json.dumps(record, indent=1))
    failed = [found["name"] for found in results if "failed" in found]
    print(f"{len(results) - len(failed)} of {len(results)} engines started and ran", failed)


if __name__ == "__main__":
    main()
