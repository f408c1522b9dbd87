"""Which of several kinds of head to serve: the faster one that was proved and measured."""

import math
from pathlib import Path
from typing import Any

from drafthead.drafters import DRAFTERS
from drafthead.errors import DraftheadError
from drafthead.fsio import read_json
from drafthead.kinds import each_kind
from drafthead.prove.paired_timing import load
from drafthead.prove.records import BENCH_AGAIN, Bench
from drafthead.prove.served import (
    as_served,
    fastest,
    lossless_proof,
    method_of,
    proved_ks,
    served_k,
)
from drafthead.recipe import Recipe, load_recipe
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan, existing_head


def measured(run: RunDir) -> list[dict]:
    """The measured points of a run's current head at each proved k, drafted as the headline's; none
    if the head is not lossless.

    Raises:
        DraftheadError: ``bench.json`` is not what this version writes.
    """
    proof = lossless_proof(run)
    if proof is None or not run.bench_json.exists():
        return []
    bench = read_json(run.bench_json, "the figures of `drafthead bench`", Bench, BENCH_AGAIN)
    if bench["head"]["sha256"] != proof["head"]["sha256"]:
        return []
    cells, ks = bench["grid"], proved_ks(proof)
    method = method_of(cells[0])
    return [c for c in cells if c["num_speculative_tokens"] in ks and method_of(c) == method]


def by_load(runs: dict[str, RunDir]) -> list[dict[str, dict]]:
    """For each load, the headline's first: each kind's fastest point, the faster kind first. At the
    headline's that is of the k to serve.

    A ratio is to the target alone, timed beside the head: heads that were measured at different
    hours are compared by it.
    """
    grids = {kind: measured(run) for kind, run in runs.items()}
    loads = dict.fromkeys(load(cell) for cells in grids.values() for cell in cells)
    ranked = []
    for at in loads:
        best = {}
        for kind, cells in grids.items():
            here = [cell for cell in cells if load(cell) == at]
            if here and here[0] is cells[0]:
                best[kind] = here[0]
            elif cell := fastest(here, {cell["num_speculative_tokens"] for cell in here}):
                best[kind] = cell
        if best:
            order = sorted(best, key=lambda kind: -best[kind]["speedup"])
            ranked.append({kind: best[kind] for kind in order})
    return ranked


def lead(first: dict, second: dict) -> tuple[float, float, float]:
    """How many times as fast the first point is as the second, both being measured against the
    target alone, and the ends of its 95 % interval: of the logarithms, which are independent."""

    def spread(cell: dict) -> float:
        low, high = cell["speedup_ci95"]
        return math.log(high / low) / 2 if 0 < low <= high else math.inf

    ratio = first["speedup"] / second["speedup"]
    width = math.hypot(spread(first), spread(second))
    return ratio, ratio * math.exp(-width), ratio * math.exp(width)


def better_kind(runs: dict[str, RunDir]) -> str | None:
    """The kind to serve: the faster at the first load of those proved and measured there."""
    loads = by_load(runs)
    return next(iter(loads[0])) if loads else None


def made_beside(run: RunDir) -> dict[str, RunDir]:
    """By kind, the heads that are made of the same states as a run's, itself with them; empty if it
    is made alone."""
    if run.shared is None:
        return {}
    runs = {kind: run.of_kind(kind) for kind in DRAFTERS}
    return {kind: other for kind, other in runs.items() if other.head.is_dir()}


def to_serve(recipe: Recipe, runs: Path, kind: str | None = None) -> tuple[Recipe, RunDir]:
    """The head to serve or publish of a recipe: the kind that is named, else the better one.

    Raises:
        DraftheadError: the recipe asks for several kinds, and none was proved and measured.
    """
    jobs = each_kind(recipe, runs, kind)
    if len(jobs) == 1:
        return next(iter(jobs.values()))
    if (best := better_kind({name: run for name, (_, run) in jobs.items()})) is None:
        raise DraftheadError(
            f"{runs / recipe.name}: of {', '.join(jobs)} none was both proved and measured, so "
            "the better one is unknown; run `drafthead run RECIPE`, or name one with --kind"
        )
    return jobs[best]


def engine_args(
    recipe: Recipe | Path | str,
    head: Path | str | None = None,
    runs: Path | str = "runs",
    kind: str | None = None,
) -> dict[str, Any]:
    """Arguments for ``vllm.LLM(**…)`` that serve a recipe's target with its head.

    Args:
        recipe: a recipe, or the path of one.
        head: the head's folder or hub id; None is the recipe's run's own.
        runs: folder of all runs.
        kind: of several kinds of head, the one to serve; None is the faster.

    Raises:
        DraftheadError: recipe, target or head cannot be read.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe, run = to_serve(recipe, Path(runs), kind)
    head = existing_head(head or run.head)
    served = as_served(recipe, run)
    return engine_plan(served, head=head, num_speculative_tokens=served_k(recipe, run)).args
