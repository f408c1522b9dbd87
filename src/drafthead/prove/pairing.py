"""Paired, interleaved timing of two engines: the same work on both, close together in time.

Machines drift (clocks, heat, neighbours). Timing one engine for a minute and then the other puts
the drift into the ratio; a pair takes both within seconds, and which of the two goes first
alternates from pair to pair.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from drafthead.prove.engine import EngineProcess, Generation, SpecCounters
from drafthead.prove.server import Client
from drafthead.prove.stats import conditional, speedup

MIN_PAIRS = 8
"""Fewer pairs give no interval worth printing: a small set is gone through again."""

Engine = EngineProcess | Client
"""What answers prompts and counts its drafts, in process or over HTTP."""


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    num_speculative_tokens: int
    concurrency: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Block:
    """The same prompts of one source on both engines, once; with one request at a time, one."""

    sources: list[str]
    base: Generation
    drafted: Generation
    counters: SpecCounters


def blocks_of(sources: Sequence[str], concurrency: int, repeats: int) -> list[list[int]]:
    """Indices of prompts, a block a pair: prompts of one source, so that each source has figures
    of its own, and two rounds of requests, so that the engine is full for most of it.

    Each prompt comes equally often within its source, ``repeats`` times or as often as it takes
    to fill blocks of that size, eight at least over all sources.
    """
    by_source: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        by_source.setdefault(source, []).append(i)
    size = 1 if concurrency == 1 else 2 * concurrency
    pairs = -(-MIN_PAIRS // len(by_source))
    columns = []
    for indices in by_source.values():
        work = indices * max(repeats, -(-pairs * size // len(indices)))
        blocks = [work[i : i + size] for i in range(0, len(work), size)]
        if len(blocks) > pairs and len(blocks[-1]) < size / 2:
            rest = blocks.pop()
            blocks[-1] += rest
        columns.append(blocks)
    # In turn, so that what drifts over time meets every source alike.
    return [block for row in itertools.zip_longest(*columns) for block in row if block]


def run_pairs(
    base: Engine,
    drafted: Sequence[Engine],
    prompts: Sequence[tuple[list[int], str]],
    point: Point,
    *,
    repeats: int,
    warmup: int,
) -> list[list[Block]]:
    """Time a point of the grid. Each block of prompts goes to every engine within seconds; which
    of them begins moves on from block to block.

    Args:
        base: the target alone.
        drafted: the target with the head, an engine for each k; all are paired with one ``base``.
        prompts: token ids and source of each.
        point: concurrency, temperature and length; all engines get the same.
        repeats: times the prompts are gone through.
        warmup: prompts run first on every engine and not counted.

    Returns:
        For each drafted engine its blocks.
    """
    engines = [base, *drafted]

    def generate(engine: Engine, indices: list[int], seed: int) -> Generation:
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
        for engine in engines:
            generate(engine, indices, seed=0)
    found: list[list[Block]] = [[] for _ in drafted]
    sources = [source for _, source in prompts]
    for n, indices in enumerate(blocks_of(sources, point.concurrency, repeats)):
        before = [engine.counters() for engine in drafted]
        written: dict[int, Generation] = {}
        for i in range(len(engines)):
            at = (i + n) % len(engines)
            written[at] = generate(engines[at], indices, seed=(n + 1) * len(prompts))
        for i, engine in enumerate(drafted):
            counters = engine.counters().since(before[i])
            own = [sources[j] for j in indices]
            found[i].append(Block(own, written[0], written[i + 1], counters))
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
        "step_s": typical_steps([pair(block) for block in blocks]),
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
        both
        for block in blocks
        for both in zip(block.base.completions, block.drafted.completions, strict=True)
    ]
    return {
        **asdict(point),
        **figures(blocks),
        "answers": len(answers),
        "same_tokens": sum(a.ids == b.ids for a, b in answers),
        "by_source": {source: figures(own) for source, own in sorted(by_source.items())},
        "pairs": [pair(block) for block in blocks],
    }


def step_seconds(generation: Generation, steps: int) -> float | None:
    """Mean wall-clock seconds of one decoding step, as a request meets it.

    After its first token, a request goes through one step of the engine for each further token
    (target alone) or for each draft (with the head), whatever else shares the step.
    """
    seconds = sum(c.seconds - c.first_token_s for c in generation.completions)
    return seconds / steps if steps else None


def pair(block: Block) -> dict:
    """What a block gave, JSON-able: all that the figures of a point come from."""
    base, drafted, counters = block.base, block.drafted, block.counters

    def first_token_s(generation: Generation) -> float:
        return float(np.mean([c.first_token_s for c in generation.completions]))

    return {
        "sources": sorted(set(block.sources)),
        "base_tokens": base.tokens,
        "base_s": base.wall_s,
        "base_step_s": step_seconds(base, base.tokens - len(base.completions)),
        "base_first_token_s": first_token_s(base),
        "drafted_tokens": drafted.tokens,
        "drafted_s": drafted.wall_s,
        "drafted_step_s": step_seconds(drafted, counters.drafts),
        "drafted_first_token_s": first_token_s(drafted),
        "drafts": counters.drafts,
        "accepted_by_position": counters.accepted_per_position,
    }


def typical_steps(pairs: Sequence[dict]) -> dict[str, float | None]:
    """Seconds of a decoding step of both engines, and how many plain steps (of the same pair) one
    with the head takes: each the median over pairs, so that a neighbour's minute on the machine
    does not count."""
    found = {"base": "base_step_s", "drafted": "drafted_step_s"}
    both = [p for p in pairs if p["base_step_s"] and p["drafted_step_s"]]
    if not both:
        return {**dict.fromkeys(found), "plain_steps": None}
    ratios = [p["drafted_step_s"] / p["base_step_s"] for p in both]
    return {
        **{name: float(np.median([p[field] for p in both])) for name, field in found.items()},
        "plain_steps": float(np.median(ratios)),
    }


def latencies(generations: Sequence[Generation]) -> dict:
    """What a request meets, each as p50 and p99: seconds to its first token, seconds between
    outputs (inter-token latency; a drafted step puts out several tokens at once), seconds a later
    token on average, and tokens a second that one user gets (here p1 beside p50: the worst)."""
    completions = [c for g in generations for c in g.completions]
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
