r"""How much faster are sampled requests served with drafts that are drawn from the head?

    python -m benchmarks.serve.sampled --out OUT --prompts chat=chat.jsonl \
        --case smollm2=TARGET,HEAD --case qwen=TARGET,HEAD@3+5,OTHER_HEAD@5+7
    python -m benchmarks.serve.sampled --out /tmp/s --tiny         # rehearsal on a CPU

A --case is a target's folder and those of EAGLE-3 or DSpark heads for it (of a run,
runs/NAME/head), each with the k that commit 10807bf serves (3 if left out) and those to draw drafts
at (the same). An engine each: the target alone; the likeliest drafts, as 10807bf serves them; drawn
ones. All engines of all cases start side by side and are shared by temperatures and loads. Then
rounds, until --seconds are over: at each temperature and load the same prompts on every engine of a
case, one engine after the other, others in each round, and another engine first in each block.

Ratios are those of a round; the record has their median and middle half, and is written after each
round. Its summary has t07_1, t07_16, t10_1, t10_16 of each head (tokens/s of drawn drafts at the
best k over those of 10807bf's) and, without a name, the least of all heads. --long adds the tokens
a step by place in answers of so many tokens, the end of text passed over.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.lib.record import begin, save
from benchmarks.lib.turns import add_turn, turn
from benchmarks.serve.grid import portion, read_prompts, served_recipe
from drafthead.errors import DraftheadError
from drafthead.head.acceptance import Acceptance
from drafthead.prove.engine import Generation
from drafthead.prove.grid import running, start
from drafthead.prove.paired_timing import Engine, Point, blocks_of, time_blocks
from drafthead.prove.steady_state import window
from drafthead.recipe import with_options
from drafthead.serve import engine_plan

CONSOLE = Console(stderr=True, width=140)
Side = tuple[str, str, int]
"""A head's name, how its drafts are chosen, and how many a step."""
ALONE: Side = ("", "target alone", 0)
LIKELIEST, DRAWN = "greedy", "probabilistic"
STRETCHES = (1, 128, 256, 512, 1024, 1536)
"""Where stretches of a long answer begin, in tokens."""


@dataclass
class Case:
    """A target's engines, and what each round gave."""

    about: dict
    prompts: list[tuple[list[int], str]]
    engines: dict[Side, Engine]
    rounds: dict[tuple[float, int], list[dict[Side, dict]]] = field(default_factory=dict)
    """By temperature and load, each with ``tokens_per_s`` and counters of every engine."""


