"""What a speculative step costs beside a plain one, at a real target's shapes, as served.

    python -m benchmarks.serve.step_cost --out results/cost            # 8 minutes on an H200
    python -m benchmarks.serve.step_cost --out OUT --stock eagle3-k3,dspark-k7 \
        --baseline-src OLD/src                            # beside stock, and an older drafthead
    python -m benchmarks.serve.step_cost --out OUT --engines plain,eagle3-k3,dspark-k7 \
        --also-vllm SITE                                  # beside another vLLM
    python -m benchmarks.serve.step_cost --out OUT --schedule dspark=1:7,17:3,65:1
    python -m benchmarks.serve.step_cost --out OUT --tiny              # rehearsal on a CPU

The target has the shapes of LFM2.5-8B-A1B in NVFP4 or of SmolLM2-135M in bf16 and weights that are
made up and route (spread_weights.py); the heads are random, lie on disk and are loaded. Acceptance
is synthetic, by position as a trained head's was measured (`lfm2_shapes.CURVE`, or --acceptance).

`plain` is the target alone, `dspark-k7` a DSpark head that drafts seven. `-stock` is the same
without the plugin's cost patches, `-baseline` under the drafthead in --baseline-src, `-other` under
the vLLM in --also-vllm, `-by-load` with drafts by the number of requests at once (--schedule).
Every engine runs in a process of its own, as under `vllm serve`. All are started side by side and
take turns: in each round and at each load the same number of steps of each, in which all requests
decode; greedy. After the first round each is traced once by the torch profiler and once with timers
around the host's phases; then rounds go on until --limit. OUT/step_cost.json is written after every
load.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import lfm2_shapes
from benchmarks.lib.child import Child
from benchmarks.lib.record import begin, pick, save
from benchmarks.lib.step_probe import summarize
from benchmarks.lib.turns import add_turn, turn
from drafthead.serve import largest_graph
from drafthead.vllm_plugin.registry import SKIP, TABLE

Timings = dict[str, dict[int, list[dict]]]
"""By engine and requests at once: `step_engine.steps` of each round."""
ENGINES = "plain,eagle3-k3,eagle3-k5,dspark-k3,dspark-k5,dspark-k7"


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


def write_models(work: Path, target: str, tiny: bool) -> Path:
    """Write the target's configuration and the heads; the target's folder."""
    if target == "nvfp4":
        lfm2_shapes.write_models(work, tiny)
        return work / ("bf16" if tiny else "nvfp4")
    folder, shape = work / "bf16", smollm2_config(tiny)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    aux, more = ((2, 3, 4), (1, 2, 3, 4)) if tiny else ((2, 15, 27), (2, 8, 15, 21, 27))
    lfm2_shapes.write_heads(work, shape, 128 if tiny else 16_000, aux, more)
    return folder


def drafts(name: str) -> tuple[str, int]:
    """Kind of head and drafts a step of an engine's name; ("", 0) is the target alone."""
    kind, _, rest = name.partition("-k")
    return (kind, int(rest.split("-")[0])) if rest else ("", 0)


def engines(args: argparse.Namespace, target: Path) -> list[Child]:
    """Start the children that serve each configuration."""
    most = max(args.at_once)
    base = lfm2_shapes.engine_arguments(target, args.tiny, sequences=most, cache_bytes=2 << 30)
    base |= {"kv_cache_dtype": args.kv}
    if args.tp > 1:
        base |= {"tensor_parallel_size": args.tp}
        base |= {"disable_custom_all_reduce": True} if args.no_custom_all_reduce else {}
    child = {"steps": args.steps, "traced_steps": 40 if not args.tiny else 14, "warm": most}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if args.tiny:  # an engine in its child's own process starts in seconds
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(args.tp > 1))
        env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    paths = os.environ.get("PYTHONPATH", "")
    first = lambda folder: {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), paths)))}
    wanted = [(name, {}) for name in args.engines]
    wanted += [(f"{name}-stock", {SKIP: args.without}) for name in args.stock]
    if args.baseline_src:
        wanted += [(f"{n}-baseline", first(args.baseline_src.resolve())) for n in args.baseline]
    if args.also_vllm:
        wanted += [(f"{name}-other", first(args.also_vllm.resolve())) for name in args.also]
    for kind, ranges in args.schedule.items():
        wanted.append((f"{kind}-k{max(k for _, k in ranges)}-by-load", {}))
    started = []
    for name, more in wanted:
        kind, k = drafts(name)
        llm = dict(base)
        if kind:
            curve = args.acceptance.get(kind, ())
            head = target.parent / lfm2_shapes.HEADS[kind]
            llm["speculative_config"] = lfm2_shapes.speculation(head, k, args.tiny, curve, kind)
        if name.endswith("-by-load"):
            ranges = [*args.schedule[kind], (most + 1, 0)]
            llm["speculative_config"]["num_speculative_tokens_per_batch_size"] = [
                (start, until - 1, drafted)
                for (start, drafted), (until, _) in itertools.pairwise(ranges)
            ]
        if not args.tiny and (graphs := largest_graph(most, k)):
            llm["max_cudagraph_capture_size"] = graphs
        own = env | more
        if more:  # code that differs must not share what was compiled
            own["VLLM_CACHE_ROOT"] = str(args.out / "cache" / name)
        started.append(
            Child(name, "benchmarks.lib.step_engine", child | {"llm": llm}, log(args, name), own)
        )
    return started


