"""The whole grid on one machine: k × requests at once × length of answers × temperature.

    python -m benchmarks.serve.grid --out OUT --prompts chat=chat.jsonl --prompts code=code.jsonl \
        --case smollm2-nvfp4=TARGET,HEAD --case smollm2=TARGET,HEAD,HEAD@5+7,ngram --lfm2
    python -m benchmarks.serve.grid --out /tmp/g --tiny            # rehearsal on a CPU

Each --case is a target's folder and those of heads for it, of any kind, each at every --k or at
those named behind it (HEAD@5+7); `ngram` instead of a folder is vLLM's own prompt lookup. --lfm2
adds LFM2.5-8B-A1B's shapes with weights that route (spread_weights.py), a random head and
acceptance that is synthetic and so named: only its costs mean anything.

All engines of all cases start side by side. Then they are timed, one at a time: the target alone
and every k in turn on the same prompts. The loops over the loads repeat, a few pairs of each, until
--seconds are over, so that every point gets about as many pairs. OUT/grid.json is written after
every load.

On a GPU machine where each process takes a minute to start, a case a call (four engines) is about
two minutes of starting and one of timing.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.lib import lfm2_shapes
from benchmarks.lib.record import begin, pick, save
from benchmarks.lib.turns import add_turn, turn
from drafthead.data.template import Template
from drafthead.errors import DraftheadError
from drafthead.machine import this_machine
from drafthead.plan import Plan, Setting
from drafthead.prove.bench import NGRAM
from drafthead.prove.grid import line, running, start
from drafthead.prove.paired_timing import (
    METHOD,
    Block,
    Engine,
    Point,
    run_pairs,
    summarize,
)
from drafthead.recipe import Recipe, parse_recipe
from drafthead.serve import engine_plan, largest_graph
from drafthead.targets import load_target

CONSOLE = Console(stderr=True, width=140)
LONGEST_PROMPT = 256
GRAPHS = "max_cudagraph_capture_size"


@dataclass
class Case:
    """A target alone and with drafters, each at every k that it is measured at."""

    name: str
    base: Plan
    drafted: dict[tuple[str, int], Plan]
    prompts: list[tuple[list[int], str]]
    about: dict
    engines: list[Engine] = field(default_factory=list)


def read_prompts(target: Path, sets: Sequence[str], count: int) -> list[tuple[list[int], str]]:
    """Token ids and set of ``count`` prompts of each NAME=FILE (JSONL with ``prompt``)."""
    loaded = load_target(target)
    template = Template(loaded.tokenizer(), loaded.eos_token_ids, str(target))
    found = []
    for name, _, file in (entry.partition("=") for entry in sets):
        texts = [json.loads(row)["prompt"] for row in Path(file).read_text().splitlines()]
        ids = (list(template.encode([{"role": "user", "content": text}])[0]) for text in texts)
        short = [one for one in ids if len(one) <= LONGEST_PROMPT]
        found += [(short[i * len(short) // count], name) for i in range(count)]
    return found


def served_recipe(name: str, target: str, options: argparse.Namespace) -> Recipe:
    """A target as `drafthead serve` would run it, but for the memory."""
    cuda = this_machine().vllm_device == "cuda"
    return parse_recipe(
        {
            "name": name,
            "target": {"path": target},
            "prompts": {"sources": [{"path": "unused"}]},
            "engine": {
                "dtype": options.dtype or ("bfloat16" if cuda else "float32"),
                "max_model_len": LONGEST_PROMPT + max(options.tokens),
                "max_num_seqs": max(options.concurrency),
                "kv_cache_memory_bytes": (1 << 30) if cuda else (128 << 20),
                "gpu_memory_utilization": 0.05,
                "extra": {GRAPHS: options.graphs} if options.graphs else {},
            },
        },
        "a benchmark",
    )


def served_case(
    name: str, target: str, drafters: Sequence[str], options: argparse.Namespace
) -> Case:
    """A target and heads as `drafthead serve` would run them, but for the memory."""
    recipe = served_recipe(name, target, options)
    drafted = {}
    for drafter in drafters:
        head, _, named = drafter.partition("@")
        for k in map(int, named.split("+")) if named else options.k:
            with_head = {"head": head, "num_speculative_tokens": k}
            looked_up = {"head": None, "speculative_config": NGRAM | {"num_speculative_tokens": k}}
            own = looked_up if head == "ngram" else with_head
            if (Path(head).name, k) in drafted:
                raise SystemExit(f"--case {name}: two drafters called {Path(head).name}, k = {k}")
            drafted[Path(head).name, k] = engine_plan(recipe, **own)
    prompts = read_prompts(Path(target), options.prompts, options.count)
    about = {"target": target, "drafters": [*drafters], "acceptance": "served"}
    base = engine_plan(recipe, head=None)
    return Case(name, base, drafted, prompts, about)


def lfm2_case(options: argparse.Namespace) -> Case:
    """LFM2.5-8B-A1B's shapes in NVFP4."""
    tiny, work = options.tiny, options.out / "lfm2"
    lfm2_shapes.write_models(work, tiny)
    common = {
        "model": str(work / ("bf16" if tiny else "nvfp4")),
        **lfm2_shapes.SPREAD,
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": max(options.concurrency),
        "kv_cache_memory_bytes": (128 << 20) if tiny else (1 << 30),
        **({"enforce_eager": True} if tiny else {"gpu_memory_utilization": 0.05}),
    }
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": ("0", "")} if tiny else {}

    def plan(k: int = 0, **more: object) -> Plan:
        graphs = options.graphs or largest_graph(max(options.concurrency), k)
        chosen = {**common, **more} | ({GRAPHS: graphs} if graphs and not tiny else {})
        return Plan([Setting(n, v, "") for n, v in chosen.items()], env)

    def drafting(k: int) -> Plan:
        speculative = lfm2_shapes.speculation(work / "head", k, tiny)
        return plan(k, speculative_config=speculative | {"use_local_argmax_reduction": True})

    rng = np.random.default_rng(0)
    prompts = [(rng.integers(8, 500, 64).tolist(), "random") for _ in range(options.count)]
    about = {"target": "LFM2.5-8B-A1B's shapes, spread weights, NVFP4", "acceptance": "synthetic"}
    drafted = {("random", k): drafting(k) for k in options.k}
    return Case("lfm2", plan(), drafted, prompts, about)


