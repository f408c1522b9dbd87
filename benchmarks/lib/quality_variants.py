"""What the quality benchmark compares, in waves, and how one wave's result enters the next.

1. `rates`: optimizer, learning rate and tokens of a step, for ours and for speculators.
2. `parts`: everything else, each changed alone from the best of the first wave.
3. `finalists`: that best one, the same with every part that won, and speculators at its best rate,
   three seeds each, for more epochs.

`three` goes without them: parts and rates changed alone from the first of ours, three seeds each,
what was asked most first, for as long as there is time.
"""

from dataclasses import replace
from typing import Any

from benchmarks.lib.quality_heads import BARE, Job, length

MARGIN = 0.01
"""A part wins if it adds so much accepted length, and two standard deviations over seeds."""

LEVELS: dict[str, list[Job]] = {
    "norms": [
        Job("norm_before_fc", head={"fc_norm": False, "norm_before_fc": True}),
        Job("no-norm_before_residual", head={"norm_before_residual": False}),
        Job("no-fc_norm", head={"fc_norm": False}),
        Job("no-norm_output", head={"norm_output": False}),
        Job("no-norms", head=BARE),
    ],
    "start": [
        Job("layer-from-target", head={"layer_from_target": True}),
        Job("random-fc", random_fc=True),
    ],
    "lm-head": [
        Job("lm-head-0.3", train={"lm_head_rate": 0.3}),
        Job("lm-head-0.1", train={"lm_head_rate": 0.1}),
        Job("lm-head-frozen", train={"lm_head_rate": 0.0}),
    ],
    "betas": [Job("beta2-0.999", train={"betas": [0.9, 0.999]})],
    # The rest has 3.
    "steps": [
        Job("ttt-5", train={"ttt_steps": 5}),
        Job("ttt-7", train={"ttt_steps": 7}),
        Job("ttt-1", train={"ttt_steps": 1}),
    ],
    "decay": [
        Job("decay-1.0", train={"ttt_decay": 1.0}),
        Job("decay-0.6", train={"ttt_decay": 0.6}),
    ],
    "loss": [
        Job("acceptance", train={"loss": "acceptance"}),
        Job("ce+smoothl1", train={"loss": "ce+smoothl1"}),
        Job("ce+0.1smoothl1", train={"loss": "ce+smoothl1", "regression_weight": 0.1}),
    ],
}
# These change what a draft costs when served, so accepted length alone must not choose them.
SHAPES = [
    Job("vocab-4000", vocab=4000),
    Job("vocab-8000", vocab=8000),
    Job("vocab-32000", vocab=32000),
    Job("five-aux-layers", all_layers=True),
    Job("mlp-2x", head={"intermediate_size": 1152}),
    Job("mlp-8x", head={"intermediate_size": 4608}),
    Job("two-layers", head={"num_hidden_layers": 2}),
]
SEEDS = [Job("seed-1", train={"seed": 1}), Job("seed-2", train={"seed": 2})]


def rates() -> list[Job]:
    """The first wave."""
    ours = [
        Job(
            f"{optimizer}-{rate:g}-rows{rows}",
            train={"optimizer": optimizer, "learning_rate": rate, "row_tokens": rows},
        )
        for optimizer, sizes, rates in (
            ("muon", (2048, 8192, 1024), (2e-3, 1e-3, 4e-3)),
            ("adamw", (2048,), (1e-3, 5e-4)),
        )
        for rows in sizes
        for rate in rates
    ]
    theirs = [
        Job(
            f"speculators-{rate:g}-rows{rows}",
            "theirs",
            train={"learning_rate": rate, "row_tokens": rows},
        )
        for rows in (8192, 2048, 1024)
        for rate in (1e-3, 5e-4)
    ]
    return [*theirs, *ours]  # theirs compile longest


def best(found: dict[str, dict], side: str) -> Job:
    """The winner of the first wave on one side."""
    jobs = [job for job in rates() if job.side == side]
    # None of them known: the first, which is what each side's authors take.
    return max(jobs, key=lambda job: length(found[job.name]) if job.name in found else 0.0)


def over(base: Job, change: Job) -> Job:
    """`base` with what `change` names."""
    return replace(
        base,
        name=f"{base.name}+{change.name}",
        train=base.train | change.train,
        head=base.head | change.head,
        vocab=change.vocab,
        all_layers=base.all_layers or change.all_layers,
        random_fc=base.random_fc or change.random_fc,
    )


def parts(found: dict[str, dict]) -> list[Job]:
    """The second wave."""
    base = best(found, "ours")
    changes = [*SEEDS, *(job for level in LEVELS.values() for job in level), *SHAPES]
    return [over(base, change) for change in changes]


