"""Stage bench: the speed with the head against the speed without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from drafthead.fsio import read_json, write_json
from drafthead.machine import this_machine
from drafthead.plan import Plan
from drafthead.progress import waiting
from drafthead.prove.cells import Cells, forget
from drafthead.prove.costerror import with_intervals
from drafthead.prove.costmodel import Vocabularies, analyse, load, recommended_k
from drafthead.prove.grid import measure
from drafthead.prove.pairing import METHOD, Point
from drafthead.prove.prediction import (
    Rehearsal,
    by_vocabulary,
    expected_acceptance,
    predicted_curves,
)
from drafthead.prove.prompts import timed_prompts
from drafthead.prove.proof import command_line, hash_folder, now
from drafthead.prove.records import BENCH_AGAIN, Contest, WrittenHead
from drafthead.prove.rowcost import row_seconds
from drafthead.recipe import Recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan, existing_head
from drafthead.targets import Target, recipe_target

# vLLM's own prompt lookup; a match of two tokens at least, as its examples take.
_NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
# The cost model looks at k up to here.
_POSITIONS = 7
_MEASURED = (
    "base_tokens_per_s",
    "drafted_tokens_per_s",
    "speedup",
    "speedup_ci95",
    "verdict",
    "accepted_length",
    "acceptance_by_position",
)


def grid(recipe: Recipe) -> list[Point]:
    """The points to measure, those of one k together; the first is the headline's."""
    ks = recipe.bench.num_speculative_tokens or recipe.serve.candidates
    return [
        Point(k, concurrency, temperature, max_new_tokens)
        for k in ks
        for temperature in recipe.bench.temperature
        for max_new_tokens in recipe.bench.max_new_tokens
        for concurrency in recipe.bench.concurrency
    ]


def _plans(
    recipe: Recipe,
    target: Target,
    head: Path | str | None = None,
    speculative_config: dict[str, Any] | None = None,
) -> dict[int, Plan]:
    """How to run a drafter at each k of the grid."""
    ks = dict.fromkeys(point.num_speculative_tokens for point in grid(recipe))
    return {
        k: engine_plan(
            recipe,
            head=head,
            target=target,
            num_speculative_tokens=k,
            speculative_config=speculative_config
            and {**speculative_config, "num_speculative_tokens": k},
        )
        for k in ks
    }


def _measure(
    recipe: Recipe, run: RunDir, target: Target, drafted: dict[int, Plan], console: Console
) -> list[dict]:
    """The grid of one drafter; points of a bench that was ended, inputs the same, are kept."""
    section, machine = recipe.bench, this_machine()
    base = engine_plan(recipe, head=None, target=target)
    prompts = [(p.ids, p.source) for p in timed_prompts(recipe, run, target, console)]
    drafters = {k: plan.args for k, plan in drafted.items()}
    speculative = next(iter(drafters.values()))["speculative_config"]
    head = Path(speculative.get("model", "no head of a folder's"))
    inputs = {
        "engines": [base.args, drafters],
        "target": target.fingerprint,
        "head": hash_folder(head) if head.is_dir() else None,
        "prompts": prompts,
        "how": [section.repeats, section.warmup, section.over, METHOD],
        "machine": machine.as_dict(),
    }
    cells = Cells(run.root / ".stages", inputs)
    points = grid(recipe)
    missing = {_load(point) for point in points if point not in cells}
    if len(missing) < len({_load(point) for point in points}):
        console.print(f"bench: {len(missing)} loads are left to measure")
    measured = measure(
        base,
        drafted,
        prompts,
        [point for point in points if _load(point) in missing],
        over=section.over,
        repeats=section.repeats,
        warmup=section.warmup,
        # On a GPU vLLM sizes its cache by what is free: with others loading it would misjudge.
        at_once=machine.vllm_device == "cpu" or recipe.engine.kv_cache_memory_bytes is not None,
        logs=run.root / "logs",
        console=console,
    )
    gpus = base.args.get("tensor_parallel_size", 1)
    if missing:
        for point, cell in measured:
            cells.add(point, {**cell, "tensor_parallel_size": gpus})
    return [cells[point] for point in points]


def _load(point: Point) -> Point:
    """The point whatever its k: all k of a load are measured together."""
    return replace(point, num_speculative_tokens=0)


def _on_each_number_of_gpus(recipe: Recipe) -> list[Recipe]:
    """The recipe as it is, or spread over each number of GPUs that the grid names."""
    sizes = recipe.bench.tensor_parallel_size
    if sizes is None:
        return [recipe]
    return [with_options(recipe, "serve", {"tensor_parallel_size": size}) for size in sizes]


