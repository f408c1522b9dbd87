"""A grid of points measured: engines started, pairs timed, each point summed up.

How many engines memory holds decides how they are run:

- all of them: every block goes to every engine, the target alone is timed once for all k;
- two: the target alone stays, the engines with a head come one by one;
- one: each engine is started, timed on the first half of the blocks and ended, then all of them
  again on the second half (A B A B). The pairs are the same blocks, minutes apart.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from drafthead.plan import Plan
from drafthead.progress import Work, progress, waiting
from drafthead.prove.engine import EngineProcess
from drafthead.prove.paired_timing import (
    MIN_PAIRS,
    Engine,
    Numbered,
    Point,
    Prompts,
    Timed,
    blocks_of,
    pairs_of,
    summarize,
    time_blocks,
)
from drafthead.prove.server import ServerProcess

Running = EngineProcess | ServerProcess


def shared(plan: Plan, engines: int) -> Plan:
    """The plan of one of several engines that share a GPU: a part of the memory each."""
    if engines == 1:
        return plan
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
    """An engine in a child process, or (``over`` = http) a server."""
    if over == "http":
        return ServerProcess(plan, log=log, name=name)
    return EngineProcess(plan.args, env=plan.environment, log=log, name=name)


def start(
    engines: Sequence[Running],
    stack: contextlib.ExitStack,
    console: Console,
    *,
    together: bool = True,
) -> list[Engine]:
    """Start several engines and wait for all; ``stack`` ends them, at whatever moment.

    Args:
        engines: to start.
        stack: that they belong to.
        console: where people see the wait.
        together: start all at the same time. Where vLLM sizes its cache by the memory that is free,
            it must not: with others loading it would misjudge.
    """
    with waiting(console, f"starting {', '.join(engine.name for engine in engines)}"):
        for engine in engines:
            stack.push(engine)
            engine.start()
            if not together:
                engine.wait_ready()
        return [engine.wait_ready() for engine in engines]


@dataclass(frozen=True)
class Share:
    """Which of a point's blocks to time."""

    least: int = MIN_PAIRS
    """Blocks at least, all parts together: a small set of prompts is gone through again."""
    begin: int = 0
    end: int | None = None

    def of(self, prompts: Prompts, point: Point, repeats: int) -> list[Numbered]:
        """The blocks at a point, each with its number."""
        sources = [source for _, source in prompts]
        blocks = blocks_of(sources, point.concurrency, repeats, self.least)
        return list(enumerate(blocks))[self.begin : self.end]


ALL = Share()
FIRST = Share(2 * MIN_PAIRS, end=MIN_PAIRS)
"""The blocks that every k is timed on, to choose one."""
REST = Share(2 * MIN_PAIRS, begin=MIN_PAIRS)
"""The blocks that the chosen k is timed on, none of which it was chosen by."""


@dataclass(frozen=True)
class How:
    """How points are timed."""

    over: str
    """``engine`` or ``http``."""
    repeats: int
    """Times the prompts are gone through."""
    warmup: int
    """Prompts run first at each point and not counted."""
    at_once: int
    """Engines that memory holds."""
    together: bool
    """Engines may be started at the same time."""
    share: Share = ALL


def measure(
    base: Plan,
    drafted: dict[int, Plan],
    prompts: Prompts,
    points: Sequence[Point],
    how: How,
    *,
    logs: Path,
    console: Console,
) -> Iterator[tuple[Point, dict]]:
    """Measure points of a grid, the target alone and with a drafter. Only one engine works at a
    time.

    Args:
        base: the plan of the target alone.
        drafted: a plan with the drafter for each number of tokens drafted a step.
        prompts: token ids and source of each.
        points: what to measure.
        how: engines or servers, how many of them at once, which blocks.
        logs: folder for what the engines print.
        console: where people read each point's figures.

    Yields:
        Each point with its :func:`~drafthead.prove.paired_timing.summarize`, once it is measured.

    Raises:
        DraftheadError: an engine does not run.
    """
    ks = list(dict.fromkeys(point.num_speculative_tokens for point in points))
    alive = 1 + len(ks) if how.at_once > len(ks) else min(how.at_once, 2)

    def engine(plan: Plan, name: str, log: str) -> Running:
        return running(shared(plan, alive), how.over, logs / f"bench-{log}.log", name)

    alone = engine(base, "target alone", "target")
    others = {k: engine(drafted[k], f"with head, k={k}", f"k{k}") for k in ks}
    loads: dict[Point, _Load] = {}
    for point in points:
        at = replace(point, num_speculative_tokens=0)
        loads.setdefault(at, _Load(at, how.share.of(prompts, at, how.repeats))).ks.append(
            point.num_speculative_tokens
        )
    pairs = sum(len(load.ks) * len(load.blocks) for load in loads.values())
    with progress(console, "bench", pairs, unit="pairs") as bar:
        timing = _Timing([*loads.values()], prompts, how, bar, console)
        timed = timing.side_by_side(alone, others) if alive > 1 else timing.in_turn(alone, others)
        for load, k, base_blocks, drafted_blocks in timed:
            point = replace(load.at, num_speculative_tokens=k)
            both = pairs_of(prompts, point, load.blocks, base_blocks, drafted_blocks)
            cell = summarize(point, both) | {"over": how.over, "engines_at_once": alive}
            console.print(line(cell))
            yield point, cell