def log(args: argparse.Namespace, name: str) -> Path:
    return args.out / "logs" / f"{name}.log"


def spread(values: Sequence[float]) -> dict:
    """Median and the middle half of ``values``."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": round(statistics.median(ordered), 4),
        "middle_half": [round(ordered[quarter], 4), round(ordered[-1 - quarter], 4)],
    }


def alone(name: str) -> str:
    """The target alone under the same vLLM."""
    return "plain-other" if name.endswith("-other") else "plain"


def ratio(over: Sequence[dict], under: Sequence[dict], key: str) -> dict:
    """Of ``key`` in the same rounds."""
    return spread([a[key] / b[key] for a, b in zip(over, under)])


def report(timings: Timings, about: dict[str, dict]) -> dict[str, dict]:
    """Each engine's steps by load, and what they are of the target's alone in the same round."""
    rows = {}
    for name, loads in timings.items():
        row = {"k": drafts(name)[1], **about[name], "loads": {}}
        for load, rounds in loads.items():
            if not rounds:
                continue
            cell = {"rounds": len(rounds)}
            for key in ("ms", "tokens_per_s", "tokens_a_step"):
                cell[key] = spread([r[key] for r in rounds])
            if plain := timings.get(alone(name), {}).get(load):
                cell["plain_steps"] = ratio(rounds, plain, "ms")
                cell["over_alone"] = ratio(rounds, plain, "tokens_per_s")
            profile = about[name].get("profiles", {}).get(str(load), {})
            if busy := profile.get("device_busy_ms_per_step"):
                cell["busy_ms"], cell["wall_over_busy"] = (
                    busy,
                    round(cell["ms"]["median"] / busy, 3),
                )
                plain_busy = about.get(alone(name), {}).get("profiles", {}).get(str(load), {})
                if plain_busy.get("device_busy_ms_per_step"):
                    cell["busy_plain_steps"] = busy / plain_busy["device_busy_ms_per_step"]
            row["loads"][str(load)] = cell
        rows[name] = row
    return rows


def summary(rows: dict[str, dict], timings: Timings) -> dict:
    """The figures that are asked for, and each engine's by load."""
    flat: dict = {}
    measured = {name: row["loads"] for name, row in rows.items() if row["loads"]}
    counted = next((r["distinct_experts"] for r in rows.values() if r.get("distinct_experts")), {})
    for name, tokens in (("plain", "1"), ("k3", "4"), ("k7", "8")):
        if tokens in counted:
            flat[f"distinct_experts_{name}"] = counted[tokens]
    loads = sorted({int(load) for own in measured.values() for load in own})
    heads = [n for n in measured if drafts(n)[1] and n.count("-") == 1]
    fastest = lambda load: max(
        (n for n in heads if str(load) in measured[n]),
        key=lambda n: measured[n][str(load)]["tokens_per_s"]["median"],
        default=None,
    )
    for load in loads:
        if (best := fastest(load)) and "over_alone" in (cell := measured[best][str(load)]):
            flat[f"best_over_alone_{load}"] = cell["over_alone"]["median"]
    head = fastest(1)
    for name, engine in (("plain", "plain"), ("head", head)):
        cell = measured.get(engine, {}).get("1", {})
        flat |= {f"wall_over_busy_{name}": cell[key] for key in ["wall_over_busy"] if key in cell}
    for load in ("1", "64"):
        cell = measured.get("dspark-k7", {}).get(load, {})
        if "plain_steps" in cell:
            flat[f"dspark_k7_plain_steps_{load}"] = cell["plain_steps"]["median"]
    olds = [n for n in measured if n.endswith("-baseline")]
    if head and (old := max(olds, key=lambda n: median(measured, n), default=None)):
        over = ratio(timings[head][1], timings[old][1], "tokens_per_s")
        flat["best_over_10807bf_1"] = over["median"]
    if scheduled := [own for name, own in measured.items() if name.endswith("-by-load")]:
        best_of = [
            max(own[str(load)]["over_alone"]["median"] for own in scheduled if str(load) in own)
            for load in loads
        ]
        flat["min_over_alone_any_load"] = min(best_of)
    flat |= versions(rows, timings)
    names = ("ms", "busy_ms", "plain_steps", "busy_plain_steps", "tokens_per_s", "over_alone")
    by_load = {
        name: {
            f"{load}_at_once": {
                key: value["median"] if isinstance(value, dict) else value
                for key, value in pick(cell, *names).items()
            }
            for load, cell in own.items()
        }
        for name, own in measured.items()
    }
    return flat | by_load