def rated(optimizer: str, rate: str) -> Job:
    """An optimizer at a peak learning rate, named by both."""
    return Job(f"{optimizer}-{rate}", train={"optimizer": optimizer, "learning_rate": float(rate)})


RATES = [
    rated("adamw", "5e-4"),
    rated("adamw", "1e-3"),
    rated("muon", "1e-3"),
    rated("muon", "4e-3"),
    Job("rows-1024", train={"row_tokens": 1024}),
]
FIRST = "nothing ttt-5 ttt-7 ttt-1 ce+smoothl1 acceptance adamw-5e-4 adamw-1e-3 two-layers mlp-2x"


def three(found: dict[str, dict]) -> list[Job]:
    """Every part and rate, three seeds each."""
    base, levels = best(found, "ours"), [job for level in LEVELS.values() for job in level]
    changes = {job.name: job for job in [Job("nothing"), *levels, *SHAPES, *RATES]}
    return [
        replace(job, name=f"three/{name}/{seed}", train=job.train | {"seed": seed})
        for name in dict.fromkeys([*FIRST.split(), *changes])
        for job in [over(base, changes[name])]
        for seed in range(3)
    ]


def chosen(found: dict[str, dict]) -> Job:
    """The best of the first wave with the winner of each part."""
    job = base = best(found, "ours")
    if base.name not in found:
        return base
    at_base = [length(found[base.name])]
    at_base += [length(found[n]) for s in SEEDS if (n := over(base, s).name) in found]
    middle = sum(at_base) / len(at_base)
    spread = (sum((x - middle) ** 2 for x in at_base) / max(1, len(at_base) - 1)) ** 0.5
    for level in LEVELS.values():
        known = [c for c in level if over(base, c).name in found]
        if not known:
            continue
        winner = max(known, key=lambda c: length(found[over(base, c).name]))
        gain = length(found[over(base, winner).name]) - middle
        if gain > max(MARGIN, 2 * spread):
            job = over(job, winner)
    return job


def finalists(found: dict[str, dict], epochs: float) -> list[Job]:
    """The third wave."""
    jobs = [best(found, "ours"), chosen(found), best(found, "theirs")]
    unique = {job.name: job for job in jobs}.values()  # nothing may have won over the first
    return [
        replace(
            job, name=f"final/{job.name}/{seed}", train=job.train | {"seed": seed}, epochs=epochs
        )
        for seed in range(3)
        for job in unique
    ]


def block(name: str, epochs: float = 3, vocab: int = 16000, **changes: Any) -> Job:
    """A DSpark head that reads all captured layers; `changes` by key of `train` or `head`."""
    of_head = {"num_hidden_layers", "block_size", "markov_rank", "causal", "intermediate_size"}
    head = {k: v for k, v in changes.items() if k in of_head}
    train = {"row_tokens": 2048} | {k: v for k, v in changes.items() if k not in of_head}
    return Job(f"dspark/{name}", train=train, head={"kind": "dspark"} | head, vocab=vocab,
               epochs=epochs, all_layers=True)  # fmt: skip


def dspark() -> list[Job]:
    """DSpark's recipe, each part changed alone, and EAGLE-3 for as many epochs."""
    eagle3 = [
        Job(f"dspark/eagle3-epochs-{n}", train={"row_tokens": 2048}, epochs=n) for n in (3, 6, 10)
    ]
    return [
        block("nothing"),
        *eagle3,
        block("epochs-10", epochs=10),
        block("ce+tv", loss="ce+tv"),
        block("acceptance", loss="acceptance"),
        block("lm-head-frozen", lm_head_rate=0.0),
        block("layers-2", num_hidden_layers=2),
        block("layers-5", num_hidden_layers=5),
        block("rate-4e-3", learning_rate=4e-3),
        block("rate-8e-3", learning_rate=8e-3),
        block("anchors-0.5", anchors=0.5),
        block("anchors-1", anchors=1.0),
        block("causal", causal=True),
        block("block-5", block_size=5),
        block("decay-8", slot_decay=8.0),
        block("decay-2", slot_decay=2.0),
        block("rank-64", markov_rank=64),
        block("layers-1", num_hidden_layers=1),
        block("ce+tv-epochs-10", epochs=10, loss="ce+tv"),
        block("layers-5-epochs-10", epochs=10, num_hidden_layers=5),
        block("anchors-1-epochs-10", epochs=10, anchors=1.0),
        block("rate-1e-3", learning_rate=1e-3),
    ]


WAVES = {
    "dspark": lambda found, epochs: dspark(),
    "rates": lambda found, epochs: rates(),
    "parts": lambda found, epochs: parts(found),
    "finalists": finalists,
    "three": lambda found, epochs: three(found),
}
"""The jobs of a wave, from the records so far and the finalists' epochs."""
