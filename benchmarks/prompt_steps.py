"""What steps that read prompts cost, from the steps that a grid's record has kept.

    python benchmarks/prompt_steps.py benchmarks/results/grid.json \
        --case h200/graphs512/smollm2-bf16 --prompt chat=36,code=150,maths=55

With several requests at once, for each load and k, over all prompts and by source: the share of
steps that read a prompt, and the median milliseconds of those that read none, and of those that
read some with up to --graph tokens in them and with more. --prompt says how many tokens the prompts
of each source have (the median).

vLLM prepares a step while the one before runs, so what the host pays for it lies in the time of the
one before: a step counts as reading what the *next* one reads, and as reading nothing if neither
does. A step has k + 1 tokens for each request in it, and a prompt for each first token that it
brings. `decoding` is the tokens a step yields times the speed of its steps that read nothing, over
those of the target alone.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from drafthead.prove.steady import unpacked

CONSOLE = Console(width=220)


def summary(
    pairs: Iterable[dict], side: str, k: int, prompt: dict[str, int], graph: int
) -> dict[str, float | None]:
    """Of one side's steps, the share that read a prompt, and median milliseconds by what they read
    (of six steps at least): "none", "some", and "large", which is "some" in more than `graph`
    tokens."""
    found: dict[str, list[float]] = {"none": [], "some": [], "large": []}
    reading: list[bool] = []
    for pair in pairs:
        length = prompt.get(pair["sources"][0], 0)
        steps = unpacked(pair.get(f"{side}_steps") or "")
        reading += [step.first > 0 for step in steps]
        for step, after in pairwise(steps):
            milliseconds = 1e3 * step.seconds
            if after.first:
                tokens = after.requests * (k + 1) + after.first * length
                found["large" if tokens > graph else "some"].append(milliseconds)
            elif not (step.first or step.waiting or after.waiting):
                found["none"].append(milliseconds)
    return {
        "reading": round(statistics.mean(reading), 3) if reading else None,
        **{
            name: round(statistics.median(values), 2) if len(values) > 5 else None
            for name, values in found.items()
        },
    }


def judge(
    cells: Iterable[dict], source: str | None, prompt: dict[str, int], graph: int
) -> list[dict]:
    """Both sides' steps at each point of a case's greedy cells, of all sources or of one."""
    rows = []
    for cell in cells:
        k, load = cell["num_speculative_tokens"], cell["concurrency"]
        if load == 1 or cell["temperature"]:
            continue
        pairs = [pair for pair in cell["pairs"] if source is None or pair["sources"] == [source]]
        alone = summary(pairs, "base", 0, prompt, graph)
        head = summary(pairs, "drafted", k, prompt, graph)
        both = alone["none"], head["none"]
        rows.append(
            {
                "concurrency": load,
                "tokens": cell["max_new_tokens"],
                "k": k,
                "alone": alone,
                "head": head,
                "decoding": round(cell["accepted_length"] * both[0] / both[1], 2)
                if both[0] and both[1]
                else None,
            }
        )
    return sorted(rows, key=lambda row: (row["concurrency"], row["tokens"], row["k"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--case", action="append", help="default: all that kept their steps")
    parser.add_argument("--prompt", default="", help="SOURCE=TOKENS,…")
    parser.add_argument("--graph", type=int, default=512, help="tokens of the largest CUDA graph")
    options = parser.parse_args()
    prompt = {
        name: int(tokens)
        for name, _, tokens in (part.partition("=") for part in options.prompt.split(",") if part)
    }
    cases = json.loads(options.record.read_text())["cases"]
    for name, case in cases.items():
        pairs = [pair for cell in case["cells"] for pair in cell.get("pairs", [])]
        if not any(pair.get("base_steps") for pair in pairs):
            continue
        if options.case is not None and name not in options.case:
            continue
        sources = sorted({pair["sources"][0] for pair in pairs})
        for source in [None, *sources] if len(sources) > 1 else [None]:
            CONSOLE.print(f"{name}, {source or 'all prompts'}")
            for row in judge(case["cells"], source, prompt, options.graph):
                CONSOLE.print("   ", json.dumps(row))


if __name__ == "__main__":
    main()
