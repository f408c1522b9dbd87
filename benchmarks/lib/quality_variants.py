"""The heads that `quality --stage explore` trains: each part and rate changed alone.

`three` has EAGLE-3's, three seeds each, what was asked most first; `dspark` has DSpark's.
"""

from dataclasses import replace
from typing import Any

from benchmarks.lib.quality_heads import BARE, Job

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
BASE = Job(
    "muon-0.002-rows2048",
    train={"optimizer": "muon", "learning_rate": 2e-3, "row_tokens": 2048},
)
"""What the first exploration of rates and row lengths chose; the rest has the recipe's defaults."""


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


def three() -> list[Job]:
    """Every part and rate, three seeds each."""
    levels = [job for level in LEVELS.values() for job in level]
    changes = {job.name: job for job in [Job("nothing"), *levels, *SHAPES, *RATES]}
    return [
        replace(job, name=f"three/{name}/{seed}", train=job.train | {"seed": seed})
        for name in dict.fromkeys([*FIRST.split(), *changes])
        for job in [over(BASE, changes[name])]
        for seed in range(3)
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


WAVES = {"three": three, "dspark": dspark}
