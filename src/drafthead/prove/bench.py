"""Stage bench: the speed with the head against the speed without it."""

import contextlib
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from drafthead.fsio import read_json, write_json
from drafthead.head.checkpoint import load_head
from drafthead.machine import Machine, this_machine
from drafthead.prove.costmodel import analyse
from drafthead.prove.engine import EngineProcess
from drafthead.prove.pairing import Point, run_pairs, summarize
from drafthead.prove.prompts import heldout_prompts
from drafthead.prove.proof import command_line, now
from drafthead.prove.server import Client, running_server
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import Plan, engine_plan, existing_head
from drafthead.states.reader import StateReader
from drafthead.targets import load_target
from drafthead.train.evaluate import evaluate

_METHOD = (
    "measured; the same prompts on both engines, alternating which goes first, warm-up left out; "
    "tokens/s is all generated tokens over all seconds, prefill included and never from a prefix "
    "cache; ratio over pairs with a 95 % percentile bootstrap interval; acceptance from the "
    "engine's own counters"
)
_SUMMARY = (
    "base_tokens_per_s",
    "drafted_tokens_per_s",
    "speedup",
    "speedup_ci95",
    "verdict",
    "accepted_length",
    "acceptance_by_position",
    "predicted_acceptance_by_position",
)


def shared(plan: Plan, machine: Machine) -> Plan:
    """The plan of an engine that shares its GPU with one other: half of the memory each."""
    if machine.vllm_device != "cuda":
        return plan
    halved = [
        replace(s, value=s.value / 2, why="two engines share the GPU")
        if s.name == "gpu_memory_utilization"
        else s
        for s in plan.settings
    ]
    return replace(plan, settings=halved)


def running(
    plan: Plan, over: str, log: Path, name: str
) -> contextlib.AbstractContextManager[EngineProcess | Client]:
    """An engine in a process of its own, or a server; ended when the block ends."""
    if over == "http":
        return running_server(plan, log=log, name=name)
    return EngineProcess(plan.args, env=plan.environment, log=log, name=name)


def grid(recipe: Recipe) -> list[Point]:
    """The points to measure, those of one k together; the first is the headline's."""
    ks = recipe.bench.num_speculative_tokens or [recipe.serve.num_speculative_tokens]
    return [
        Point(k, concurrency, temperature, recipe.bench.max_new_tokens)
        for k in ks
        for temperature in recipe.bench.temperature
        for concurrency in recipe.bench.concurrency
    ]


def _line(cell: dict) -> str:
    low, high = cell["speedup_ci95"]
    return (
        f"bench: k={cell['num_speculative_tokens']}, {cell['concurrency']} at once, temperature "
        f"{cell['temperature']:g}: {cell['base_tokens_per_s']:.1f} -> "
        f"{cell['drafted_tokens_per_s']:.1f} tokens/s, {cell['speedup']:.2f}x "
        f"[{low:.2f}, {high:.2f}], {cell['verdict']}"
    )


def predicted_acceptance(run: RunDir, k: int | None = None) -> list[float] | None:
    """Acceptance by position that training's held-out evaluation predicts.

    Args:
        run: a run.
        k: tokens drafted a step; None is the most that was evaluated. A larger k than that is
            predicted as far as the evaluation goes.

    Returns:
        At most k rates; None for a head that was not trained in this run.
    """
    path = run.train / "best.json"
    if not path.exists():
        return None
    heldout = read_json(path, "the held-out evaluation that train writes")["heldout"]
    by_k = {entry["k"]: entry["acceptance_by_position"] for entry in heldout}
    # Where a step ends decides where the next one begins, so each k has rates of its own.
    rates = by_k.get(k) or by_k[max(by_k)]
    return [float(rate) for rate in rates[:k]]


