"""Stage bench: the speed with the head against the speed without it."""

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from drafthead.errors import UnsupportedHead
from drafthead.fsio import RunLock, fingerprint, read_json, write_json
from drafthead.head.checkpoint import head_folder
from drafthead.machine import this_machine
from drafthead.plan import Plan
from drafthead.progress import waiting
from drafthead.prove.grid import ALL, FIRST, REST, How, Share, measure
from drafthead.prove.paired_timing import METHOD, Point, Prompts
from drafthead.prove.prediction import predicted_acceptance, predicted_sampling
from drafthead.prove.prompts import timed_prompts
from drafthead.prove.proof import command_line, hash_folder, now
from drafthead.prove.records import BENCH_AGAIN, Cell, Contest
from drafthead.prove.served import (
    candidates,
    drafts_by_load,
    fastest,
    lossless_proof,
    proved_ks,
    top_level,
)
from drafthead.recipe import Recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan, engines_that_fit, existing_head, look_at
from drafthead.targets import Target, recipe_target

# vLLM's own prompt lookup; a match of two tokens at least, as its examples take.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_MEASURED = (
    "base_tokens_per_s",
    "drafted_tokens_per_s",
    "speedup",
    "speedup_ci95",
    "verdict",
    "accepted_length",
    "acceptance_by_position",
)


class _Cells:
    """The points measured so far with the same inputs, each on disk as soon as it is known: a bench
    that was stopped goes on with the missing ones.

    Args:
        folder: where they are kept.
        inputs: JSON-able; everything that they depend on.
    """

    def __init__(self, folder: Path, inputs: Any):
        self.path = folder / f"cells-{fingerprint(inputs)}.json"
        self._cells: dict[str, dict] = {}
        if self.path.exists():
            self._cells = read_json(
                self.path, "the points of an unfinished bench", dict[str, Cell], "delete it"
            )

    @staticmethod
    def _key(point: Point) -> str:
        return fingerprint(asdict(point))

    def __contains__(self, point: Point) -> bool:
        return self._key(point) in self._cells

    def __getitem__(self, point: Point) -> dict:
        return self._cells[self._key(point)]

    def add(self, point: Point, cell: dict) -> None:
        """Keep a point."""
        self._cells[self._key(point)] = cell
        write_json(self.path, self._cells)


def _forget(folder: Path) -> None:
    """Delete the cached points, once the result is written."""
    for path in folder.glob("cells-*.json"):
        path.unlink(missing_ok=True)


def grid(recipe: Recipe, ks: Collection[int]) -> list[Point]:
    """The points to measure, those of one k together; the first load is the headline's."""
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
    ks: Collection[int],
    head: Path | str | None = None,
    speculative_config: dict[str, Any] | None = None,
) -> dict[int, Plan]:
    """How to run a drafter at each k."""
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
    recipe: Recipe,
    run: RunDir,
    target: Target,
    drafted: dict[int, Plan],
    prompts: Prompts,
    points: list[Point],
    console: Console,
    share: Share = ALL,
) -> list[dict]:
    """Points of one drafter; those that an unfinished bench with the same inputs measured are
    kept."""
    section, machine = recipe.bench, this_machine()
    base = engine_plan(recipe, head=None, target=target)
    for notice in next(iter(drafted.values())).notices:
        console.print(f"bench: {escape(notice)}", soft_wrap=True)
    drafters = {k: plan.args for k, plan in drafted.items()}
    speculative = next(iter(drafters.values()))["speculative_config"]
    head = Path(speculative.get("model", "no head of a folder's"))
    how = How(
        over=section.over,
        repeats=section.repeats,
        warmup=section.warmup,
        at_once=section.engines_at_once or engines_that_fit(base, target, machine),
        # On a GPU vLLM sizes its cache by what is free: with others loading it would misjudge.
        together=machine.vllm_device == "cpu" or recipe.engine.kv_cache_memory_bytes is not None,
        share=share,
    )
    inputs = {
        "engines": [base.args, drafters],
        "target": target.fingerprint,
        "head": hash_folder(head) if head.is_dir() else None,
        "prompts": prompts,
        "how": [str(how), METHOD],
        "machine": machine.as_dict(),
    }
    cells = _Cells(run.root / ".stages", inputs)
    missing = [point for point in points if point not in cells]
    if 0 < len(missing) < len(points):
        console.print(f"bench: {len(points) - len(missing)} of {len(points)} points are there")
    if missing:
        gpus = base.args.get("tensor_parallel_size", 1)
        logs = run.root / "logs"
        timed = measure(base, drafted, prompts, missing, how, logs=logs, console=console)
        for point, cell in timed:
            cells.add(point, {**cell, "tensor_parallel_size": gpus})
    return [cells[point] for point in points]