def median(measured: dict[str, dict], name: str) -> float:
    return measured[name].get("1", {}).get("tokens_per_s", {}).get("median", 0.0)


def versions(rows: dict[str, dict], timings: Timings) -> dict[str, float]:
    """Steps of one vLLM over those of the other, one request: each engine's, and their median."""
    ratios, label = {}, ""
    for name, loads in timings.items():
        ours = name.removesuffix("-other")
        if name != ours and loads.get(1) and timings.get(ours, {}).get(1):
            pair = (rows[name]["vllm"], rows[ours]["vllm"])
            label = "step_ratio_{}_over_{}".format(*(".".join(v.split(".")[:2]) for v in pair))
            ratios[f"{label}_{ours}"] = ratio(loads[1], timings[ours][1], "ms")["median"]
    return ratios and {label: statistics.median(ratios.values()), **ratios}


def schedules(entries: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """`KIND=REQUESTS:DRAFTS,…`: from so many requests at once so many drafts."""
    found = {}
    for kind, _, text in (entry.partition("=") for entry in entries):
        found[kind] = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    return found


def curves(entries: Sequence[str]) -> dict[str, list[float]]:
    """`KIND=RATE,RATE,…`, or `KIND=FILE`, JSON with `acceptance_by_position` or a list."""
    found = {}
    for kind, _, text in (entry.partition("=") for entry in entries):
        if Path(text).is_file():
            read = json.loads(Path(text).read_text())
            found[kind] = read["acceptance_by_position"] if isinstance(read, dict) else read
        else:
            found[kind] = [float(part) for part in text.split(",")]
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: [part for part in text.split(",") if part]
    numbers = lambda text: [int(part) for part in names(text)]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="for models and heads; default OUT/models")
    parser.add_argument("--target", choices=("nvfp4", "smollm2"), default="nvfp4")
    parser.add_argument("--engines", type=names, default=names(ENGINES))
    parser.add_argument("--stock", type=names, default=[], help="those to repeat without patches")
    for_cost = ",".join(patch.name for patch in TABLE if patch.purpose == "cost")
    parser.add_argument("--without", default=for_cost, help="patches that the stock ones lack")
    parser.add_argument("--baseline-src", type=Path, help="src of an older drafthead")
    parser.add_argument("--baseline", type=names, default=["eagle3-k3"], help="those under it")
    parser.add_argument("--also-vllm", type=Path, help="site folder of another vLLM")
    parser.add_argument("--also", type=names, default=["plain", "eagle3-k3", "dspark-k7"])
    parser.add_argument("--schedule", action="append", default=[], help="KIND=REQUESTS:DRAFTS,…")
    parser.add_argument("--acceptance", action="append", default=[], help="KIND=RATE,… or FILE")
    parser.add_argument("--at-once", type=numbers, default=[1, 4, 16, 64, 128])
    parser.add_argument("--traced", type=numbers, default=[1, 64], help="loads to profile")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--no-custom-all-reduce", action="store_true")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache")
    parser.add_argument("--steps", type=int, default=96, help="timed at a time")
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--limit", type=float, default=460, help="seconds of the whole run")
    parser.add_argument("--start-limit", type=float, default=300, help="seconds of all starts")
    add_turn(parser)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.schedule, args.acceptance = schedules(args.schedule), curves(args.acceptance)
    args.out = args.out.resolve()
    args.work = (args.work or args.out / "models").resolve()
    if args.tiny:
        args.at_once, args.traced, args.steps, args.rounds = [1, 4], [1], 12, 2
    return args


