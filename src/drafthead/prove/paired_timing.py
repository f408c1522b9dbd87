"""Paired, interleaved timing of two engines: the same work on both, close together in time.

Machines drift (clocks, heat, neighbours). Timing one engine for a minute and then the other puts
the drift into the ratio; a pair takes both within seconds, and which of the two goes first
alternates from pair to pair. Where memory holds one engine only, the two engines of a pair are
minutes apart; the pairs are the same, block by block. With several requests at once, what counts is
what came while all places were taken (:mod:`drafthead.prove.steady_state`).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from drafthead.head.acceptance import Acceptance
from drafthead.prove.engine import Completion, EngineProcess, Generation
from drafthead.prove.server import Client
from drafthead.prove.stats import speedup
from drafthead.prove.steady_state import Window, requests, whole, window

MIN_PAIRS = 8
"""Fewer pairs give no interval worth printing: a small set is gone through again."""

METHOD = (
    "measured; the same prompts on both engines, alternating which goes first (or, with one engine "
    "in memory at a time, the engines in turn, twice), warm-up left out; "
    "one request at a time: all generated tokens over all seconds; several: each that ends is "
    "replaced at once, and tokens and seconds count while all places are taken; prefill included "
    "and never from a prefix cache; ratio over pairs with a 95 % bootstrap interval (expanded "
    "percentile); seconds of a step from the mean of steps a second over pairs; "
    "acceptance from the engine's own counters"
)

Engine = EngineProcess | Client
"""What answers prompts and counts its drafts, in process or over HTTP."""


LOAD = ("tensor_parallel_size", "temperature", "max_new_tokens", "concurrency")
"""What makes the load of a measured point."""


def load(cell: Mapping) -> tuple:
    """The load of a measured point."""
    return tuple(cell[name] for name in LOAD)


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    num_speculative_tokens: int
    concurrency: int
    temperature: float
    max_new_tokens: int


Prompts = Sequence[tuple[list[int], str]]
"""Token ids and source of each."""
Numbered = tuple[int, list[int]]
"""A block's number, which its seeds follow from, and the indices of its prompts."""


@dataclass(frozen=True)
class Timed:
    """A block on one engine."""

    generation: Generation
    counters: Acceptance


@dataclass(frozen=True)
class Block:
    """The same requests of one source on both engines, once; one at a time, a single one."""

    sources: list[str]
    """Of the prompts."""
    concurrency: int
    limits: list[int]
    """Of the answers, in tokens."""
    base: Generation
    drafted: Generation
    counters: Acceptance


