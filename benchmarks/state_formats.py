"""What training loses by fp8 states: heads trained on a store in bf16 and on the same in fp8.

    python benchmarks/state_formats.py --out OUT --recipe recipes/demo.yaml --runs runs --seeds 3
    python benchmarks/state_formats.py --out OUT --recipe RECIPE --runs RUNS --tiny

Takes a finished run's states and draft vocabulary. For each seed two heads start from the same
weights and take the same batches in the same order for the same steps; only the states' encoding
differs. The seed decides the weights and the order. The head counts as it is after the last step.

Writes OUT/state_formats.json after every pair.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from drafthead.states import Sample


def reencoded(store: Path, into: Path) -> None:
    """The same store with its states in fp8."""
    from drafthead.states import StateReader, StateWriter

    reader, place = StateReader(store), 0
    with StateWriter(into, replace(reader.meta, encoding="fp8")) as writer:
        for unit in reader.units:
            count = sum(len(shard.tokens) for shard in unit.shards)
            writer.submit(unit.number, [reader[i] for i in range(place, place + count)])
            place += count


def heldout(*stores: Path) -> Iterator[tuple[Sample, ...]]:
    """The same held-out samples of each store."""
    from drafthead.states import StateReader

    readers = [StateReader(store) for store in stores]
    for index in readers[0].indices("heldout"):
        yield tuple(reader[index] for reader in readers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument("--tiny", action="store_true", help="one seed, a tenth of an epoch")
    args = parser.parse_args()
    from drafthead.capture.compare import compare
    from drafthead.fsio import write_json
    from drafthead.machine import this_machine
    from drafthead.recipe import load_recipe
    from drafthead.rundir import RunDir
    from drafthead.targets import recipe_target
    from drafthead.train.loop import fit
    from drafthead.train.parallel import World
    from drafthead.train.stage import make_task

    recipe = load_recipe(args.recipe)
    epochs = 0.1 if args.tiny else args.epochs or recipe.train.epochs
    run, target, world = RunDir(args.runs / recipe.name), recipe_target(recipe), World.join()
    work = Path(tempfile.mkdtemp(prefix="state_formats-"))
    try:
        fp8 = RunDir(work / "fp8")
        reencoded(run.states, fp8.states)
        shutil.copytree(run.vocab, fp8.vocab)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": this_machine().as_dict(),
            "target": recipe.target.path,
            "epochs": epochs,
            "states": compare(heldout(run.states, fp8.states), target),
            "pairs": [],
        }
        for seed in range(1 if args.tiny else args.seeds):
            pair = {"seed": seed}
            for name, source in (("bf16", run), ("fp8", fp8)):
                # One evaluation, after the last step: nothing is chosen by what is measured.
                settings = {"epochs": epochs, "seed": seed, "eval_every": 1_000_000}
                train = recipe.train.model_copy(update=settings)
                task = make_task(recipe.model_copy(update={"train": train}), source, target)
                found = fit(task, work / f"{name}-{seed}", world, Console(stderr=True))
                pair[name] = {
                    k: found[k] for k in ("steps", "tokens", "accepted_length", "heldout")
                }
            record["pairs"].append(pair)
            gains = [
                p["fp8"]["accepted_length"] - p["bf16"]["accepted_length"] for p in record["pairs"]
            ]
            record["fp8_minus_bf16"] = {
                "mean": statistics.mean(gains),
                "each": gains,
                "between_seeds": statistics.pstdev(
                    p["bf16"]["accepted_length"] for p in record["pairs"]
                ),
            }
            write_json(args.out / "state_formats.json", record)
            print(record["fp8_minus_bf16"], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