class Run:
    """Engines that are asked in turn, and what they answered."""

    def __init__(self, args: argparse.Namespace, record: dict, started: list[Child]):
        self.args, self.record, self.running = args, record, list(started)
        self.about: dict[str, dict] = {child.name: {} for child in started}
        self.timings: Timings = {c.name: {n: [] for n in args.at_once} for c in started}
        self.until = time.monotonic() + args.limit

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def write(self) -> None:
        rows = report(self.timings, self.about)
        self.record["engines"] = rows
        save(self.args.out / "step_cost.json", self.record, summary(rows, self.timings))

    def ask(self, engine: Child, *task: object, first: bool = False) -> dict | None:
        """Its answer (``first``: that it is ready); None if it failed, and is then given up."""
        try:
            limit = min(self.args.start_limit if first else 90, self.left)
            return engine.read(limit) if first else engine.ask(list(task), limit)
        except (RuntimeError, OSError) as error:
            self.about[engine.name]["failed"] = str(error)[-1500:]
            print(engine.name, error, flush=True)
            self.running.remove(engine)
            engine.close()
            return None

    def start(self) -> None:
        for engine in list(self.running):
            if (facts := self.ask(engine, first=True)) is not None:
                self.about[engine.name] |= facts
                print(f"{engine.name}: ready after {facts['started_s']} s", flush=True)
        self.write()

    def round(self, number: int) -> None:
        for load in self.args.at_once:
            at = number % max(1, len(self.running))
            for engine in self.running[at:] + self.running[:at]:
                found = self.ask(engine, "time", load, number)
                if found is not None:
                    self.timings[engine.name][load].append(found)
            self.write()

    def profile(self) -> None:
        """Trace every engine at the loads that are asked for, then time its host's phases."""
        for load in self.args.traced:
            for engine in list(self.running):
                trace = self.args.out / f"{engine.name}.trace.json"
                if self.left > 30 and self.ask(engine, "trace", load, str(trace)) is not None:
                    found = self.about[engine.name].setdefault("profiles", {})
                    found[str(load)] = summarize(trace, skip=10)
                    trace.unlink()
            self.write()
        for engine in list(self.running):
            if (host := self.ask(engine, "host", 1)) is not None:
                self.about[engine.name]["host"] = host
        self.write()


def main() -> int:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    target = write_models(args.work, args.target, args.tiny)
    kinds = sorted({drafts(name)[0] for name in args.engines} - {""})
    rates = {k: lfm2_shapes.synthetic_acceptance(8, args.acceptance.get(k, ())) for k in kinds}
    record = {
        **begin("step_cost"),
        "target": args.target,
        "acceptance": "whatever the random heads get" if args.tiny else "synthetic, by position",
        "acceptance_by_position": rates,
        "acceptance_measured": "as given" if args.acceptance else lfm2_shapes.CURVE,
        "tensor_parallel_size": args.tp,
        "schedule": args.schedule,
    }
    started = engines(args, target)
    run = Run(args, record, started)
    try:
        run.start()
        with turn(args.turn):
            longest = 0.0
            for number in range(args.rounds if run.running else 0):
                if run.left < 1.3 * longest:
                    break
                begun = time.monotonic()
                run.round(number)
                longest = max(longest, time.monotonic() - begun)
                if number == 0:
                    run.profile()
    finally:
        for engine in run.running:
            engine.close()
        run.write()
    for name, row in record["engines"].items():
        for load, cell in row["loads"].items():
            figures = {k: v["median"] if isinstance(v, dict) else v for k, v in cell.items()}
            print(f"{name:24} {load:>4} at once  {figures}")
    return int(any("failed" in about for about in run.about.values()))


if __name__ == "__main__":
    sys.exit(main())