def _on_each_number_of_gpus(recipe: Recipe) -> list[Recipe]:
    """The recipe as it is, or spread over each number of GPUs that the grid names."""
    sizes = recipe.bench.tensor_parallel_size
    if sizes is None:
        return [recipe]
    return [with_options(recipe, "serve", {"tensor_parallel_size": size}) for size in sizes]


def _label(head: str) -> str:
    """What records call another head: of a path out of this folder the end, ``my-run/head``."""
    local = head.startswith(("/", "~", ".."))
    return "/".join(Path(head).parts[-2:]) if local else head


def contest(
    recipe: Recipe, run: RunDir, *, heads: list[str], ngram: bool, console: Console
) -> dict[str, dict]:
    """Measure other drafters on the same target and prompts, and add them to ``bench.json``.

    Args:
        recipe: the run's recipe; its grid is measured.
        run: a run that has been benched.
        heads: folders or hub ids of heads that `inspect` finds no fault with.
        ngram: also draft by looking up the last tokens in the text so far, without a head.
        console: where people read what happens.

    Returns:
        For each drafter the first point of its grid.

    Raises:
        DraftheadError: the run has not been benched, or an engine does not run.
    """
    with RunLock(run.top):
        return _contest(recipe, run, heads, ngram, console)


def _contest(
    recipe: Recipe, run: RunDir, heads: list[str], ngram: bool, console: Console
) -> dict[str, dict]:
    what = "the figures of `drafthead bench`"
    result = read_json(run.bench_json, what, Contest, BENCH_AGAIN)
    target = recipe_target(recipe)
    prompts = [(p.ids, p.source) for p in timed_prompts(recipe, run, target, console)]
    ks = recipe.bench.num_speculative_tokens or [result["num_speculative_tokens"]]
    drafters: dict[str, dict[str, Any]] = {}
    for head in dict.fromkeys(heads):
        label = _label(head)
        if label in drafters:  # of two folders that end alike
            label += f" ({len(drafters) + 1})"
        drafters[label] = {"head": head_folder(existing_head(head))}
    if ngram:
        drafters["ngram"] = {"speculative_config": NGRAM}
    beside = result.get("beside", {})
    for name, drafter in drafters.items():
        console.print(f"bench: {name}")
        cells = []
        for spread in _on_each_number_of_gpus(recipe):
            plans = _plans(spread, target, ks, **drafter)
            cells += _measure(spread, run, target, plans, prompts, grid(spread, ks), console)
        beside[name] = {"grid": cells, "command": command_line(), "date": now()}
        write_json(run.bench_json, {**result, "beside": beside})
    _forget(run.root / ".stages")  # not before: stopped in the next one, it would do all again
    run.forget("report")  # a report made before lacks them
    first = {name: beside[name]["grid"][0] for name in drafters}
    return {name: {key: cell[key] for key in _MEASURED} for name, cell in first.items()}


def _servable(recipe: Recipe, run: RunDir) -> set[int]:
    """Each k that may be served, as far as it is known: the one that the recipe names, else those
    that were proved, else all that it measures."""
    if recipe.serve.num_speculative_tokens is not None:
        return {recipe.serve.num_speculative_tokens}
    return proved_ks(lossless_proof(run)) or set(candidates(recipe))


def _with_method(cell: dict, method: str) -> dict:
    """A measured point of the run's own head, with how its drafts were drawn."""
    return cell | {"compared_speedup": cell["speedup"], "draft_sample_method": method}


