"""What training loses by states in fp8: heads trained on one store in bf16, fp8 and fp8-aux.

    python -m benchmarks.train.state_formats --out OUT --recipe recipes/demo.yaml --runs runs
    python -m benchmarks.train.state_formats --out OUT \
        --recipe benchmarks/train/state_formats.yaml --runs OUT_OF_QUALITY/runs --target SMOLLM2
    python -m benchmarks.train.state_formats --out OUT --recipe RECIPE --runs RUNS --tiny

Takes a finished run's states, which are in bf16, and its draft vocabulary. For each seed three
heads start from the same weights and take the same batches in the same order for the same steps;
only the states' format differs, in training and in evaluation, as with a run of that format. The
seed decides the weights and the order. The head counts as it is after the last step.

On a GPU all heads train side by side in processes of their own: heads this narrow leave it idle.
With --work finished heads are kept there, and the same command continues with the rest.
OUT/state_formats.json is written after every head.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.capture.compare_states import compare
from benchmarks.lib.quality_heads import unverified_task
from benchmarks.lib.record import begin, pick, save
from drafthead.recipe import Recipe, load_recipe
from drafthead.rundir import RunDir
from drafthead.states import Encoding, Sample, StateReader, StateWriter
from drafthead.targets import recipe_target
from drafthead.train.loop import fit
from drafthead.train.parallel import World

FORMATS: tuple[Encoding, ...] = ("bf16", "fp8", "fp8-aux")


@dataclass(frozen=True)
class Job:
    """A head to train."""

    seed: int
    format: Encoding
    recipe: Recipe
    run: RunDir
    """Where its states and vocabulary are."""
    folder: Path


def reencoded(run: RunDir, into: RunDir, encoding: Encoding) -> None:
    """A run with the same states in another format, and the same vocabulary."""
    reader, place = StateReader(run.states), 0
    with StateWriter(into.states, replace(reader.meta, encoding=encoding), pending=4) as writer:
        for unit in reader.units:
            numbers = range(place, place + sum(len(shard.tokens) for shard in unit.shards))
            place = numbers.stop
            if not writer.has(unit.number):
                writer.submit(unit.number, map(reader.__getitem__, numbers))
    shutil.copytree(run.vocab, into.vocab, dirs_exist_ok=True)


def heldout(*stores: Path) -> Iterator[tuple[Sample, ...]]:
    """The same held-out samples of each store."""
    readers = [StateReader(store, verify=False) for store in stores]
    for index in readers[0].indices("heldout"):
        yield tuple(reader[index] for reader in readers)


def train(job: Job) -> dict:
    """Train a head; how it ended, JSON-able."""
    task = unverified_task(job.recipe, job.run, recipe_target(job.recipe))
    found = fit(task, job.folder, World.join(), Console(file=io.StringIO()))
    kept = ("steps", "tokens", "k", "accepted_length", "heldout", "train_seconds")
    return {"seed": job.seed, "format": job.format} | {key: found[key] for key in kept}


def summary(heads: list[dict]) -> dict[str, dict]:
    """By format, over the seeds that it and bf16 both have: accepted length and by how much it is
    above bf16's, in all and for each seed, with the standard deviation of that difference."""
    lengths = {(head["format"], head["seed"]): head["accepted_length"] for head in heads}
    found = {}
    for name in FORMATS:
        seeds = [s for f, s in sorted(lengths) if f == name and ("bf16", s) in lengths]
        if not seeds:
            continue
        own = [lengths[name, seed] for seed in seeds]
        gains = [lengths[name, seed] - lengths["bf16", seed] for seed in seeds]
        found[name] = {
            "seeds": seeds,
            "accepted_length": own,
            "mean": statistics.mean(own),
            "between_seeds": statistics.stdev(own) if len(own) > 1 else None,
            "minus_bf16": gains,
            "mean_minus_bf16": statistics.mean(gains),
            "sd_minus_bf16": statistics.stdev(gains) if len(gains) > 1 else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--target", help="instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument("--jobs", type=int, help="heads trained at once; default all on a GPU")
    parser.add_argument("--work", type=Path, help="keep stores and heads here")
    parser.add_argument("--tiny", action="store_true", help="one seed, a tenth of an epoch")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    if args.target:
        section = recipe.target.model_copy(update={"path": args.target})
        recipe = recipe.model_copy(update={"target": section})
    epochs = 0.1 if args.tiny else args.epochs or recipe.train.epochs
    run = RunDir(args.runs / recipe.name)
    work = args.work or Path(tempfile.mkdtemp(prefix="state_formats-"))
    runs = {name: run if name == "bf16" else RunDir(work / name) for name in FORMATS}
    jobs = []
    for seed in range(1 if args.tiny else args.seeds):
        # One evaluation, after the last step: nothing is chosen by what is measured.
        settings = {"epochs": epochs, "seed": seed, "eval_every": 1_000_000}
        section = recipe.train.model_copy(update=settings)
        own = recipe.model_copy(update={"train": section})
        jobs += [Job(seed, f, own, runs[f], work / f"{f}-{seed}") for f in FORMATS]
    record: dict = {
        **begin("state_formats"),
        "target": recipe.target.path,
        "epochs": epochs,
        "bytes_per_token": {},
        "states": {},
        "heads": [],
    }
    count = args.jobs or (len(jobs) if torch.cuda.is_available() else 1)
    if count > 1:  # read when a worker imports what counts its threads
        os.environ |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    try:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            others = FORMATS[1:]
            pool.starmap(reencoded, [(run, runs[name], name) for name in others], chunksize=1)
            results = pool.imap_unordered(train, jobs)
            target = recipe_target(recipe)
            for name in FORMATS:
                store = runs[name].states
                record["bytes_per_token"][name] = StateReader(store).meta.bytes_per_token
                if name != "bf16":
                    record["states"][name] = compare(heldout(run.states, store), target)
            for head in results:
                record["heads"].append(head)
                record["formats"] = summary(record["heads"])
                names = ("mean", "mean_minus_bf16", "sd_minus_bf16")
                figures = {name: pick(part, *names) for name, part in record["formats"].items()}
                save(args.out / "state_formats.json", record, figures | record["states"])
                length = f"accepted length {head['accepted_length']:.4f} at k = {head['k']}"
                print(f"{head['format']}, seed {head['seed']}: {length}", flush=True)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