def _vocabularies(
    recipe: Recipe, rehearsal: Rehearsal, curves: list[list[float]] | None, gpus: int
) -> Vocabularies | None:
    """What other draft vocabularies would cost here and accept; None for a head from elsewhere."""
    others = by_vocabulary(rehearsal, curves)
    if others is None:
        return None
    config = read_json(rehearsal.run.head / "config.json", "the head's configuration", WrittenHead)
    rows, device = config["draft_vocab_size"], this_machine().vllm_device
    dtype = torch.float32 if recipe.engine.dtype == "float32" else torch.bfloat16
    row_s = {  # vLLM spreads the head's rows over the target's GPUs
        n: row_seconds(config["hidden_size"], -(-rows // gpus), n, device=device, dtype=dtype)
        / gpus
        for n in recipe.bench.concurrency
    }
    return Vocabularies(rehearsal.point.max_new_tokens, rows, row_s, others)


def _label(head: str) -> str:
    """What records call another head: of a path out of this folder the end, ``my-run/head``."""
    local = head.startswith(("/", "~", ".."))
    return "/".join(Path(head).parts[-2:]) if local else head


def contest(
    recipe: Recipe, run: RunDir, *, heads: list[str], ngram: bool, console: Console
) -> dict[str, dict]:
    """Measure other drafters on the same target and prompts, and write them into ``bench.json``
    beside the run's own head.

    Args:
        recipe: the run's recipe; its grid is measured.
        run: a run that has been benched.
        heads: folders or hub ids of EAGLE-3 heads, in vLLM's or speculators' format.
        ngram: also draft by looking up the last tokens in the text so far, without a head.
        console: where people read what happens.

    Returns:
        For each drafter the first point of its grid.

    Raises:
        DraftheadError: the run has not been benched, or an engine does not run.
    """
    result = read_json(run.bench_json, "the figures of `drafthead bench`", Contest, BENCH_AGAIN)
    target = recipe_target(recipe)
    drafters: dict[str, dict[str, Any]] = {
        _label(head): {"head": existing_head(head)} for head in heads
    }
    if ngram:
        drafters["ngram"] = {"speculative_config": _NGRAM}
    beside = result.get("beside", {})
    for name, drafter in drafters.items():
        console.print(f"bench: {name}")
        cells = [
            cell
            for own in _on_each_number_of_gpus(recipe)
            for cell in _measure(own, run, target, _plans(own, target, **drafter), console)
        ]
        beside[name] = {"grid": cells, "command": command_line(), "date": now()}
        write_json(run.bench_json, {**result, "beside": beside})
    forget(run.root / ".stages")  # not before: ended in the next one, it would do all anew
    run.forget("report")  # a report made before lacks them
    first = {name: beside[name]["grid"][0] for name in drafters}
    return {name: {key: cell[key] for key in _MEASURED} for name, cell in first.items()}


def bench(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Measure the speed with the head against the speed without, and write ``bench.json``.

    A head that turns out slower is a result, not an error: it is written, and said.

    Args:
        recipe: the run's recipe.
        run: a run whose head is exported.
        console: where people read what happens.

    Returns:
        The headline: the first point of the grid.

    Raises:
        DraftheadError: an engine does not run.
    """
    points = grid(recipe)
    target = recipe_target(recipe)
    rehearsal = Rehearsal(recipe, run, target, points[0])
    with waiting(console, "predicting the acceptance from held-out states"):
        expected = expected_acceptance(rehearsal)
    head = existing_head(run.head)
    cells = [
        cell
        for own in _on_each_number_of_gpus(recipe)
        for cell in _measure(own, run, target, _plans(own, target, head=head), console)
    ]
    gpus = cells[0]["tensor_parallel_size"]
    greedy = [c for c in cells if not c["temperature"] and c["tensor_parallel_size"] == gpus]
    most = max(_POSITIONS, *(p.num_speculative_tokens for p in points))
    with waiting(console, "predicting the acceptance at other k and vocabularies"):
        curves = {
            length: known
            for length in recipe.bench.max_new_tokens
            if (known := predicted_curves(rehearsal.of_answers(length), most))
        }
        others = _vocabularies(recipe, rehearsal, curves.get(points[0].max_new_tokens), gpus)
    with waiting(console, "fitting the cost model"):
        fits = analyse(greedy, curves, others)
        fits, errors = with_intervals(greedy, fits, curves)
    result = {
        **{name: value for name, value in cells[0].items() if name not in ("pairs", "by_source")},
        "predicted_acceptance_by_position": expected,
        # Of fewer drafts than are served it would be too short.
        "predicted_accepted_length": 1 + sum(expected)
        if expected and len(expected) == points[0].num_speculative_tokens
        else None,
        "method": METHOD,
        "grid": cells,
        "head": {"sha256": hash_folder(run.head)},
        "cost_model": fits,
        "cost_model_error": errors,
        "recommended_num_speculative_tokens": recommended_k(fits, load(cells[0])),
        "command": command_line(),
        "machine": this_machine().as_dict(),
        "date": now(),
    }
    write_json(run.bench_json, result)
    forget(run.root / ".stages")
    if error := errors.get("decoding"):
        console.print(
            "bench: the cost model's median error on points unseen was "
            f"{error['median_error']:.1%}; by the noise of so many pairs alone it would be "
            f"{error['of_noise_alone'][1]:.1%}"
        )
    best = result["recommended_num_speculative_tokens"]
    if best is not None:
        console.print(f"bench: k = {best} is best by the cost model")
    elif error:
        console.print("bench: too far off to choose k by; time more prompts, or on an idle machine")
    return {name: result[name] for name in (*_MEASURED, "predicted_acceptance_by_position")}
