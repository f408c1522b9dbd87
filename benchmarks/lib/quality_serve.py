"""Heads of the quality benchmark in vLLM: accepted length by the engine's counters, and speed
against the target alone, paired. Imported by quality.py.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.lib.quality_heads import Job, make_recipe, run_of
from benchmarks.lib.turns import turn
from drafthead.drafters import drafter_of
from drafthead.errors import DraftheadError
from drafthead.prove.engine import EngineProcess
from drafthead.prove.paired_timing import Point, run_pairs, summarize
from drafthead.prove.prompts import heldout_prompts
from drafthead.serve import engine_plan

KS = {"eagle3": (5, 3, 1), "dspark": (7, 5, 3)}  # the most worth having first


def serve(
    options: argparse.Namespace,
    targets: list[str],
    heads: dict[str, Path],
    cells: list[dict],
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Add a cell to `cells` for each target, head, k and load that it lacks; no target or load is
    begun once `options.serve_seconds` are over. All engines of a target are timed against one of
    the target alone, prompt by prompt. `save` is called after each load."""
    deadline = time.monotonic() + options.serve_seconds
    loads = [int(part) for part in options.loads.split(",")]
    done = [(c["target"], c["head"], c["k"]) for c in cells]
    ks = {name: KS[drafter_of(folder).kind] for name, folder in heads.items()}
    places = range(options.serve_ks)
    every_key = [(t, h, ks[h][place]) for place in places for t in targets for h in heads]
    wanted = [key for key in every_key if done.count(key) < len(loads)]
    prompts = [(p.ids, p.source) for p in heldout_prompts(run_of(options), options.timed)]
    every = [p.ids for p in heldout_prompts(run_of(options), None)]
    tokens = 16 if options.tiny else options.answer
    cuda = torch.cuda.is_available()

    def add(target: str, keys: list, counts: list, found: list, point: Point) -> None:
        """A cell for each engine's blocks."""
        for (_, head, k), count, blocks in zip(keys, counts, found):
            timed = summarize(replace(point, num_speculative_tokens=k), blocks)
            cells.append(
                {
                    "target": target,
                    "head": head,
                    "k": k,
                    "concurrency": point.concurrency,
                    "accepted_length": count.accepted_length,
                    "acceptance_by_position": count.by_position,
                    "drafts": count.drafts,
                    "timed": timed,
                }
            )
            say(
                f"{Path(target).name} {head} k={k}, {point.concurrency} at once: "
                f"{count.accepted_length:.3f}, "
                f"{timed['speedup']:.2f}x {timed['speedup_ci95']}"
            )

    with contextlib.ExitStack() as stack:
        engines: dict[tuple, EngineProcess] = {}
        for target, head, k in [*((t, None, 0) for t in targets), *wanted]:
            recipe = make_recipe(options, Job("serve"), target)
            folder = None if head is None else heads[head]
            plan = engine_plan(recipe, head=folder, num_speculative_tokens=k or None)
            name = f"{Path(target).name}-{Path(head or 'alone').name}-k{k}"
            log = options.out / "logs" / f"{name}.log"
            # One process an engine, not two: starting them is most of this stage's time.
            env = plan.environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            engine = EngineProcess(plan.args, env=env, log=log, name=name)
            stack.callback(engine.close)
            # On a GPU all load side by side; on a CPU one after the other.
            engines[target, head, k] = engine.start() if cuda else engine.wait_ready()
        broken = {}
        for key, engine in engines.items():
            try:
                if cuda:
                    engine.wait_ready()
            except DraftheadError as error:
                broken[key] = str(error)
                say(f"{key}: {error}")
        say(f"{len(engines) - len(broken)} of {len(engines)} engines are up")
        for target in targets:
            base = (target, None, 0)
            keys = [key for key in wanted if key[0] == target and key not in broken]
            if base in broken or not keys or time.monotonic() > deadline:
                continue
            counts = []
            for key in keys:
                before = engines[key].counters()
                engines[key].generate(every, max_tokens=tokens, concurrency=64)
                counts.append(engines[key].counters().since(before))
            drafted = [engines[key] for key in keys]
            for load in loads:
                if time.monotonic() > deadline:
                    break
                point = Point(0, load, 0.0, tokens)
                with turn(options.turn):
                    asked = prompts * -(-2 * load // len(prompts))
                    found = run_pairs(engines[base], drafted, asked, point, repeats=1, warmup=2)
                add(target, keys, counts, found, point)
                save()
