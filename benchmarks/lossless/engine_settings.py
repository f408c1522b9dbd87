"""Is speculation on a hybrid target lossless on this machine? Every method, k and mode, in one go.

    python -m benchmarks.lossless.engine_settings --out results/lossless
    python -m benchmarks.lossless.engine_settings --out /tmp/l --tiny          # rehearsal on a CPU
    python -m benchmarks.lossless.engine_settings --out ... \
        --only eagle3-k3-graphs-v2,ngram-k3-graphs-v2

Makes a small random LFM2-MoE in fp32 that repeats itself in runs (so that drafts are accepted and
rejected), and a head that drafts repetitions. Each configuration is one engine in one process
with a time limit; several run side by side, each with a small share of the memory. Every engine
answers the same sets of requests greedily. Results are written as they come: OUT/<config>.json,
and OUT/lossless_gpu.json with what differs from the plain engine's answers, where, and how large
the target's margin (transformers, float64) between the two tokens is there: a difference with a
margin within ``--tie`` is rounding, any other is a fault.

Configurations named ``stock-*`` run without the plugin's patches (only the aux states, without
which EAGLE-3 cannot be served), ``stock-order-*`` without one of them: they are the faults as vLLM
ships them and do not count. Those named ``*-tf32`` leave Triton's matrix products in TF32 as it
does by default; all others ask for IEEE
fp32, because TF32 rounds away the equality that is being tested.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.lib.lossless_engines import (
    IEEE,
    LEFT_OUT,
    SHAPES,
    VOCAB,
    Config,
    configurations,
    request_sets,
    tiny_configurations,
)
from benchmarks.lib.record import begin, pick, save

REPO = Path(__file__).resolve().parents[2]


def make_models(folder: Path, tiny: bool) -> tuple[Path, Path]:
    """The target and its head, made once."""
    from tests.vllm.models import write_head, write_target

    target, head = folder / "target", folder / "head"
    if tiny:
        write_target(target, vocab=VOCAB["tiny"])
        aux = (2, 3, 6)
    else:
        write_target(target, hidden=256, head_dim=64, kv_heads=2, layers=9, vocab=VOCAB["gpu"])
        aux = (2, 4, 9)
    write_head(head, target, aux_layers=aux, repeats=True)
    return target, head


def run_engine(config: Config, target: str, head: str, out: Path, tiny: bool) -> None:
    """Child process: start the engine, answer every set, write what was answered."""
    started = time.time()
    from vllm import LLM, SamplingParams

    shape = dict(SHAPES[config.shape])
    few = shape.pop("few_blocks", False)
    speculative = None
    if config.method == "eagle3":
        speculative = {"method": "eagle3", "model": head, "num_speculative_tokens": config.k}
    elif config.method == "ngram":
        speculative = {
            "method": "ngram",
            "num_speculative_tokens": config.k,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        }
    memory = {} if tiny else {"gpu_memory_utilization": 0.03}
    engine = LLM(
        model=target,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        enforce_eager=not config.graphs,
        enable_prefix_caching=config.prefix_caching,
        kv_cache_memory_bytes=(4 << 20 if tiny else 6 << 20) if few else 256 << 20,
        speculative_config=speculative,
        disable_log_stats=False,
        seed=0,
        **shape,
        **memory,
    )
    settings = engine.llm_engine.vllm_config
    result = {
        "config": asdict(config),
        "async_scheduling": settings.scheduler_config.async_scheduling,
        "newer_runner": settings.use_v2_model_runner,
        "block_size": settings.cache_config.block_size,
        "num_gpu_blocks": settings.cache_config.num_gpu_blocks,
        "start_s": round(time.time() - started, 1),
        "answers": {},
        "seconds": {},
    }
    for name, requests in request_sets(VOCAB["tiny" if tiny else "gpu"]).items():
        begun = time.time()
        answers = engine.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            [
                SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
                for _, n in requests
            ],
            use_tqdm=False,
        )
        result["answers"][name] = [list(a.outputs[0].token_ids) for a in answers]
        result["seconds"][name] = round(time.time() - begun, 2)
        counters = {m.name: getattr(m, "value", None) for m in engine.get_metrics()}
        result["counters"] = {
            name: counters.get(f"vllm:{name}")
            for name in (
                "spec_decode_num_drafts",
                "spec_decode_num_draft_tokens",
                "spec_decode_num_accepted_tokens",
                "num_preemptions",
                "prefix_cache_hits",
                "prefix_cache_queries",
            )
        }
        temporary = out.with_suffix(".part")
        temporary.write_text(json.dumps(result))
        temporary.rename(out)


def environment(config: Config, tiny: bool) -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONPATH"] = f"{REPO / 'src'}:{REPO}:{env.get('PYTHONPATH', '')}"
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if config.served else "0"
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("OMP_NUM_THREADS", "1" if tiny else "2")
    env["VLLM_NO_USAGE_STATS"] = "1"
    # The n-gram proposer's threads would wait for each other on the engine's one core.
    env.setdefault("NUMBA_NUM_THREADS", "1")
    if not tiny:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if config.runner == "v2" else "0"
        env |= IEEE | ({"TRITON_F32_DEFAULT": "tf32"} if config.tf32 else {})
    if config.stock:
        env["DRAFTHEAD_SKIP_PATCHES"] = LEFT_OUT
    env.update(config.env)
    return env


def compare(out: Path, configs: list[Config], tiny: bool, tie: float, notes: dict) -> dict:
    """What every finished engine answered, against the first plain one."""
    sets = request_sets(VOCAB["tiny" if tiny else "gpu"])
    done = {}
    for config in configs:
        path = out / f"{config.name}.json"
        if path.exists():
            done[config.name] = json.loads(path.read_text())
    reference = next(
        (done[c.name] for c in configs if c.method == "plain" and c.name in done), None
    )
    rows, margins = [], Margins(out / "models" / "target")
    for config in configs:
        row = {"config": config.name, "method": config.method, "k": config.k, "stock": config.stock}
        rows.append(row)
        mine = done.get(config.name)
        if mine is None or reference is None:
            row["error"] = notes.get(config.name, "no result")
            continue
        row |= {
            "newer_runner": mine["newer_runner"],
            "async_scheduling": mine["async_scheduling"],
            "graphs": config.graphs,
            "prefix_caching": config.prefix_caching,
            "counters": mine["counters"],
            "start_s": mine["start_s"],
            "requests": 0,
            "identical": 0,
            "differences": [],
        }
        if config.name in notes:
            row["error"] = notes[config.name]
        for name, answers in mine["answers"].items():
            expected = reference["answers"].get(name, [])
            for index, (got, want) in enumerate(zip(answers, expected)):
                row["requests"] += 1
                row["identical"] += got == want
                if got != want:
                    prompt = sets[name][index][0]
                    at = next(i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1])
                    margin = margins.at(prompt + want[:at], want[at], got[at])
                    row["differences"].append(
                        {
                            "set": name,
                            "request": index,
                            "prompt_tokens": len(prompt),
                            "position": at,
                            "want": want[at],
                            "got": got[at],
                            "margin": margin,
                            "verdict": "tie" if abs(margin) <= tie else "fault",
                        }
                    )
    return {"tie": tie, "rows": rows}


class Margins:
    """The target's logit of one token minus another's after a prefix, in float64 on the CPU."""

    def __init__(self, target: Path):
        self.target, self.model, self.known = target, None, {}

    def at(self, prefix: list[int], one: int, other: int) -> float:
        import torch
        from transformers import Lfm2MoeForCausalLM

        key = (tuple(prefix), one, other)
        if key not in self.known:
            if self.model is None:
                self.model = Lfm2MoeForCausalLM.from_pretrained(
                    self.target, dtype=torch.float64, experts_implementation="eager"
                )
            with torch.no_grad():
                logits = self.model(torch.tensor([prefix])).logits[0, -1]
            self.known[key] = float(logits[one] - logits[other])
        return self.known[key]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="configurations, by name, with commas")
    parser.add_argument("--jobs", type=int, default=8, help="engines side by side")
    parser.add_argument("--limit", type=float, default=280, help="seconds an engine may take")
    parser.add_argument("--total", type=float, default=540, help="seconds for everything")
    parser.add_argument("--tie", type=float, default=2e-4, help="margin that rounding may turn")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the configurations")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    configs = tiny_configurations() if arguments.tiny else configurations()
    if arguments.engine:
        config = next(c for c in configs if c.name == arguments.engine)
        models = arguments.out / "models"
        result = arguments.out / f"{config.name}.json"
        run_engine(config, str(models / "target"), str(models / "head"), result, arguments.tiny)
        return 0
    if arguments.only:
        wanted = arguments.only.split(",")
        # The first plain engine is what everything is held against.
        configs = [c for i, c in enumerate(configs) if i == 0 or c.name in wanted]
    if arguments.list:
        print("\n".join(c.name for c in configs))
        return 0
    begun = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "models" / "head" / "config.json").exists():
        make_models(arguments.out / "models", arguments.tiny)
    waiting = [c for c in configs if not (arguments.out / f"{c.name}.json").exists()]
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    notes: dict[str, str] = {}
    report: dict = {}
    while waiting or running:
        left = arguments.total - (time.time() - begun)
        while waiting and len(running) < arguments.jobs and left > 0:
            config = waiting.pop(0)
            command = [sys.executable, "-m", __spec__.name, "--out", str(arguments.out)]
            command += ["--engine", config.name] + (["--tiny"] if arguments.tiny else [])
            log = (arguments.out / f"{config.name}.log").open("w")
            child = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment(config, arguments.tiny),
                start_new_session=True,
            )
            running[config.name] = (child, time.time())
        if left <= 0:
            notes |= {c.name: "not started: out of time" for c in waiting}
            waiting = []
        time.sleep(0.5)
        for name, (child, since) in list(running.items()):
            late = time.time() - since > arguments.limit or left <= 0
            if child.poll() is None and not late:
                continue
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
                notes[name] = "killed: out of time"
            elif child.returncode:
                notes[name] = f"exit code {child.returncode}, see {name}.log"
            del running[name]
            print(f"{time.time() - begun:6.0f} s  {name}  {notes.get(name, 'done')}", flush=True)
    report = compare(arguments.out, configs, arguments.tiny, arguments.tie, notes)
    report |= begin("lossless_gpu") | {"seconds": round(time.time() - begun, 1)}
    figures = {row["config"]: pick(row, "requests", "identical") for row in report["rows"]}
    save(arguments.out / "lossless_gpu.json", report, figures)
    return summary(report)


def summary(report: dict) -> int:
    """Print a line a configuration; 1 if one that should be lossless is not, or did not run."""
    bad = False
    for row in report["rows"]:
        if "requests" not in row:
            print(f"{row['config']:36} {row['error']}")
            bad = bad or not row["stock"]
            continue
        faults = [d for d in row["differences"] if d["verdict"] == "fault"]
        ties = len(row["differences"]) - len(faults)
        accepted = row["counters"]["spec_decode_num_accepted_tokens"]
        print(
            f"{row['config']:36} {row['identical']:4} of {row['requests']:4} identical, "
            f"{len(faults)} faults, {ties} ties, accepted {accepted}  {row.get('error', '')}"
        )
        for d in faults[:6]:
            print(
                f"    {d['set']}[{d['request']}] prompt of {d['prompt_tokens']}, departs at "
                f"{d['position']}, margin {d['margin']:+.4f}"
            )
        bad = bad or (not row["stock"] and (bool(faults) or "error" in row))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