def predicted_over_served(recipe: Recipe, run: RunDir, point: Point) -> list[float] | None:
    """Acceptance by position predicted over exactly what the bench serves: its prompts, each
    answer cut at its length. A prediction over other text differs by more than the text's noise.

    Args:
        recipe: the run's recipe.
        run: a run with states and an exported head.
        point: what is served.

    Returns:
        k rates; None where the answers at hand are not those that will be served (sampled, or
        shorter), or where there are no states.
    """
    length = point.max_new_tokens
    other_text = recipe.generate.temperature > 0 or point.temperature > 0
    if other_text or recipe.generate.max_new_tokens < length:
        return None
    if not (run.states / "meta.json").exists():
        return None
    target = load_target(
        recipe.target.path, recipe.target.revision, recipe.target.trust_remote_code
    )
    head = load_head(existing_head(run.head), target).head.float()
    served = {prompt.conversation for prompt in heldout_prompts(run, recipe.bench.prompts)}
    reader = StateReader(run.states)
    samples = []
    for index in reader.indices("heldout"):
        sample = reader[int(index)]
        end = sample.prompt_len + length
        if sample.conversation in served:
            samples.append(
                replace(
                    sample,
                    ids=sample.ids[:end],
                    loss_mask=sample.loss_mask[:end],
                    states=sample.states[: end - 1],
                    scale=None if sample.scale is None else sample.scale[: end - 1],
                )
            )
    embedding = target.embedding().float()
    return list(evaluate(head, embedding, samples, point.num_speculative_tokens)[0].acceptance)


def measure(
    recipe: Recipe,
    run: RunDir,
    points: list[Point],
    *,
    head: Path | str | None,
    speculative_config: dict | None = None,
    console: Console,
) -> list[dict]:
    """Measure points of the grid on one target, with a head or another drafter.

    Both engines live side by side, one working at a time.

    Args:
        recipe: the run's recipe.
        run: where the held-out prompts lie.
        points: what to measure; the drafted engine is started once for each k.
        head: folder or hub id of the head.
        speculative_config: in place of a head, another drafter of vLLM's.
        console: where people read what happens.

    Returns:
        What :func:`drafthead.prove.pairing.summarize` gives for each point.

    Raises:
        DraftheadError: an engine does not run.
    """
    target = load_target(
        recipe.target.path, recipe.target.revision, recipe.target.trust_remote_code
    )
    machine = this_machine()
    prompts = [(p.ids, p.source) for p in heldout_prompts(run, recipe.bench.prompts)]
    over, logs = recipe.bench.over, run.root / "logs"
    base_plan = shared(engine_plan(recipe, head=None, target=target), machine)
    cells = []
    with running(base_plan, over, logs / "bench-target.log", "target alone") as base:
        for k in dict.fromkeys(point.num_speculative_tokens for point in points):
            plan = engine_plan(
                recipe,
                head=head,
                target=target,
                num_speculative_tokens=k,
                speculative_config=speculative_config,
            )
            log, name = logs / f"bench-k{k}.log", f"with head, k={k}"
            with running(shared(plan, machine), over, log, name) as drafted:
                for point in points:
                    if point.num_speculative_tokens == k:
                        blocks = run_pairs(
                            base,
                            drafted,
                            prompts,
                            point,
                            repeats=recipe.bench.repeats,
                            warmup=recipe.bench.warmup,
                        )
                        cells.append({**summarize(point, blocks), "over": over})
                        console.print(_line(cells[-1]))
    return cells


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
    expected = predicted_over_served(recipe, run, points[0]) or predicted_acceptance(
        run, points[0].num_speculative_tokens
    )
    cells = measure(recipe, run, points, head=existing_head(run.head), console=console)
    result = {
        **{name: value for name, value in cells[0].items() if name not in ("pairs", "by_source")},
        "predicted_acceptance_by_position": expected,
        "predicted_accepted_length": 1 + sum(expected) if expected else None,
        "method": _METHOD,
        "grid": cells,
        "cost_model": analyse(
            [c for c in cells if not c["temperature"]], predicted_acceptance(run)
        ),
        "command": command_line(),
        "machine": this_machine().as_dict(),
        "date": now(),
    }
    write_json(run.bench_json, result)
    return {name: result[name] for name in _SUMMARY}