def blocks_of(
    sources: Sequence[str], concurrency: int, repeats: int, least: int = MIN_PAIRS
) -> list[list[int]]:
    """Indices of prompts, a block a pair: prompts of one source, so that each source has figures
    of its own, and enough for two rounds of requests.

    Each prompt comes equally often within its source, ``repeats`` times or as often as it takes
    to fill blocks of that size, ``least`` at least over all sources.
    """
    by_source: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        by_source.setdefault(source, []).append(i)
    size = 1 if concurrency == 1 else 2 * concurrency
    pairs = -(-least // len(by_source))
    columns = []
    for indices in by_source.values():
        work = indices * max(repeats, -(-pairs * size // len(indices)))
        blocks = [work[i : i + size] for i in range(0, len(work), size)]
        if len(blocks[-1]) < size:
            rest = blocks.pop()
            blocks[-1] += rest
        columns.append(blocks)
    # In turn, so that what drifts over time meets every source alike.
    return [block for row in itertools.zip_longest(*columns) for block in row if block]


def time_blocks(
    engines: Sequence[Engine],
    prompts: Prompts,
    point: Point,
    blocks: Sequence[Numbered],
    *,
    warmup: int,
    on_block: Callable[[], None] = lambda: None,
) -> list[list[Timed]]:
    """Give each block of prompts to every engine within seconds; which of them begins moves on
    from block to block.

    Args:
        engines: that are alive.
        prompts: token ids and source of each.
        point: concurrency, temperature and length; all engines get the same.
        blocks: of indices of prompts.
        warmup: prompts run first on every engine and not counted.
        on_block: called once a block has been to every engine.

    Returns:
        For each engine its blocks.
    """

    def generate(
        engine: Engine, indices: list[int], limits: int | list[int], seed: int
    ) -> Generation:
        return engine.generate(
            [prompts[i][0] for i in indices],
            max_tokens=limits,
            concurrency=point.concurrency,
            temperature=point.temperature,
            seed=seed if point.temperature else None,
            # A prompt out of the cache would leave only the decoding, which speculation helps.
            prefix_cache=False,
        )

    if warmup and blocks:
        indices = [i % len(prompts) for i in range(max(warmup, point.concurrency))]
        for engine in engines:
            generate(engine, indices, point.max_new_tokens, seed=0)
    timed: list[list[Timed]] = [[] for _ in engines]
    for number, block in blocks:
        indices, limits = requests(block, point.concurrency, point.max_new_tokens)
        for i in range(len(engines)):
            at = (i + number) % len(engines)
            before = engines[at].counters()
            written = generate(engines[at], indices, limits, (number + 1) * len(prompts))
            timed[at].append(Timed(written, engines[at].counters().since(before)))
        on_block()
    return timed


def pairs_of(
    prompts: Prompts,
    point: Point,
    blocks: Sequence[Numbered],
    base: Sequence[Timed],
    drafted: Sequence[Timed],
) -> list[Block]:
    """The same blocks on the target alone and with the head, put together."""
    return [
        Block(
            [prompts[i][1] for i in block],
            point.concurrency,
            requests(block, point.concurrency, point.max_new_tokens)[1],
            alone.generation,
            fast.generation,
            fast.counters,
        )
        for (_, block), alone, fast in zip(blocks, base, drafted, strict=True)
    ]


def run_pairs(
    base: Engine,
    drafted: Sequence[Engine],
    prompts: Prompts,
    point: Point,
    *,
    repeats: int,
    warmup: int,
    least: int = MIN_PAIRS,
) -> list[list[Block]]:
    """Time a point of the grid on engines that are alive, all paired with one ``base``.

    Args:
        base: the target alone.
        drafted: the target with the head, an engine for each k.
        prompts: token ids and source of each.
        point: concurrency, temperature and length.
        repeats: times the prompts are gone through.
        warmup: prompts run first on every engine and not counted.
        least: pairs at least.

    Returns:
        For each drafted engine its blocks.
    """
    sources = [source for _, source in prompts]
    blocks = list(enumerate(blocks_of(sources, point.concurrency, repeats, least)))
    alone, *others = time_blocks([base, *drafted], prompts, point, blocks, warmup=warmup)
    return [pairs_of(prompts, point, blocks, alone, timed) for timed in others]


def figures(blocks: Sequence[Block]) -> dict:
    """Throughputs, their ratio with its interval, acceptance and latencies of some pairs."""
    pairs = [pair(block) for block in blocks]
    columns = ("base_tokens", "base_s", "drafted_tokens", "drafted_s")
    ratio = speedup(*([p[name] for p in pairs] for name in columns))
    counters = Acceptance.total([b.counters for b in blocks])
    return {
        "base_tokens_per_s": ratio.base_tokens_per_s,
        "drafted_tokens_per_s": ratio.drafted_tokens_per_s,
        "speedup": ratio.ratio,
        "speedup_ci95": list(ratio.ci95),
        "verdict": ratio.verdict,
        "pairs_timed": ratio.pairs,
        "accepted_length": counters.accepted_length,
        "acceptance_by_position": counters.by_position,
        "conditional_acceptance_by_position": counters.conditional,
        "drafts": counters.drafts,
        "accepted_past_end": past_end(blocks),
        "step_s": typical_steps(pairs),
        "latency": {
            name: latencies(
                [
                    completion
                    for b in blocks
                    for completion in whole(getattr(b, name), b.limits, b.concurrency)
                ]
            )
            for name in ("base", "drafted")
        },
    }


def past_end(blocks: Sequence[Block]) -> int:
    """Drafts that vLLM counts as accepted and nobody got: they stood beyond the longest answer
    allowed, or beyond its end. A step yields a token of the target's own besides its drafts, and
    the prompt's step yields the first."""
    of = [b.drafted for b in blocks]
    delivered = sum(g.tokens - len(g.completions) for g in of)
    steps = sum(b.counters.drafts + sum(b.counters.accepted) for b in blocks)
    return max(0, steps - delivered)


def summarize(point: Point, blocks: Sequence[Block]) -> dict:
    """The result of a point of the grid, JSON-able: figures of all pairs, figures of each source
    whose pairs are all its own, and every pair."""
    by_source: dict[str, list[Block]] = {}
    for block in blocks:
        if len(set(block.sources)) == 1:
            by_source.setdefault(block.sources[0], []).append(block)
    answers = [
        both
        for block in blocks
        for both in zip(block.base.completions, block.drafted.completions, strict=True)
    ]
    return {
        **asdict(point),
        **figures(blocks),
        "answers": len(answers),
        "same_tokens": sum(a.ids == b.ids for a, b in answers),
        # A single pair has no interval.
        "by_source": {
            source: figures(its_blocks)
            for source, its_blocks in sorted(by_source.items())
            if len(its_blocks) > 1
        },
        "pairs": [pair(block) for block in blocks],
    }


def step_seconds(seen: Window, steps_a_token: float) -> float | None:
    """Mean wall-clock seconds of one decoding step, as a request meets it.

    After its first token, a request goes through one step of the engine for each further token
    (target alone) or for each draft (with the head), whatever else shares the step.

    Args:
        seen: while all places were taken.
        steps_a_token: that were gone through for each of those further tokens.
    """
    steps = seen.later_tokens * steps_a_token
    return seen.decoding_s / steps if steps else None


def pair(block: Block) -> dict:
    """The steady-state figures of a block, JSON-able; all figures of a point follow from them.
    Drafts and their acceptance are those of the whole block."""
    counters, seconds = block.counters, dict[str, Any]()
    later = block.drafted.tokens - len(block.drafted.completions)
    drafts_a_token = counters.drafts / later if later else 0.0
    for name, generation, steps in (
        ("base", block.base, 1.0),
        ("drafted", block.drafted, drafts_a_token),
    ):
        seen = window(generation, block.concurrency)
        seconds |= {
            f"{name}_tokens": seen.tokens,
            f"{name}_s": seen.seconds,
            f"{name}_step_s": step_seconds(seen, steps),
        }
    return {
        "sources": sorted(set(block.sources)),
        **seconds,
        "drafts": counters.drafts,
        "accepted_by_position": counters.accepted,
    }


def typical_steps(pairs: Sequence[dict]) -> dict[str, float | None]:
    """Seconds of a decoding step of both engines, and how many plain steps one with the head takes.

    Each is what steps a second, averaged over pairs, make of a second: a neighbour's minute on the
    machine counts little, and every pair counts. Of some 9 pairs on an H100 a ratio of these has a
    standard error of 7 %, a median of the pairs' own ratios one of 10 %.
    """
    both = [(p["base_step_s"], p["drafted_step_s"]) for p in pairs]
    rates = [(1 / base, 1 / drafted) for base, drafted in both if base and drafted]
    if not rates:
        return {"base": None, "drafted": None, "plain_steps": None}
    base, drafted = (float(seconds) for seconds in 1 / np.mean(rates, axis=0))
    return {"base": base, "drafted": drafted, "plain_steps": drafted / base}


def latencies(completions: Sequence[Completion]) -> dict:
    """What a request meets, each as p50 and p99: seconds to its first token, seconds between
    outputs (inter-token latency; a drafted step puts out several tokens at once), seconds a later
    token on average, and tokens a second that one user gets (here p1 beside p50: the worst)."""
    long = [c for c in completions if len(c.ids) > 1]
    later = [(c.seconds - c.first_token_s) / (len(c.ids) - 1) for c in long]
    names = {
        "first_token_s": ([c.first_token_s for c in completions], 99),
        "between_outputs_s": ([gap for c in completions for gap in c.gaps_s], 99),
        "per_later_token_s": (later, 99),
        "tokens_per_s_of_a_user": ([len(c.ids) / c.seconds for c in completions if c.seconds], 1),
    }
    return {
        name: {f"p{q}": float(np.percentile(values, q)) for q in (50, worst)} if values else None
        for name, (values, worst) in names.items()
    }