def bench(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Measure the speed with the head against the speed without, and write ``bench.json``.

    Where the recipe names no k, each k that verify proves by default is timed on a few pairs, and
    the fastest again on other ones: the headline is of pairs that k was not chosen by. Named k are
    each timed on all prompts. Where drafts may be drawn in two ways, that k is timed with both, on
    the same pairs. A head that turns out slower is a result, not an error.

    Args:
        recipe: the run's recipe.
        run: a run whose head is exported.
        console: where people read what happens.

    Returns:
        The headline: the fastest k that was proved (of all, if none was) at the first load.

    Raises:
        UnsupportedHead: vLLM may serve the head, drafthead cannot compute it.
        DraftheadError: an engine does not run.
    """
    target, head, ks = recipe_target(recipe), existing_head(run.head), candidates(recipe)
    if unsupported := look_at(recipe, head, target)[0]:
        raise UnsupportedHead("\n".join(unsupported))  # its drafts could not be predicted
    points = grid(recipe, ks)
    prompts = timed_prompts(recipe, run, target, console)
    asked = [(prompt.ids, prompt.source) for prompt in prompts]
    choosing = recipe.bench.num_speculative_tokens is None and len(ks) > 1
    with waiting(console, "predicting the acceptance from held-out states"):
        headline = (REST if choosing else ALL).of(asked, points[0], recipe.bench.repeats)
        timed = {prompts[i].conversation for _, block in headline for i in block}
        predicted = predicted_acceptance(recipe, run, target, points[0], ks, timed)
    cells: list[dict] = []
    share = FIRST if choosing else ALL
    spreads = [(own, _plans(own, target, ks, head)) for own in _on_each_number_of_gpus(recipe)]
    for own, plans in spreads:
        cells += _measure(own, run, target, plans, asked, points, console, share)
    method, *others = recipe.draft_methods
    cells = [_with_method(cell, method) for cell in cells]
    best = fastest(cells, _servable(recipe, run)) or fastest(cells, ks) or cells[0]
    k = best["num_speculative_tokens"]
    own, plans = spreads[0]
    if choosing:
        console.print(f"bench: k = {k} is the fastest; timing it on other pairs")
        point = replace(points[0], num_speculative_tokens=k)
        (again,) = _measure(own, run, target, {k: plans[k]}, asked, [point], console, REST)
        again = _with_method(again, method) | {"compared_speedup": best["compared_speedup"]}
        cells = [again if cell is best else cell for cell in cells]
        best = again
    for other in others:
        console.print(f"bench: the same with {other} drafts")
        with_method = with_options(own, "serve", {"draft_sample_method": other})
        at = [p for p in points if p.num_speculative_tokens == k and p.temperature]
        share = REST if choosing else ALL
        own_plans = _plans(with_method, target, [k], head)
        rivals = _measure(with_method, run, target, own_plans, asked, at, console, share)
        rivals = [_with_method(cell, other) for cell in rivals]
        # Compared with the best on the same pairs.
        scale = best["compared_speedup"] / best["speedup"]
        rivals[0]["compared_speedup"] *= scale
        cells += rivals
        if rivals[0]["compared_speedup"] > best["compared_speedup"]:
            best, plans = rivals[0], plans | own_plans
    with waiting(console, "predicting the acceptance of sampled requests"):
        sampled = predicted_sampling(recipe, run, target, points[0], k, timed)
    expected = predicted[k]
    result = {
        **top_level(best),
        "predicted_acceptance_by_position": expected,
        # Of fewer drafts than are served it would be too short.
        "predicted_accepted_length": 1 + sum(expected) if expected and len(expected) == k else None,
        "predicted_sampling": sampled,
        "method": METHOD,
        "grid": [best, *(cell for cell in cells if cell is not best)],
        "head": {"sha256": hash_folder(run.head)},
        "commands": {str(k): plan.public.shell() for k, plan in plans.items()},
        "command": command_line(),
        "machine": this_machine().as_dict(),
        "date": now(),
    }
    write_json(run.bench_json, result)
    _forget(run.root / ".stages")
    by_load = drafts_by_load(result["grid"], _servable(recipe, run))
    if by_load and not recipe.serve.drafts_by_load:
        console.print(
            f"bench: the best k changes with the load: `serve.drafts_by_load: {by_load}`, then "
            "verify and bench"
        )
    return {name: result[name] for name in ("num_speculative_tokens", *_MEASURED)}
