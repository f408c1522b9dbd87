r"""Quality at equal data on two CPU cores: heads on the states of a finished run (the demo's).

    python -m benchmarks.train.quality_small --run runs/demo --out OUT --peers DIR \
        [--recipe recipes/demo.yaml] [--only a,b] [--seeds 0,1,2] [--sampled]

Rows of 256 tokens, 3 steps of training-time test, one epoch, and drafthead's defaults for every
head but what its name says (as in quality_variants.py); speculators 0.9.0 with its own schedule and
loss on the same packed rows in the same order, at its default rate and half of it. Held-out
accepted length at k = 1 to 5 by drafthead's walk. Far less data than quality.py's, so read it as a
comparison at a demo's size.
With --sampled also the tokens a step to be expected of sampled requests, by either way to draw
drafts, over held-out greedy answers; --sampled --only drafthead,acceptance,dspark-kl,... is what
losses do for them. Finished heads are read back; OUT/quality_small.json is written after each.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.lib.quality_heads import BARE, Job, expected, length, train
from benchmarks.lib.quality_variants import LEVELS, RATES, rated
from benchmarks.lib.record import begin, save
from benchmarks.peers import speculators_side
from drafthead.recipe import load_recipe
from drafthead.targets import load_target

DEMO = {"row_tokens": 256, "ttt_steps": 3}


def jobs(hidden: int, vocab: int) -> list[Job]:
    """The heads by name, for a target of that width: what quality.py compares, and a few more."""
    ours = [Job("drafthead"), *RATES, rated("adamw", "2e-3")]
    ours += [part for level in LEVELS.values() for part in level]
    ours += [Job("rows-512", train={"row_tokens": 512})]
    ours += [Job(f"mlp-{n}x", head={"intermediate_size": n * hidden}) for n in (2, 8)]
    ours += [Job("two-layers", head={"num_hidden_layers": 2})]
    ours += [replace(rated("adamw", "1e-3"), name="adamw-1e-3-no-norms", head=BARE)]
    theirs = [
        Job(f"speculators-{rate}", "theirs", train={"learning_rate": float(rate)})
        for rate in ("1e-3", "5e-4")
    ]
    usual = [replace(job, vocab=vocab) for job in (*ours, *theirs)]
    sizes = [Job("vocab-half", vocab=vocab // 2), Job("vocab-double", vocab=2 * vocab)]
    blocks = [
        Job(
            f"dspark-{loss}",
            train={"row_tokens": 256, "loss": loss, "learning_rate": 5e-3},
            head={"kind": "dspark", "num_hidden_layers": 1},
            vocab=vocab,
        )
        for loss in ("kl", "acceptance", "ce+tv")
    ]
    return [*(replace(job, train=DEMO | job.train) for job in (*usual, *sizes)), *blocks]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run's folder")
    parser.add_argument("--recipe", default="recipes/demo.yaml", help="that run's recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="folder with speculators, if not installed")
    parser.add_argument(
        "--aux",
        action="append",
        default=[],
        help="auxiliary layers of one head more: 2-5-8 makes aux-2-5-8; the run must hold them",
    )
    parser.add_argument("--only", help="names of heads, comma-separated; default all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sampled", action="store_true", help="also what sampled requests get")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    options.tiny, options.answer = False, recipe.generate.max_new_tokens
    options.target, options.heldout = recipe.target.path, recipe.prompts.heldout
    options.prompts = recipe.prompts.sources[0].path
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    if not (options.out / "runs" / "quality").exists():
        (options.out / "runs" / "quality").symlink_to(options.run.resolve())
    speculators_side.find(options.peers)
    options.turn = None
    record: dict = {
        **begin("quality_small"),
        "heads": [],
    }
    figures: dict = {}
    known = {
        job.name: job for job in jobs(load_target(options.target).hidden_size, recipe.vocab.size)
    }
    for layers in options.aux:
        read = {"aux_layers": [int(layer) for layer in layers.split("-")]}
        name = f"aux-{layers}"
        known[name] = replace(known["drafthead"], name=name, head=read)
    wanted = options.only.split(",") if options.only else list(known)
    for seed in (int(part) for part in options.seeds.split(",")):
        for job in (known[name] for name in wanted):
            named = replace(job, name=f"{job.name}/{seed}", train=job.train | {"seed": seed})
            record["heads"].append(head := train(options, named))
            figures[named.name] = length(head)
            if options.sampled:
                head["expected"] = expected(options, named, head)
                figures[named.name] = head["expected"]
            print(f"{named.name}: {figures[named.name]}", flush=True)
            save(options.out / "quality_small.json", record, figures)


if __name__ == "__main__":
    main()