def launch(
    entry: str, options: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[str, Case | str]:
    """The name of a case, and the case with its engines up, or why they are not."""
    name, _, rest = entry.partition("=")
    target, *drafters = rest.split(",")
    recipe = served_recipe(name, target, options)
    plans = {ALONE: engine_plan(recipe, head=None)}
    for drafter in drafters:
        head, _, named = drafter.partition("@")
        first, *drawn = [int(k) for k in named.split("+") if k] or [3]
        # Runs keep theirs in a folder of one name.
        called = Path(head).parent.name if Path(head).name == "head" else Path(head).name
        for method, k in [(LIKELIEST, first), *((DRAWN, k) for k in drawn or [first])]:
            served = with_options(recipe, "serve", {"draft_sample_method": method})
            plans[called, method, k] = engine_plan(served, head=head, num_speculative_tokens=k)
    logs = options.out / "logs"
    engines = [
        running(
            plan, "engine", logs / f"{name}-{number}.log", f"{name}, {' '.join(map(str, side))}"
        )
        for number, (side, plan) in enumerate(plans.items())
    ]
    about = {"target": Path(target).name, "heads": [Path(drafter).name for drafter in drafters]}
    try:
        up = dict(zip(plans, start(engines, stack, CONSOLE), strict=True))
        return name, Case(about, read_prompts(Path(target), options.prompts, options.count), up)
    except DraftheadError as error:
        return name, str(error)[-1500:]


def time_round(case: Case, number: int, options: argparse.Namespace) -> None:
    """Time a case's engines once at each temperature and load."""
    for heat, load in itertools.product(options.temperature, options.concurrency):
        point = Point(0, load, heat, options.tokens[0])
        some = portion(case.prompts, load, options.pairs, number)
        lists = blocks_of([source for _, source in some], load, 1, 1)
        blocks = [(number * len(lists) + i, block) for i, block in enumerate(lists)]
        warmup = 0 if number else 2
        timed = time_blocks(list(case.engines.values()), some, point, blocks, warmup=warmup)
        sides = {}
        for side, parts in zip(case.engines, timed, strict=True):
            seen = [window(part.generation, load) for part in parts]
            counters = Acceptance.total([part.counters for part in parts])
            sides[side] = {
                "tokens_per_s": sum(w.tokens for w in seen) / sum(w.seconds for w in seen),
                "drafts": counters.drafts,
                "accepted_by_position": counters.accepted,
            }
        case.rounds.setdefault((heat, load), []).append(sides)


def middle(ratios: Sequence[float]) -> dict:
    """Median and middle half."""
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return {"median": float(median), "middle_half": [float(low), float(high)]}


def cells(case: Case) -> list[dict]:
    """What all rounds come to: an entry for each temperature, load and engine."""
    found = []
    for (heat, load), rounds in case.rounds.items():
        for side in case.engines:
            own = [sides[side] for sides in rounds]
            others = {"alone": ALONE}
            for other in case.engines:
                if side[1] == DRAWN and other[:2] == (side[0], LIKELIEST):
                    others["10807bf"] = other
            over = {
                f"over_{called}": middle(
                    [sides[side]["tokens_per_s"] / sides[other]["tokens_per_s"] for sides in rounds]
                )
                for called, other in others.items()
                if side != ALONE
            }
            drafts = sum(part["drafts"] for part in own)
            accepted = np.sum([part["accepted_by_position"] for part in own], axis=0)
            rates = {
                "accepted_length": float(1 + accepted.sum() / max(1, drafts)),
                "acceptance_by_position": (accepted / max(1, drafts)).tolist(),
            }
            found.append(
                {
                    "head": side[0],
                    "draft_sample_method": side[1],
                    "num_speculative_tokens": side[2],
                    "temperature": heat,
                    "concurrency": load,
                    "rounds": len(rounds),
                    "tokens_per_s": middle([part["tokens_per_s"] for part in own]),
                    **over,
                    "drafts": drafts,
                    **(rates if drafts else {}),
                }
            )
    return found


def by_place(generation: Generation) -> list[dict]:
    """Tokens a step by where in an answer the step began; an output holds what a step yielded."""
    steps, tokens = np.zeros(len(STRETCHES), int), np.zeros(len(STRETCHES), int)
    for completion in generation.completions:
        counts = [n for _, n in completion.outputs]
        begins = np.cumsum([0, *counts[:-1]])
        at = np.searchsorted(STRETCHES, begins[1:], side="right") - 1
        np.add.at(steps, at, 1)
        np.add.at(tokens, at, counts[1:])
    rows = zip(STRETCHES, steps.tolist(), tokens.tolist())
    return [{"begin": b, "steps": n, "tokens_a_step": t / n} for b, n, t in rows if n]


def long_answers(case: Case, options: argparse.Namespace) -> list[dict]:
    """Of each engine with a head, at each temperature."""
    asked = [ids for ids, _ in case.prompts[: max(options.concurrency)]]
    return [
        {
            "head": side[0],
            "draft_sample_method": side[1],
            "num_speculative_tokens": side[2],
            "temperature": heat,
            "by_answer_position": by_place(
                engine.generate(
                    asked,
                    max_tokens=options.long,
                    concurrency=len(asked),
                    temperature=heat,
                    seed=0,
                    ignore_eos=True,
                )
            ),
        }
        for side, engine in case.engines.items()
        for heat in options.temperature
        if side != ALONE
    ]


def measure(
    cases: dict[str, Case], options: argparse.Namespace, found: dict, write: Callable[[], None]
) -> None:
    """Rounds until the time is over, then the long answers; `write` is called after each."""
    begun = time.monotonic()
    for number in itertools.count():
        for name, case in cases.items():
            time_round(case, number, options)
            found[name]["cells"] = cells(case)
            write()
        if time.monotonic() - begun > options.seconds or not cases:
            break
    for name, case in cases.items() if options.long else ():
        found[name]["long_answers"] = long_answers(case, options)
        write()


def figures(measured: dict[str, list[dict]]) -> dict:
    """Of each head the best k's median ratio at each temperature and load, and the least of all."""
    by_head: dict[str, dict[str, float]] = {}
    for case, rows in measured.items():
        for row in rows:
            if ratio := row.get("over_10807bf"):
                key = f"t{round(10 * row['temperature']):02d}_{row['concurrency']}"
                best = by_head.setdefault(f"{case}_{row['head']}", {})
                best[key] = max(best.get(key, 0.0), ratio["median"])
    keys = dict.fromkeys(key for own in by_head.values() for key in own)
    return {key: min(own[key] for own in by_head.values()) for key in keys} | by_head


def tiny_case(options: argparse.Namespace) -> None:
    """A target that is not sure of itself and a head for the rehearsal."""
    from tests.prove import crafted

    target, head = options.out / "target", options.out / "head"
    if not head.exists():
        crafted.head(head, crafted.target(target, scale=0.1), scale=0.1)
    file = options.out / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"word {n}"}) + "\n" for n in range(20)))
    options.case, options.prompts = [f"tiny={target},{head}@3+2"], [f"words={file}"]
    options.tokens, options.concurrency, options.count = [16], [1, 4], 8
    options.seconds, options.long = min(options.seconds, 10), 48


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", default=[], help="NAME=TARGET,HEAD[@K0+K],…")
    parser.add_argument("--prompts", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--count", type=int, default=64, help="prompts of each set")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs=1, default=[128], help="of an answer at most")
    parser.add_argument("--pairs", type=int, default=4, help="prompts of a round, one at a time")
    parser.add_argument("--seconds", type=float, default=100, help="of all rounds, starts excluded")
    parser.add_argument("--long", type=int, default=0, help="tokens of long answers, say 2000")
    parser.add_argument("--dtype", help="default: bfloat16, float32 on a CPU")
    parser.add_argument("--graphs", type=int, help="tokens of the largest CUDA graph, on all sides")
    parser.add_argument("--tiny", action="store_true")
    add_turn(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        tiny_case(options)
    path, record = options.out / "sampled.json", begin("sampled")
    # Room for what is asked for last.
    room = argparse.Namespace(**vars(options) | {"tokens": [*options.tokens, options.long]})
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        with ThreadPoolExecutor(len(options.case)) as pool:
            up = dict(pool.map(lambda entry: launch(entry, room, stack), options.case))
        cases = {name: case for name, case in up.items() if isinstance(case, Case)}
        record |= {
            "start_s": round(time.monotonic() - begun, 1),
            "failed": {name: why for name, why in up.items() if isinstance(why, str)},
            "cases": {name: {**case.about, "cells": []} for name, case in cases.items()},
        }
        CONSOLE.print(f"engines up after {record['start_s']} s; failed: {record['failed']}")

        def write() -> None:
            measured = {name: record["cases"][name]["cells"] for name in cases}
            save(path, record, figures(measured))

        write()
        try:
            with turn(options.turn):
                measure(cases, options, record["cases"], write)
        except DraftheadError as error:
            record["died"] = str(error)[-1500:]
            write()
    CONSOLE.print_json(path.read_text())


if __name__ == "__main__":
    main()
