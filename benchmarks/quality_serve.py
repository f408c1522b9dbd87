"""Heads of the quality benchmark in vLLM: accepted length by the engine's counters, and speed
against the target alone, paired. Imported by quality.py.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from quality_heads import Job, make_recipe, run_of

from drafthead.errors import DraftheadError
from drafthead.prove.engine import EngineProcess
from drafthead.prove.pairing import Point, run_pairs, summarize
from drafthead.prove.prompts import heldout_prompts
from drafthead.serve import engine_plan

KS = (5, 3, 1)


def serve(
    options: argparse.Namespace,
    targets: list[str],
    heads: dict[str, Path],
    cells: list[dict],
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Add a cell to `cells` for each target, head and k that it lacks, k = 5 first, until
    `options.serve_seconds` are over. `save` is called after each."""
    deadline = time.monotonic() + options.serve_seconds
    done = {(c["target"], c["head"], c["k"]) for c in cells}
    wanted = [(t, h, k) for k in KS for t in targets for h in heads if (t, h, k) not in done]
    prompts = [(p.ids, p.source) for p in heldout_prompts(run_of(options), options.timed)]
    every = [p.ids for p in heldout_prompts(run_of(options), None)]
    tokens = 16 if options.tiny else options.answer
    with contextlib.ExitStack() as stack:
        engines: dict[tuple, EngineProcess] = {}
        for target, head, k in [*((t, None, 0) for t in targets), *wanted]:
            recipe = make_recipe(options, Job("serve"), target)
            folder = None if head is None else heads[head]
            plan = engine_plan(recipe, head=folder, num_speculative_tokens=k or None)
            name = f"{Path(target).name}-{Path(head or 'alone').name}-k{k}"
            log = options.out / "logs" / f"{name}.log"
            engine = EngineProcess(plan.args, env=plan.environment, log=log, name=name)
            stack.callback(engine.close)
            # On a GPU all load side by side; two cores take one after the other.
            engines[target, head, k] = engine.wait_ready() if options.tiny else engine.start()
        broken = {}
        for key, engine in engines.items():
            try:
                if not options.tiny:
                    engine.wait_ready()
            except DraftheadError as error:
                broken[key] = str(error)
                say(f"{key}: {error}")
        say(f"{len(engines) - len(broken)} of {len(engines)} engines are up")
        for target, head, k in wanted:
            base, drafted = (target, None, 0), (target, head, k)
            if base in broken or drafted in broken or time.monotonic() > deadline:
                continue
            before = engines[drafted].counters()
            engines[drafted].generate(every, max_tokens=tokens, concurrency=64)
            counts = engines[drafted].counters().since(before)
            point = Point(k, 1, 0.0, tokens)
            blocks = run_pairs(engines[base], engines[drafted], prompts, point, repeats=1, warmup=2)
            cells.append(
                {
                    "target": target,
                    "head": head,
                    "k": k,
                    "accepted_length": counts.accepted_length,
                    "acceptance_by_position": counts.acceptance_by_position,
                    "drafts": counts.drafts,
                    "timed": summarize(point, blocks),
                }
            )
            speed = cells[-1]["timed"]["speedup"]
            say(f"{Path(target).name} {head} k={k}: {counts.accepted_length:.3f}, {speed:.2f}x")
            save()