@dataclass
class _Load:
    """A load to measure."""

    at: Point
    """The point whatever its k."""
    blocks: list[Numbered]
    ks: list[int] = field(default_factory=list)

    def half(self, number: int) -> list[Numbered]:
        """The first (0) or the second half of the blocks."""
        middle = -(-len(self.blocks) // 2)
        return self.blocks[middle:] if number else self.blocks[:middle]


Measured = tuple[_Load, int, list[Timed], list[Timed]]
"""A load, a k, and the load's blocks on the target alone and with the drafter."""


@dataclass
class _Timing:
    """Starts and ends engines around the blocks that they are timed on."""

    loads: list[_Load]
    prompts: Prompts
    how: How
    bar: Work
    console: Console

    def side_by_side(self, alone: Running, others: dict[int, Running]) -> Iterator[Measured]:
        """All engines together if memory holds them; else the target alone stays and the others
        come one by one."""
        with contextlib.ExitStack() as stack:
            if self.how.at_once > len(others):
                base, *drafted = self._start([alone, *others.values()], stack)
                yield from self._each_load(base, dict(zip(others, drafted, strict=True)))
                return
            [base] = self._start([alone], stack)
            for k, other in others.items():
                with contextlib.ExitStack() as only_now:
                    [engine] = self._start([other], only_now)
                    yield from self._each_load(base, {k: engine})

    def in_turn(self, alone: Running, others: dict[int, Running]) -> Iterator[Measured]:
        """One engine at a time, each twice: A B A B."""
        base: list[list[Timed]] = [[] for _ in self.loads]
        drafted: dict[int, list[list[Timed]]] = {k: [[] for _ in self.loads] for k in others}
        for half in (0, 1):
            with contextlib.ExitStack() as only_now:
                [engine] = self._start([alone], only_now)
                for load, timed in zip(self.loads, base):
                    timed += self._time([engine], load, load.half(half), pairs=0)[0]
            for k, other in others.items():
                with contextlib.ExitStack() as only_now:
                    [engine] = self._start([other], only_now)
                    for load, timed in zip(self.loads, drafted[k]):
                        if k in load.ks:
                            timed += self._time([engine], load, load.half(half), pairs=1)[0]
                if half == 1:
                    for load, first, second in zip(self.loads, base, drafted[k]):
                        if k in load.ks:
                            yield load, k, first, second

    def _each_load(self, base: Engine, drafted: dict[int, Engine]) -> Iterator[Measured]:
        for load in self.loads:
            ks = [k for k in drafted if k in load.ks]
            engines = [base, *(drafted[k] for k in ks)]
            if ks:
                first, *rest = self._time(engines, load, load.blocks, pairs=len(ks))
                for k, timed in zip(ks, rest, strict=True):
                    yield load, k, first, timed

    def _time(
        self, engines: Sequence[Engine], load: _Load, blocks: list[Numbered], *, pairs: int
    ) -> list[list[Timed]]:
        """Time blocks of a load; each completes ``pairs`` pairs."""
        return time_blocks(
            engines,
            self.prompts,
            load.at,
            blocks,
            warmup=self.how.warmup,
            on_block=lambda: self.bar.advance(pairs),
        )

    def _start(self, engines: Sequence[Running], stack: contextlib.ExitStack) -> list[Engine]:
        return start(engines, stack, self.console, together=self.how.together)


def line(cell: dict) -> str:
    """A point of the grid in a line."""
    low, high = cell["speedup_ci95"]
    return (
        f"bench: k={cell['num_speculative_tokens']}, {cell['concurrency']} at once, answers of "
        f"{cell['max_new_tokens']}, temperature {cell['temperature']:g}: "
        f"{cell['base_tokens_per_s']:.1f} -> {cell['drafted_tokens_per_s']:.1f} tokens/s, "
        f"{cell['speedup']:.2f}x [{low:.2f}, {high:.2f}], {cell['verdict']}"
    )
