r"""Quality at equal data on two CPU cores: heads on the states of a finished run (the demo's).

    python benchmarks/quality_small.py --run runs/demo --out OUT --peers DIR \
        [--recipe recipes/demo.yaml] [--only a,b] [--seeds 0,1,2]

Rows of 256 tokens, 3 steps of training-time test, one epoch, and drafthead's defaults for every
head but what its name says; speculators 0.9.0 with its own schedule and loss on the same packed
rows in the same order, at its default rate and half of it. Held-out accepted length at k = 1 to 5
by drafthead's walk. Far less data than quality.py's, so read it as a comparison at a demo's size.
`fp8` runs in PyTorch's 8-bit products for CPUs: slow, the same rounding. Finished heads are read
back; OUT/quality_small.json is written after each.
"""

import argparse
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import speculators_side
import torch
from quality_heads import BARE, Job, length, train

from drafthead.fsio import write_json
from drafthead.recipe import load_recipe
from drafthead.train import fp8

DEMO = {"row_tokens": 256, "ttt_steps": 3}
ADAMW = DEMO | {"optimizer": "adamw"}
JOBS = [
    Job("drafthead", train=DEMO),
    Job("speculators-1e-3", "theirs", train=DEMO | {"learning_rate": 1e-3}),
    Job("speculators-5e-4", "theirs", train=DEMO | {"learning_rate": 5e-4}),
    Job("muon-1e-3", train=DEMO | {"learning_rate": 1e-3}),
    Job("adamw-5e-4", train=ADAMW),
    Job("adamw-1e-3", train=ADAMW | {"learning_rate": 1e-3}),
    Job("adamw-2e-3", train=ADAMW | {"learning_rate": 2e-3}),
    Job("no-norms", train=DEMO, head=BARE),
    Job("adamw-1e-3-no-norms", train=ADAMW | {"learning_rate": 1e-3}, head=BARE),
    Job("norm_before_fc", train=DEMO, head={"fc_norm": False, "norm_before_fc": True}),
    Job("rows-512", train=DEMO | {"row_tokens": 512}),
    Job("rows-1024", train=DEMO | {"row_tokens": 1024}),
    Job("acceptance", train=DEMO | {"loss": "acceptance"}),
    Job("vocab-16384", train=DEMO, vocab=16384),
    Job("layer-from-target", train=DEMO, head={"layer_from_target": True}),
    Job("fp8", train=DEMO | {"matmul": "fp8"}),
    Job("ttt-1", train=DEMO | {"ttt_steps": 1}),
    Job("ttt-5", train=DEMO | {"ttt_steps": 5}),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run's folder")
    parser.add_argument("--recipe", default="recipes/demo.yaml", help="that run's recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="folder with speculators, if not installed")
    parser.add_argument("--only", help="names of heads, comma-separated; default all")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    options.tiny, options.answer = False, recipe.generate.max_new_tokens
    options.target, options.heldout = recipe.target.path, recipe.prompts.heldout
    options.prompts = recipe.prompts.sources[0].path
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    if not (options.out / "runs" / "quality").exists():
        (options.out / "runs" / "quality").symlink_to(options.run.resolve())
    speculators_side.find(options.peers)
    fp8.require = lambda device, head: None
    record: dict = {
        "benchmark": "quality_small",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "heads": [],
    }
    wanted = options.only.split(",") if options.only else [job.name for job in JOBS]
    for seed in (int(part) for part in options.seeds.split(",")):
        for job in (job for job in JOBS if job.name in wanted):
            size = job.vocab if job.name.startswith("vocab-") else recipe.vocab.size
            settings = job.train | {"seed": seed}
            named = replace(job, name=f"{job.name}/{seed}", train=settings, vocab=size)
            record["heads"].append(train(options, named))
            print(f"{named.name}: {length(record['heads'][-1]):.4f}", flush=True)
            write_json(options.out / "quality_small.json", record)


if __name__ == "__main__":
    main()
