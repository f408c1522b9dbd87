"""What a speculative step costs beside a plain one, at a real target's shapes, as served.

    python -m benchmarks.serve.step_cost --out results/cost  # 5-6 minutes on an H100
    python -m benchmarks.serve.step_cost --out results/cost --k 3 --stock ''   # a first profile
    python -m benchmarks.serve.step_cost --out results/norms --target smollm2 --k 1,3 --stock 1,3 \
        --heads norm_before_fc,fc_norm --without aux_norm --no-trace     # what norms cost
    python -m benchmarks.serve.step_cost --out /tmp/c --tiny                   # rehearsal on a CPU

The target has the shapes of LFM2.5-8B-A1B in NVFP4 or of SmolLM2-135M in bf16 and weights that are
made up and route (spread_weights.py); the head is random, lies on disk and is loaded.
Every engine runs in a process of its own, as under `vllm serve`; all are started first and then
take turns, one request at a time, greedy, so that each round compares them under the same
conditions. Acceptance is synthetic, 0.6 at every position. `k3` is an engine with the plugin's cost
patches, `k3-stock` one without them; `k3-fc_norm` has a head with that norm before its `fc` and the
two norms of new heads after it.

Then each engine answers once more with timers around the host's phases, and once under the torch
profiler. OUT/step_cost.json is written after every round and has, for each engine, the step in
milliseconds, its ratio to the plain step of the same round and to those of engines with the same k,
and the two breakdowns.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.lib.child import Child
from benchmarks.lib.lfm2_shapes import write_head, write_models
from benchmarks.lib.record import begin, pick, save
from benchmarks.lib.step_probe import summarize
from benchmarks.lib.turns import add_turn, turn
from drafthead.vllm_plugin.registry import TABLE

NORMS = ("norm_before_fc", "fc_norm")


def smollm2_config(tiny: bool) -> dict:
    """SmolLM2-135M's config.json, or one that a CPU runs at once."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64 if tiny else 576,
        "intermediate_size": 128 if tiny else 1536,
        "num_hidden_layers": 6 if tiny else 30,
        "num_attention_heads": 2 if tiny else 9,
        "num_key_value_heads": 1 if tiny else 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "vocab_size": 512 if tiny else 49152,
        "max_position_embeddings": 512 if tiny else 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32" if tiny else "bfloat16",
    }


def write_all(work: Path, target: str, heads: list[str], tiny: bool) -> None:
    """The targets' configurations and the heads that are asked for (see `head_folder`)."""
    write_models(work, tiny)
    (work / "smollm2").mkdir(exist_ok=True)
    (work / "smollm2" / "config.json").write_text(json.dumps(smollm2_config(tiny)))
    shape = smollm2_config(tiny) if target == "smollm2" else None
    for name in heads:
        norms = (name, "norm_before_residual", "norm_output") if name in NORMS else ()
        rows = 128 if tiny else 16_000 if shape else 32_000
        aux = ((2, 3, 4) if tiny else (2, 15, 27)) if shape else None
        folder = work / head_folder(target, name)
        write_head(folder, tiny, rows, shape=shape, aux=aux, norms=norms)


def head_folder(target: str, head: str) -> str:
    return f"head-{target}-{head}"


