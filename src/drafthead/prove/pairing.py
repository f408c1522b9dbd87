"""Paired, interleaved timing of two engines: the same work on both, close together in time.

Machines drift (clocks, heat, neighbours). Timing one engine for a minute and then the other puts
the drift into the ratio; a pair takes both within seconds, and which of the two goes first
alternates from pair to pair.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from drafthead.prove.engine import EngineProcess, Generation, SpecCounters
from drafthead.prove.server import Client
from drafthead.prove.stats import conditional, speedup

MIN_PAIRS = 8
"""Fewer pairs give no interval worth printing: a small set is gone through again."""


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    num_speculative_tokens: int
    concurrency: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Block:
    """The same prompts on both engines, once; with one request at a time, one prompt."""

    sources: list[str]
    base: Generation
    drafted: Generation
    counters: SpecCounters


def blocks_of(count: int, concurrency: int, repeats: int) -> list[list[int]]:
    """Indices of prompts, a block a pair: two rounds of requests each, so that the engine is full
    for most of it; gone through ``repeats`` times, and again until there are 8 pairs."""
    size = min(count, 1 if concurrency == 1 else 2 * concurrency)
    once = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    if len(once) > 1 and len(once[-1]) < size / 2:
        rest = once.pop()
        once[-1] += rest
    repeats = max(repeats, -(-MIN_PAIRS // len(once)))
    return [block for _ in range(repeats) for block in once]


def run_pairs(
    base: EngineProcess | Client,
    drafted: EngineProcess | Client,
    prompts: Sequence[tuple[list[int], str]],
    point: Point,
    *,
    repeats: int,
    warmup: int,
) -> list[Block]:
    """Time a point of the grid.

    Args:
        base: the target alone.
        drafted: the target with the head.
        prompts: token ids and source of each.
        point: concurrency, temperature and length; both engines get the same.
        repeats: times the prompts are gone through.
        warmup: prompts run first on both and not counted.
    """

    def generate(engine: EngineProcess | Client, indices: list[int], seed: int) -> Generation:
        return engine.generate(
            [prompts[i][0] for i in indices],
            max_tokens=point.max_new_tokens,
            concurrency=point.concurrency,
            temperature=point.temperature,
            seed=seed if point.temperature else None,
            # A prompt out of the cache would leave only the decoding, which speculation helps.
            prefix_cache=False,
        )

    if warmup:
        indices = [i % len(prompts) for i in range(max(warmup, point.concurrency))]
        for engine in (base, drafted):
            generate(engine, indices, seed=0)
    found = []
    for n, indices in enumerate(blocks_of(len(prompts), point.concurrency, repeats)):
        before, written = drafted.counters(), {}
        order = (base, drafted) if n % 2 == 0 else (drafted, base)
        for engine in order:
            written[engine.name] = generate(engine, indices, seed=(n + 1) * len(prompts))
        counters = drafted.counters().since(before)
        sources = [prompts[i][1] for i in indices]
        found.append(Block(sources, written[base.name], written[drafted.name], counters))
    return found


def figures(blocks: Sequence[Block]) -> dict:
    """Throughputs, their ratio with its interval, acceptance and latencies of some pairs."""
    ratio = speedup(
        [b.base.tokens for b in blocks],
        [b.base.wall_s for b in blocks],
        [b.drafted.tokens for b in blocks],
        [b.drafted.wall_s for b in blocks],
    )
    counters = SpecCounters.total([b.counters for b in blocks])
    by_position = counters.acceptance_by_position
    return {
        "base_tokens_per_s": ratio.base_tokens_per_s,
        "drafted_tokens_per_s": ratio.drafted_tokens_per_s,
        "speedup": ratio.ratio,
        "speedup_ci95": list(ratio.ci95),
        "verdict": ratio.verdict,
        "pairs_timed": ratio.pairs,
        "accepted_length": counters.accepted_length,
        "acceptance_by_position": by_position,
        "conditional_acceptance_by_position": conditional(by_position),
        "drafts": counters.drafts,
        "step_s": step_seconds(blocks, counters),
        "latency": {
            "base": latencies([b.base for b in blocks]),
            "drafted": latencies([b.drafted for b in blocks]),
        },
    }


def summarize(point: Point, blocks: Sequence[Block]) -> dict:
    """What a point of the grid gave, JSON-able: the figures of all pairs, of each source's own
    where pairs are of one source, and every pair."""
    by_source: dict[str, list[Block]] = {}
    for block in blocks:
        if len(set(block.sources)) == 1:
            by_source.setdefault(block.sources[0], []).append(block)
    answers = [
        pair
        for block in blocks
        for pair in zip(block.base.completions, block.drafted.completions, strict=True)
    ]
    return {
        **asdict(point),
        **figures(blocks),
        "answers": len(answers),
        "same_tokens": sum(a.ids == b.ids for a, b in answers),
        "by_source": {source: figures(own) for source, own in sorted(by_source.items())},
        "pairs": [
            {
                "sources": sorted(set(b.sources)),
                "base_tokens": b.base.tokens,
                "base_s": b.base.wall_s,
                "drafted_tokens": b.drafted.tokens,
                "drafted_s": b.drafted.wall_s,
                "drafts": b.counters.drafts,
                "accepted": b.counters.accepted_tokens,
            }
            for b in blocks
        ],
    }


def step_seconds(blocks: Sequence[Block], counters: SpecCounters) -> dict[str, float | None]:
    """Mean wall-clock seconds of one decoding step, as a request meets it.

    After its first token, a request goes through one step of the engine for each further token
    (target alone) or for each draft (with the head), whatever else shares the step.
    """

    def decoding(generations: list[Generation]) -> tuple[float, int]:
        completions = [c for g in generations for c in g.completions]
        return (
            sum(c.seconds - c.first_token_s for c in completions),
            sum(len(c.ids) - 1 for c in completions),
        )

    base_s, base_steps = decoding([b.base for b in blocks])
    drafted_s, _ = decoding([b.drafted for b in blocks])
    return {
        "base": base_s / base_steps if base_steps else None,
        "drafted": drafted_s / counters.drafts if counters.drafts else None,
    }


def latencies(generations: Sequence[Generation]) -> dict:
    """Seconds a request waits: to its first token, and for each later one on average (p50, p99)."""
    completions = [c for g in generations for c in g.completions]
    first = [c.first_token_s for c in completions]
    long = [c for c in completions if len(c.ids) > 1]
    later = [(c.seconds - c.first_token_s) / (len(c.ids) - 1) for c in long]
    names = {"first_token_s": first, "per_later_token_s": later}
    return {
        name: {f"p{q}": float(np.percentile(values, q)) for q in (50, 99)} if values else None
        for name, values in names.items()
    }
