"""How much faster are sampled requests served with drafts that are drawn from the head?

    python -m benchmarks.serve.sampled --case smollm2=recipe.yaml --case hybrid=other.yaml --out OUT
    python -m benchmarks.serve.sampled --case demo=recipe.yaml --out OUT --heats 0.7 --loads 1

A case is a recipe whose run has an exported head. One side drafts as commit 10807bf serves it (the
likeliest tokens, the k of --k0), the other draws its drafts, at each k; same engine otherwise, same
prompts, in turn. Writes OUT/sampled.json, whose summary has t07_1, t07_16, t10_1, t10_16 of each
case: tokens/s of the best k over the other side's.
"""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.lib.record import begin, pick, save
from drafthead.machine import this_machine
from drafthead.prove.grid import How, measure
from drafthead.prove.pairing import Point
from drafthead.prove.prompts import timed_prompts
from drafthead.recipe import load_recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan, existing_head
from drafthead.targets import recipe_target

CONSOLE = Console(stderr=True, width=120)
KEPT = (
    "num_speculative_tokens",
    "concurrency",
    "temperature",
    "speedup",
    "speedup_ci95",
    "verdict",
    "base_tokens_per_s",
    "drafted_tokens_per_s",
    "accepted_length",
)


def compare(recipe_file: Path, options: argparse.Namespace) -> list[dict]:
    """Every point of one case: drawn drafts over the likeliest ones."""
    recipe = load_recipe(recipe_file)
    run, target = RunDir(options.runs / recipe.name), recipe_target(recipe)
    head = existing_head(run.head)

    def plan(method: str, k: int):
        so = with_options(recipe, "serve", {"draft_sample_method": method})
        return engine_plan(so, head=head, target=target, num_speculative_tokens=k)

    points = [Point(k, n, heat, 128) for k in options.k for heat in options.heats
              for n in options.loads]  # fmt: skip
    how = How(
        "engine", repeats=1, warmup=2, at_once=2, together=this_machine().vllm_device == "cpu"
    )
    prompts = [(p.ids, p.source) for p in timed_prompts(recipe, run, target, CONSOLE)]
    drawn = {k: plan("probabilistic", k) for k in options.k}
    base, logs = plan("greedy", options.k0), options.out / "logs"
    timed = measure(base, drawn, prompts, points, how, logs=logs, console=CONSOLE)
    return [pick(cell, *KEPT) for _, cell in timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", required=True, metavar="NAME=RECIPE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--k0", type=int, default=3, help="drafts a step of the other side")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--heats", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    record: dict = begin("sampled") | {"cases": {}}
    figures: dict[str, dict[str, float]] = {}
    for case in options.case:
        name, _, recipe = case.partition("=")
        cells = record["cases"][name] = compare(Path(recipe), options)
        for cell in cells:
            key = f"t{round(10 * cell['temperature']):02d}_{cell['concurrency']}"
            best = figures.setdefault(name, {})
            best[key] = max(best.get(key, 0.0), cell["speedup"])
        save(options.out / "sampled.json", record, figures)


if __name__ == "__main__":
    main()
