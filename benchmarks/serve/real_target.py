"""One record of a real target: what heads of both kinds learned, whether they are lossless, and
what they gain, out of the files that other benchmarks and the run left.

    python -m benchmarks.serve.real_target --out OUT --answers 2165165 \\
        --grid bf16/grid.json --grid nvfp4/grid.json --verify bf16-eagle3.json \\
        --head eagle3=runs/qwen2.5-coder-1.5b/eagle3/train --head dspark=…/dspark/train

OUT/real_target.json has the figures of `summary` below: ratios to the target alone at answers of up
to 256 tokens, of the drafter that is fastest there, with the number of pairs beside each.
"""

import argparse
import json
from pathlib import Path

from benchmarks.lib.record import begin, pick, save

LONG = 256
"""Tokens of an answer at most, of the figures in the summary."""


def ratio(cell: dict, source: str | None = None) -> tuple[float, int]:
    """Speed over the target alone, all pairs of a cell or those of one source; and how many."""
    pairs = [p for p in cell["pairs"] if source is None or p["sources"] == [source]]
    if not pairs:
        return 0.0, 0
    speed = lambda side: (
        sum(p[f"{side}_tokens"] for p in pairs) / sum(p[f"{side}_s"] for p in pairs)
    )
    return speed("drafted") / speed("base"), len(pairs)


def fastest(cells: list[dict], concurrency: int, source: str | None = None) -> dict:
    """The best drafter's speed at a load, what it is, and on how many pairs."""
    at_load = [c for c in cells if (c["concurrency"], c["max_new_tokens"]) == (concurrency, LONG)]
    best = max(at_load, key=lambda cell: ratio(cell, source)[0])
    speed, pairs = ratio(best, source)
    name = f"{best['drafter']} k={best['num_speculative_tokens']}"
    return {"speedup": speed, "drafter": name, "pairs": pairs}


def accepted(cells: list[dict], k: int, source: str) -> float:
    """The longest accepted length that a head has at k on prompts of a source."""
    lengths = [
        cell["by_source"][source]["accepted_length"]
        for cell in cells
        if cell["num_speculative_tokens"] == k
        and cell["max_new_tokens"] == LONG
        and cell["drafter"] != "ngram"
        and source in cell["by_source"]
    ]
    return max(lengths, default=0.0)


def gap(cells: list[dict], heads: dict[str, dict]) -> float:
    """Points between predicted and served acceptance at position 1, of the worst head. Both are of
    the largest k that was predicted; the served one is of the load with the most drafts."""
    gaps = []
    for name, head in heads.items():
        served = [c for c in cells if c["drafter"] == name and c["max_new_tokens"] == LONG]
        served = [c for c in served if c["num_speculative_tokens"] == head["k"]]
        if served:
            most = max(served, key=lambda cell: cell["drafts"])
            difference = head["acceptance_by_position"][0] - most["acceptance_by_position"][0]
            gaps.append(100 * abs(difference))
    return max(gaps, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", type=Path, action="append", required=True, help="grid.json")
    parser.add_argument("--verify", type=Path, action="append", default=[], help="of verify_cases")
    parser.add_argument("--head", action="append", default=[], help="DRAFTER=its train folder")
    parser.add_argument("--answers", type=int, required=True, help="tokens of answers trained on")
    parser.add_argument("--note", default="", help="what a reader has to know of these runs")
    options = parser.parse_args()
    record = begin("real_target") | {"note": options.note, "cases": {}, "heads": {}, "lossless": {}}
    for file in options.grid:
        grid = json.loads(file.read_text())
        record["cases"] |= grid["cases"]
        record["machine"] = grid["machine"]
    for entry in options.head:
        name, _, folder = entry.partition("=")
        best = json.loads((Path(folder) / "best.json").read_text())
        steps = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        curve = [[s["step"], s["accepted_length"]] for s in steps if "accepted_length" in s]
        record["heads"][name] = {**best, "curve": curve}
    for file in options.verify:
        proof = json.loads(file.read_text())
        names = ("lossless", "prompts", "identical", "ties", "differences", "words", "case")
        record["lossless"][file.stem] = pick(proof, *names)
    main_cells = record["cases"]["bf16"]["cells"]
    loads = {cell["concurrency"] for cell in main_cells}
    summary = {
        f"code_{concurrency}_{case}": fastest(record["cases"][case]["cells"], concurrency, "code")
        for case, concurrency in (("bf16", 1), ("bf16", 16), ("nvfp4", 1))
    } | {
        f"all_{concurrency}_{case}": fastest(own["cells"], concurrency)
        for case, own in record["cases"].items()
        for concurrency in sorted(loads)
        if any(cell["concurrency"] == concurrency for cell in own["cells"])
    }
    flat = {
        key: value
        for name, figure in summary.items()
        for key, value in ((name, figure["speedup"]), (f"{name}_pairs", figure["pairs"]))
    }
    flat |= {
        "min_64": min(fastest(own["cells"], 64)["speedup"] for own in record["cases"].values()),
        "accepted_k5_code": accepted(main_cells, 5, "code"),
        "accepted_k5_chat": accepted(main_cells, 5, "chat"),
        "gap_position1_points": gap(main_cells, record["heads"]),
        "tokens_trained": options.answers,
    }
    for name, head in record["heads"].items():
        flat[f"{name}_accepted_length"] = head["accepted_length"]
        flat[f"{name}_train_seconds"] = head["train_seconds"]
    flat |= {f"{name}_differences": p["differences"] for name, p in record["lossless"].items()}
    record["fastest"] = summary
    save(options.out / "real_target.json", record, flat)


if __name__ == "__main__":
    main()
