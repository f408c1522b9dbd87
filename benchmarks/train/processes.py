"""Training on several GPUs: is the curve the same however many there are, and what does each add?

    python -m benchmarks.train.processes --out OUT --recipe recipe.yaml --runs RUNS \
        --processes 1,2,4 --rows-per-step 4

The recipe's run has its states and its draft vocabulary (`drafthead run recipe.yaml --to vocab`);
they are shared, and nothing of the run is changed. Each case is `drafthead train` as a user starts
it, under torchrun where there are several processes, with the same rows a step: for each number of
processes; a run of the most processes that is killed once half of its steps are saved and goes on
with the fewest; and AdamW with the fewest and the most.

OUT/train_processes.json is written after each case: every loss, the held-out accepted length,
tokens a second in the later half, and how far the curve is from the first case's of its optimizer.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from rich.console import Console

from benchmarks.lib.record import begin, pick, save
from drafthead.fsio import read_json
from drafthead.rundir import RunDir

CONSOLE = Console(stderr=True, width=140)


@dataclass
class Case:
    """One training, by as many processes one after the other as `processes` has entries."""

    name: str
    processes: list[int]
    train: dict = field(default_factory=dict)
    """What differs from the recipe's `train` section."""


def cases(counts: list[int]) -> list[Case]:
    """What is compared, the fewest processes first."""
    fewest, most = min(counts), max(counts)
    adamw = {"optimizer": "adamw"}
    return [
        *(Case(f"muon-{n}", [n], {"optimizer": "muon"}) for n in sorted(counts)),
        Case(f"muon-{most}-killed-{fewest}", [most, fewest], {"optimizer": "muon"}),
        Case(f"adamw-{fewest}", [fewest], adamw),
        Case(f"adamw-{most}", [most], adamw),
    ]


def prepare(case: Case, options: argparse.Namespace) -> tuple[Path, RunDir]:
    """The case's recipe, and a run of its own that shares what came before training."""
    recipe = yaml.safe_load(options.recipe.read_text())
    own = {"rows_per_step": options.rows_per_step, "ttt_steps": options.ttt}
    recipe["train"] = recipe.get("train", {}) | own | case.train
    given = RunDir(options.runs / recipe["name"])
    run = RunDir(options.out / case.name / recipe["name"])
    shutil.rmtree(options.out / case.name, ignore_errors=True)
    run.root.mkdir(parents=True)
    for there, here in (
        (given.states, run.states),
        (given.answers, run.answers),
        (given.vocab, run.vocab),
    ):
        here.symlink_to(there.resolve())
    records = run.record("train", "begun").parent
    records.mkdir()
    for stage in ("generate", "capture", "vocab"):
        for state in ("begun", "done"):
            if (record := given.record(stage, state)).exists():
                shutil.copy(record, records)
    path = options.out / case.name / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, run


def metrics(run: RunDir) -> list[dict]:
    """What training has written so far; of a step that was gone through twice, the last."""
    path = run.train / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(row["step"], "loss" in row): row for row in rows}.values())


def start(path: Path, run: RunDir, processes: int, log: Path) -> subprocess.Popen:
    """`drafthead train`, as a user starts it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "drafthead", "train", str(path), "--runs", str(run.root.parent)]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def train(case: Case, options: argparse.Namespace) -> dict:
    """Run one case to its end; what it gave."""
    path, run = prepare(case, options)
    log = options.out / case.name / "log"
    for processes in case.processes[:-1]:
        running = start(path, run, processes, log)
        while running.poll() is None:
            names = [saved.name[5:] for saved in (run.train / "checkpoint").glob("step-*")]
            if any(2 * int(name) >= options.steps for name in names if name.isdecimal()):
                # torchrun's workers are in sessions of their own.
                for process in psutil.Process(running.pid).children(recursive=True):
                    process.kill()
                running.kill()
            time.sleep(0.05)
        if running.returncode == 0:
            return {"failed": "ended before it was killed"}
    begun = time.monotonic()
    if start(path, run, case.processes[-1], log).wait():
        return {"failed": log.read_text(errors="replace")[-3000:]}
    rows = metrics(run)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    rates = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    best = read_json(run.train / "best.json", "what training found")
    return {
        "processes": case.processes,
        "seconds": time.monotonic() - begun,
        "losses": losses,
        "accepted_length": best["accepted_length"],
        "tokens_per_s": statistics.median(rates[len(rates) // 2 :]),
        "steps": max(losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--ttt", type=int, default=3)
    parser.add_argument("--processes", default="1,2")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.steps = 0
    record = {
        **begin("train_processes"),
        "cases": {},
    }
    first: dict[str, dict] = {}
    for case in cases([int(n) for n in options.processes.split(",")]):
        found = record["cases"][case.name] = train(case, options)
        if "failed" not in found:
            options.steps = found["steps"]
            base = first.setdefault(case.train["optimizer"], found)
            found["loss_apart"] = max(
                abs(found["losses"][step] / loss - 1) for step, loss in base["losses"].items()
            )
        names = ("tokens_per_s", "accepted_length", "loss_apart")
        figures = {name: pick(done, *names) for name, done in record["cases"].items()}
        save(options.out / "train_processes.json", record, figures)
        shown = {k: v for k, v in found.items() if k != "losses"}
        CONSOLE.print({case.name: shown})


if __name__ == "__main__":
    main()