def tiny_cases(options: argparse.Namespace) -> None:
    """A target and head of known tokens for the rehearsal."""
    from tests.prove import crafted

    target, head = options.out / "target", options.out / "head"
    if not head.exists():
        crafted.head(head, crafted.target(target))
    file = options.out / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"word {n}"}) + "\n" for n in range(20)))
    options.case, options.prompts = [f"tiny={target},{head},ngram@2"], [f"words={file}"]
    options.lfm2, options.k, options.concurrency = True, [1, 2, 3], [1, 2]
    options.tokens, options.count = [8, 16], 4


def portion(
    prompts: Sequence[tuple[list[int], str]], concurrency: int, pairs: int, number: int
) -> list[tuple[list[int], str]]:
    """The prompts of one of many rounds: of each set as many as fill its blocks, others in each."""
    sets: dict[str, list[tuple[list[int], str]]] = {}
    for prompt in prompts:
        sets.setdefault(prompt[1], []).append(prompt)
    size = 1 if concurrency == 1 else 2 * concurrency
    taken = size * -(-pairs // len(sets))
    return [
        own[(number * taken + i) % len(own)]
        for own in sets.values()
        for i in range(min(taken, len(own)))
    ]


def time_case(
    case: Case, temperature: float, seconds: float, options: argparse.Namespace
) -> Iterator[list[dict]]:
    """Time a case's grid at one temperature for so long; yields its cells after each load."""
    base, *fast = case.engines
    blocks: dict[tuple[str, Point], list[Block]] = {}
    begun = time.monotonic()
    for number in itertools.count():
        for concurrency, tokens in itertools.product(options.concurrency, options.tokens):
            if time.monotonic() - begun > seconds:
                return
            points = [Point(k, concurrency, temperature, tokens) for _, k in case.drafted]
            prompts = portion(case.prompts, concurrency, options.pairs, number)
            warmup = 0 if number else 2
            timed = run_pairs(
                base, fast, prompts, points[0], repeats=1, warmup=warmup, least=options.pairs
            )
            for (drafter, _), point, own in zip(case.drafted, points, timed, strict=True):
                blocks.setdefault((drafter, point), []).extend(own)
            yield [
                {"drafter": drafter} | summarize(point, own)
                for (drafter, point), own in blocks.items()
            ]


def launch(cases: Sequence[Case], logs: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """Start every engine of every case side by side; returns why cases failed, by their names."""

    def one(case: Case) -> None:
        plans = {"alone": case.base} | {
            f"{drafter}-k{k}": plan for (drafter, k), plan in case.drafted.items()
        }
        engines = [
            running(plan, "engine", logs / f"{case.name}-{name}.log", f"{case.name} {name}")
            for name, plan in plans.items()
        ]
        case.engines = start(engines, stack, CONSOLE)

    with ThreadPoolExecutor(len(cases)) as pool:
        starting = {case.name: pool.submit(one, case) for case in cases}
    failed = {name: future.exception() for name, future in starting.items()}
    return {name: str(error)[-1500:] for name, error in failed.items() if error is not None}


def best(cases: dict[str, dict]) -> dict:
    """The fastest k of each case, length, load and temperature."""
    figures: dict[str, dict] = {}
    for name, case in cases.items():
        for cell in sorted(case["cells"], key=lambda cell: cell["speedup"]):
            load = f"{cell['max_new_tokens']}_tokens_{cell['concurrency']}_at_once"
            hot = f"_at_{cell['temperature']}" if cell["temperature"] else ""
            names = ("speedup", "speedup_ci95", "drafter", "num_speculative_tokens", "pairs_timed")
            figures[f"{name}_{load}{hot}"] = pick(
                cell, *names, "base_tokens_per_s", "accepted_length"
            )
    return figures


def time_all(cases: Sequence[Case], options: argparse.Namespace, record: dict) -> None:
    """Time every case greedily, then at the other temperatures, each for an equal part of the
    time."""
    # Costs alone need no sampling.
    rounds = [
        (temperature, case)
        for temperature in options.temperature
        for case in cases
        if not temperature or case.about["acceptance"] != "synthetic"
    ]
    for temperature, case in rounds:
        own = record["cases"][case.name]
        others = own["cells"]
        for cells in time_case(case, temperature, options.seconds / len(rounds), options):
            own["cells"] = others + cells
            save(options.out / "grid.json", record, best(record["cases"]))
        for cell in own["cells"][len(others) :]:
            CONSOLE.print(f"{case.name}: {cell['drafter']} {line(cell)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", default=[], help="NAME=TARGET,HEAD,…")
    parser.add_argument("--lfm2", action="store_true", help="also LFM2.5-8B-A1B's shapes")
    parser.add_argument("--prompts", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--count", type=int, default=12, help="prompts of each set")
    parser.add_argument("--k", type=numbers(int), default=[1, 3, 5])
    parser.add_argument("--concurrency", type=numbers(int), default=[1, 4, 16, 64])
    parser.add_argument("--temperature", type=numbers(float), default=[0.0, 0.7])
    parser.add_argument("--tokens", type=numbers(int), default=[48], help="of each answer at most")
    parser.add_argument(
        "--pairs", type=int, default=4, help="of a load before the next one is timed"
    )
    parser.add_argument("--seconds", type=float, default=280, help="of timing, starts not counted")
    parser.add_argument("--graphs", type=int, help="tokens of the largest CUDA graph, on all sides")
    add_turn(parser)
    parser.add_argument("--dtype", help="default: bfloat16, float32 on a CPU")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        tiny_cases(options)
    cases = []
    for entry in options.case:
        name, _, paths = entry.partition("=")
        target, *drafters = paths.split(",")
        cases.append(served_case(name, target, drafters, options))
    if options.lfm2:
        cases.append(lfm2_case(options))
    record = {
        **begin("grid"),
        "method": METHOD,
    }
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        failed = launch(cases, options.out / "logs", stack)
        record |= {"start_s": round(time.monotonic() - begun, 1), "failed": failed}
        CONSOLE.print(f"engines ready after {record['start_s']} s; failed: {failed}")
        record["cases"] = {case.name: {**case.about, "cells": []} for case in cases}
        try:
            with turn(options.turn):
                time_all([case for case in cases if case.name not in failed], options, record)
        except DraftheadError as error:
            record["died"] = str(error)[-1500:]
    save(options.out / "grid.json", record, best(record["cases"]))


if __name__ == "__main__":
    main()