def engines(args: argparse.Namespace) -> list[tuple[Child, int]]:
    """The children that serve each configuration, with their k."""
    base = {"work": str(args.work), "tiny": args.tiny, "tokens": 24 if args.tiny else 256}
    base["kv"] = args.kv
    base["target"] = "bf16" if args.tiny and args.target == "nvfp4" else args.target
    wanted = [("plain", 0, args.heads[0], "")]
    for head in args.heads:
        tail = f"-{head}" if head in NORMS else ""
        wanted += [(f"k{k}{tail}", k, head, "") for k in numbers(args.k)]
        wanted += [(f"k{k}{tail}-stock", k, head, args.without) for k in numbers(args.stock)]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    started = []
    for name, k, head, skip in wanted:
        spec = base | {"k": k, "head": head_folder(args.target, head)}
        skipping = {"DRAFTHEAD_SKIP_PATCHES": skip} if skip else {}
        log = args.out / f"{name}.log"
        child = Child(name, "benchmarks.lib.step_engine", spec, log, env | skipping)
        started.append((child, k))
    return started


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def spread(values: list[float]) -> dict:
    """Median and the middle half of ``values``."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": round(statistics.median(ordered), 4),
        "middle_half": [round(ordered[quarter], 4), round(ordered[-1 - quarter], 4)],
    }


def report(timings: dict[str, list[dict]], about: dict[str, dict], ks: dict[str, int]) -> dict:
    """Each engine's step and its ratios to others' of the same round."""
    rows = {}
    for name, rounds in timings.items():
        row = {"k": ks[name], **about[name], "rounds": len(rounds)}
        if rounds:
            row["ms_per_step"] = spread([r["mean_ms"] for r in rounds])
            row["ms_per_step_by_medians"] = spread([r["median_ms"] for r in rounds])
            row["tokens_per_s"] = spread([r["tokens_per_s"] for r in rounds])
            row["tokens_a_step"] = spread([r["tokens_a_step"] for r in rounds])
            ratios = {
                other: spread([a["mean_ms"] / b["mean_ms"] for a, b in zip(rounds, others)])
                for other, others in timings.items()
                if others  # it may not have started
            }
            if "plain" in ratios:
                row["ratio_to_plain"] = ratios["plain"]
            alike = [o for o in ratios if ks[o] == ks[name] and o not in (name, "plain")]
            row["ratio_to"] = {other: ratios[other] for other in alike}
        rows[name] = row
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/lfm2_shapes"))
    parser.add_argument("--k", default="1,3,5,7", help="engines with the plugin's patches")
    parser.add_argument("--stock", default="3,5", help="engines without them")
    for_cost = ",".join(patch.name for patch in TABLE if patch.purpose == "cost")
    parser.add_argument("--without", default=for_cost, help="patches that those lack")
    parser.add_argument("--target", choices=("nvfp4", "smollm2"), default="nvfp4")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache")
    parser.add_argument(
        "--heads",
        type=lambda text: text.split(","),
        default=["bare"],
        help="bare, " + ", ".join(NORMS),
    )
    parser.add_argument("--no-trace", action="store_true", help="without the torch profiler")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--limit", type=float, default=300, help="seconds until all have started")
    add_turn(parser)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.k, args.stock, args.rounds = "2", "2", 3
        args.work = args.out / "models"
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    write_all(args.work, args.target, args.heads, args.tiny)
    record = {
        **begin("step_cost"),
        "target": args.target,
        "acceptance": "whatever the random head gets" if args.tiny else "synthetic, 0.6",
    }
    started = engines(args)
    running = [child for child, _ in started]
    about: dict[str, dict] = {child.name: {} for child in running}
    ks = {child.name: k for child, k in started}
    timings: dict[str, list[dict]] = {e.name: [] for e in running}

    def write() -> None:
        record["engines"] = report(timings, about, ks)
        names = ("ms_per_step", "ratio_to_plain", "tokens_per_s", "distinct_experts")
        figures = {}
        for name, row in record["engines"].items():
            figures[name] = pick(row, *names)
            busy = row.get("profile", {}).get("device_busy_ms_per_step")
            if busy and "ms_per_step" in row:  # how far a faster host could shorten the step
                over = row["ms_per_step"]["median"] / busy
                figures[name] |= {"device_busy_ms_per_step": busy, "wall_over_busy": over}
        save(args.out / "step_cost.json", record, figures)

    try:
        deadline = time.monotonic() + args.limit
        for engine in list(running):
            try:
                about[engine.name] |= engine.read(deadline - time.monotonic())
                print(engine.name, about[engine.name], flush=True)
            except RuntimeError as error:
                about[engine.name]["failed"] = str(error)
                print(error, flush=True)
                running.remove(engine)
                engine.close()
        with turn(args.turn):
            for number in range(args.rounds if running else 0):
                at = number % len(running)
                for engine in running[at:] + running[:at]:
                    timings[engine.name].append(engine.ask(["time", number]))
                write()
        for engine in running:
            about[engine.name]["host"] = engine.ask(["host"])
            write()
            if args.no_trace:
                continue
            trace = args.out / f"{engine.name}.trace.json"
            engine.ask(["trace", str(trace)], limit=120)
            about[engine.name]["profile"] = summarize(trace)
            trace.unlink()
            write()
    finally:
        for engine in running:
            engine.close()
        write()
    for name, row in record["engines"].items():
        if "ms_per_step" in row:
            print(f"{name:24} {row['ms_per_step']} ms  x {row.get('ratio_to_plain')}")
            for other, ratio in row["ratio_to"].items():
                print(f"{'':24}   x {ratio} of {other}")
    return int(any("failed" in row for row in about.values()))


if __name__ == "__main__":
    sys.exit(main())
