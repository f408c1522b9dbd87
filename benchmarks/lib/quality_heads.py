"""One head of the quality benchmark, trained in this process: ours, or speculators' on the same
states. Imported by quality.py, whose worker processes call `train`.
"""

import argparse
import dataclasses
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmarks.lib.turns import turn
from benchmarks.peers import speculators_side
from drafthead.drafters import drafter_of
from drafthead.drafters.base import TargetSide
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.fsio import read_json, write_json
from drafthead.head.checkpoint import save_head
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.ops.losses import Teacher
from drafthead.prove.expected import Sampling, expected_acceptance
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StateReader
from drafthead.targets import Target, load_target
from drafthead.train.batches import prefetch
from drafthead.train.evaluate import evaluate
from drafthead.train.loop import Task, fit
from drafthead.train.parallel import World
from drafthead.train.plan import Plan
from drafthead.train.stage import make_task
from drafthead.vocab import vocab

KS = (1, 2, 3, 4, 5)
THEIR_STEPS = 3  # speculators' default number of training-time-test steps
BARE = {"fc_norm": False, "norm_before_residual": False, "norm_output": False}
"""The `head` section of a head without norms but those of its layer."""


@dataclass(frozen=True)
class Job:
    """A head to train. Of `train`, theirs takes learning_rate, row_tokens and seed."""

    name: str
    side: Literal["ours", "theirs"] = "ours"
    train: dict = field(default_factory=dict)
    """What differs from the recipe's `train` section."""
    head: dict = field(default_factory=dict)
    """What differs from its `head` section."""
    vocab: int = 16000
    epochs: float = 1.0
    evaluations: int = 1
    """Evaluations over the run, evenly spread; their time is not counted."""
    all_layers: bool = False
    """Read all five captured auxiliary layers instead of the usual three."""
    random_fc: bool = False
    """Draw `fc` at random instead of passing the deepest state through."""


def aux_layers(target_path: str) -> tuple[list[int], list[int]]:
    """The usual auxiliary layers, and those with the ones half-way between."""
    target = load_target(target_path)
    return list(target.default_aux_layers()), list(target.spread_aux_layers())


