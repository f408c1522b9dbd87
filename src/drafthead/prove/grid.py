"""A grid of points measured: engines started, pairs timed, each point summed up."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from drafthead.plan import Plan
from drafthead.progress import progress, waiting
from drafthead.prove.engine import EngineProcess
from drafthead.prove.pairing import Engine, Point, blocks_of, run_pairs, summarize
from drafthead.prove.server import ServerProcess

Running = EngineProcess | ServerProcess


def shared(plan: Plan, engines: int) -> Plan:
    """The plan of one of several engines that share a GPU: a part of the memory each."""
    why = f"{engines} engines share the GPU"
    return replace(
        plan,
        settings=[
            replace(s, value=s.value / engines, why=why)
            if s.name == "gpu_memory_utilization"
            else s
            for s in plan.settings
        ],
    )


def running(plan: Plan, over: str, log: Path, name: str) -> Running:
    """An engine in a process of its own, or (``over`` = http) a server; ended with the block."""
    if over == "http":
        return ServerProcess(plan, log=log, name=name)
    return EngineProcess(plan.args, env=plan.environment, log=log, name=name)


def start(
    engines: Sequence[Running], stack: contextlib.ExitStack, console: Console
) -> list[Engine]:
    """Start several engines at once and wait for all; ``stack`` ends them, at whatever moment."""
    with waiting(console, f"starting {', '.join(engine.name for engine in engines)}"):
        for engine in engines:
            stack.push(engine)
            engine.start()
        return [engine.wait_ready() for engine in engines]


def time_grid(
    base: Engine,
    drafted: dict[int, Engine],
    prompts: Sequence[tuple[list[int], str]],
    points: Sequence[Point],
    *,
    repeats: int,
    warmup: int,
    on_pair: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Point, dict]]:
    """Time the points of some k on engines that are running; only one of them works at a time.

    Args:
        base: the target alone.
        drafted: an engine for each k.
        prompts: token ids and source of each.
        points: those of other k are left out; what is timed is timed at every k of ``drafted``.
        repeats: times the prompts are gone through.
        warmup: prompts run first at each point and not counted.
        on_pair: called once each pair is timed, at every k.

    Yields:
        Each point with its summary, as soon as it is timed.
    """
    for point in points:
        if point.num_speculative_tokens != next(iter(drafted)):
            continue
        engines = list(drafted.values())
        timed = run_pairs(
            base, engines, prompts, point, repeats=repeats, warmup=warmup, on_pair=on_pair
        )
        for k, blocks in zip(drafted, timed, strict=True):
            at = replace(point, num_speculative_tokens=k)
            yield at, summarize(at, blocks)


def measure(
    base: Plan,
    drafted: dict[int, Plan],
    prompts: Sequence[tuple[list[int], str]],
    points: Sequence[Point],
    *,
    over: str,
    repeats: int,
    warmup: int,
    at_once: bool,
    logs: Path,
    console: Console,
) -> Iterator[tuple[Point, dict]]:
    """Measure every point of a grid, the target alone and with a drafter side by side.

    Only one engine works at a time.

    Args:
        base: the plan of the target alone.
        drafted: a plan with the drafter for each number of tokens drafted a step.
        prompts: token ids and source of each.
        points: what to measure, each of them at every k.
        over: ``engine`` or ``http``.
        repeats: times the prompts are gone through.
        warmup: prompts run first at each point and not counted.
        at_once: start all engines at the same time and keep them; else two at a time live.
        logs: folder for what the engines print.
        console: where people read each point's figures.

    Yields:
        Each point with what :func:`drafthead.prove.pairing.summarize` gives, once it is measured.

    Raises:
        DraftheadError: an engine does not run.
    """
    together = 1 + (len(drafted) if at_once else 1)

    def engine(plan: Plan, name: str, log: str) -> Running:
        return running(shared(plan, together), over, logs / f"bench-{log}.log", name)

    alone = engine(base, "target alone", "target")
    others = {k: engine(plan, f"drafted, k={k}", f"k{k}") for k, plan in drafted.items()}

    sources = [source for _, source in prompts]
    pairs = sum(
        len(blocks_of(sources, point.concurrency, repeats))
        for point in points
        if not at_once or point.num_speculative_tokens == next(iter(drafted))
    )
    with contextlib.ExitStack() as stack, progress(console, "bench", pairs, unit="pairs") as bar:

        def time_points(first: Engine, fast: dict[int, Engine]) -> Iterator[tuple[Point, dict]]:
            timed = time_grid(
                first,
                fast,
                prompts,
                points,
                repeats=repeats,
                warmup=warmup,
                on_pair=bar.advance,
            )
            for point, cell in timed:
                console.print(line(cell))
                yield point, {**cell, "over": over}

        if at_once:
            first, *fast = start([alone, *others.values()], stack, console)
            yield from time_points(first, dict(zip(others, fast, strict=True)))
        else:
            [first] = start([alone], stack, console)
            for k, other in others.items():
                with contextlib.ExitStack() as only_now:
                    [drafting] = start([other], only_now, console)
                    yield from time_points(first, {k: drafting})


def line(cell: dict) -> str:
    """A point of the grid in a line."""
    low, high = cell["speedup_ci95"]
    return (
        f"bench: k={cell['num_speculative_tokens']}, {cell['concurrency']} at once, answers of "
        f"{cell['max_new_tokens']}, temperature {cell['temperature']:g}: "
        f"{cell['base_tokens_per_s']:.1f} -> {cell['drafted_tokens_per_s']:.1f} tokens/s, "
        f"{cell['speedup']:.2f}x [{low:.2f}, {high:.2f}], {cell['verdict']}"
    )