def make_recipe(options: argparse.Namespace, job: Job, target: str) -> Recipe:
    """The recipe that a job stands for. Tiny rehearsals shrink every length sixteenfold."""
    tiny, cuda = options.tiny, torch.cuda.is_available()
    usual, more = aux_layers(options.target)
    train = {"row_tokens": 8192, "epochs": job.epochs} | job.train
    if tiny:
        train["row_tokens"] //= 16
    return parse_recipe(
        {
            "name": "quality",
            "target": {"path": target},
            "prompts": {"sources": [{"path": str(options.prompts)}], "heldout": options.heldout},
            "generate": {"max_new_tokens": 24 if tiny else options.answer, "chunk": 2200},
            "capture": {"aux_layers": more},
            "vocab": {"size": job.vocab // 80 if tiny else job.vocab},
            "head": {"aux_layers": more if job.all_layers else usual} | job.head,
            "train": train,
            "engine": {
                "max_model_len": 256 if tiny else 2048,
                "max_num_seqs": 8 if tiny else 64,
                # So that several engines share the card without one measuring the others.
                "kv_cache_memory_bytes": (3 << 29) if cuda else (64 << 20),
                "gpu_memory_utilization": 0.05,
                "dtype": "bfloat16" if cuda else "float32",
            },
            "serve": {"num_speculative_tokens": 7 if job.head.get("kind") == "dspark" else 5},
        },
        "quality.py",
    )


def run_of(options: argparse.Namespace, size: int | None = None) -> RunDir:
    """The run that was captured, or one with the same states and a draft vocabulary of `size`."""
    captured = RunDir(options.out / "runs" / "quality")
    if size is None:
        return captured
    run = RunDir(options.out / "vocabularies" / str(size))
    run.root.mkdir(parents=True, exist_ok=True)
    for mine, theirs in ((run.states, captured.states), (run.answers, captured.answers)):
        if not mine.exists():
            mine.symlink_to(theirs.resolve())
    if not (run.vocab / "vocab.safetensors").exists():
        recipe = make_recipe(options, Job("vocabulary", vocab=size), options.target)
        vocab(recipe, run, console=Console(file=io.StringIO()))
    return run


def unverified_task(recipe: Recipe, run: RunDir, target: Target) -> Task:
    """What the recipe asks to be trained. Shards are not verified again for each of many heads: it
    would take longer than training one."""
    reader = StateReader(run.states, verify=False, aux_layers=recipe.head.aux_layers)
    return dataclasses.replace(make_task(recipe, run, target), reader=reader)


def task_of(options: argparse.Namespace, job: Job) -> Task:
    """What the job trains on what."""
    recipe = make_recipe(options, job, options.target)
    return unverified_task(recipe, run_of(options, job.vocab), load_target(options.target))


def train(options: argparse.Namespace, job: Job, warm: bool = False) -> dict:
    """Train a job (once: a finished one is read back); its record, JSON-able.

    warm: compile first, so that the times are of training alone.
    """
    folder = options.out / "heads" / job.name
    if (folder / "record.json").exists():
        return read_json(folder / "record.json", "a finished head")
    begun = time.monotonic()
    task = task_of(options, job)
    torch._dynamo.reset()
    with torch.no_grad():
        if job.random_fc:
            torch.manual_seed(job.train.get("seed", 0))
            task.head.fc.weight.normal_(0.0, 0.02)
    found = (_ours if job.side == "ours" else _theirs)(options, job, task, folder, warm)
    record = dataclasses.asdict(job) | found | {"wall_seconds": time.monotonic() - begun}
    write_json(folder / "record.json", record)
    return record


def _eval_every(steps: int, evaluations: int) -> int:
    return max(1, -(-steps // evaluations))


def _ours(options: argparse.Namespace, job: Job, task: Task, folder: Path, warm: bool) -> dict:
    settings = task.settings
    plan = Plan.make(task.reader, settings.epochs, settings.row_tokens, 1, settings.seed)
    settings = settings.model_copy(
        update={"eval_every": _eval_every(plan.steps, job.evaluations), "rows_per_step": 1}
    )
    quiet, world = Console(file=io.StringIO()), World.join()
    if warm:
        few = settings.model_copy(update={"epochs": 4 / plan.steps * settings.epochs})
        again = dataclasses.replace(task_of(options, job), settings=few)
        fit(again, folder / "warm-up", world, quiet)
    with turn(options.turn):
        summary = fit(dataclasses.replace(task, settings=settings), folder, world, quiet)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(m["step"], m["seconds"], m["accepted_length"]) for m in lines if "seconds" in m]
    return {
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "train_seconds": summary["train_seconds"],
        "waiting": summary["waiting"],
        "graphs": summary["graphs"],
        "curve": curve,
        "heldout": summary["heldout"],
        "head_folder": str(folder / "best"),
    }


def _theirs(options: argparse.Namespace, job: Job, task: Task, folder: Path, warm: bool) -> dict:
    device = World.join().device
    settings, reader = task.settings, task.reader
    config = dataclasses.replace(
        task.head.config,
        norm_before_residual=True,
        norm_before_fc=True,
        fc_norm=False,
        norm_output=True,
    )
    torch.manual_seed(settings.seed)
    model = speculators_side.make_model(config, device)
    teacher = task.teacher
    speculators_side.give_target(
        model, task.embedding, teacher.norm_weight, teacher.head, task.head.target_ids()
    )
    side = speculators_side.Side(model, THEIR_STEPS, settings.learning_rate, weight_decay=0.01)
    plan = Plan.make(reader, settings.epochs, settings.row_tokens, 1, settings.seed)
    heldout = [reader[int(i)] for i in reader.indices("heldout")]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedding = task.embedding.to(device, dtype)

    def make(number: int) -> Any:
        samples = [reader[i] for i in plan.rows[number]]
        return speculators_side.make_batch(samples, settings.row_tokens, shift=1).to(device)

    def set_rate(rate: float) -> None:
        for group in side.optimizer.param_groups:
            group["lr"] = rate

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    if warm:
        set_rate(0.0)
        for batch in prefetch(make, range(min(3, plan.steps)), device):
            side.step(batch)
        side.optimizer.state.clear()
    warmup = max(1, plan.steps // 100)
    every = _eval_every(plan.steps, job.evaluations)
    batches = prefetch(make, range(plan.steps), device)
    with turn(options.turn):
        seconds, curve, totals, start = 0.0, [], [], wait()
        for step in range(plan.steps):
            falling = (plan.steps - step) / max(1, plan.steps - warmup)
            set_rate(settings.learning_rate * min((step + 1) / warmup, falling))
            side.step(next(batches))
            if (step + 1) % every == 0 or step + 1 == plan.steps:
                seconds += wait() - start
                head = as_head(model, config, task).to(dtype)
                totals = evaluate(Eagle3(), head, TargetSide(embedding), heldout, KS)
                curve.append((step + 1, seconds, totals[-1].accepted_length))
                start = wait()
    batches.close()
    save_head(as_head(model, config, task), folder / "best", task.provenance, speculative_tokens=5)
    longest = settings.row_tokens
    tokens = sum(min(int(reader.tokens[i]) - 2, longest) for row in plan.rows for i in row)
    return {
        "steps": plan.steps,
        "tokens": tokens,
        "train_seconds": seconds,
        "curve": curve,
        "heldout": [total.summary() for total in totals],
        "head_folder": str(folder / "best"),
    }


def as_head(model: Any, config: HeadConfig, task: Task) -> Eagle3Head:
    """Its weights as our head, float32: the names are the same."""
    head = Eagle3Head(config)
    names = dict(head.named_parameters())
    state = {n: t.detach().float().cpu() for n, t in model.state_dict().items() if n in names}
    assert state.keys() == names.keys(), names.keys() - state.keys()
    head.load_state_dict(state, strict=False)
    head.set_vocab(task.head.d2t.cpu())
    return head.to(next(model.parameters()).device)


def expected(options: argparse.Namespace, job: Job, record: dict) -> dict[str, float]:
    """Tokens a step to be expected of a trained head with 5 drafts a step, over the held-out
    states, by temperature and the way that drafts are drawn."""
    task = task_of(options, job)
    target, folder = load_target(options.target), Path(record["head_folder"])
    drafter = drafter_of(folder)
    head, _ = drafter.load(folder, target)
    weight, eps = target.final_norm()
    lm_head = target.lm_head().float()
    side = TargetSide(
        target.embedding().float(),
        lm_head=lm_head if head.lm_head is None else None,
        teacher=Teacher(weight.float(), eps, lm_head, target.logits),
    )
    heldout = [task.reader[int(i)] for i in task.reader.indices("heldout")]
    heats = [Sampling(heat) for heat in (0.0, 0.7, 1.0)]
    rows = expected_acceptance(drafter, head.float(), side, heldout, max(KS), heats)
    return {
        f"t{round(10 * row['temperature']):02d}_{row['draft_sample_method']}": row[
            "accepted_length"
        ]
        for row in rows
    }


def length(record: dict) -> float:
    """Held-out accepted length at k = 5, as served."""
    return record["heldout"][-1]["accepted_length"]
