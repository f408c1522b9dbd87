"""The engines that `lossless.engine_settings` starts and the requests that it gives them."""

import random
from dataclasses import dataclass, field

from drafthead.vllm_plugin.registry import TABLE

# What `stock-*` leaves out; without `state_shape` they would not start.
LEFT_OUT = ",".join(
    sorted(
        {"placeholder_drafts", "draft_kv_group", *(p.name for p in TABLE if p.loaded_with)}
        - {"state_shape"}
    )
)
IEEE = {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
"""The environment in which Triton and cuBLAS do not take TF32 for float32."""
VOCAB = {"gpu": 2048, "tiny": 512}


@dataclass(frozen=True)
class Config:
    """One engine. ``shape`` names its limits (see ``SHAPES``)."""

    name: str
    method: str = "plain"
    k: int = 0
    graphs: bool = True
    prefix_caching: bool = False
    runner: str = "v2"
    shape: str = "stress"
    stock: bool = False
    tf32: bool = False
    served: bool = False
    env: dict = field(default_factory=dict)


SHAPES = {
    # The limits at which the faults were first seen.
    "stress": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
    # Prompts in slivers: decode rows are cut short, go without drafts or sit out a step.
    "slivers": {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "long_prefill_token_threshold": 7,
    },
    # Prompts in chunks of a verify step's width at k = 3: they must not come before decode rows.
    "chunks": {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "long_prefill_token_threshold": 4,
    },
    # So few blocks that running requests are preempted and resumed.
    "preempt": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "few_blocks": True},
    "wide": {"max_num_seqs": 32, "max_num_batched_tokens": 512},
}


def configurations() -> list[Config]:
    """The whole list; ``--only`` picks from it by name."""
    out = [
        Config("plain-graphs-v2"),
        Config("plain-eager-prefix-v2", graphs=False, prefix_caching=True),
        Config("plain-eager-slivers-v2", graphs=False, shape="slivers"),
    ]
    for k, caching in ((1, True), (2, False), (3, False), (3, True), (5, True), (7, False)):
        name = f"eagle3-k{k}-graphs{'-prefix' if caching else ''}-v2"
        out.append(Config(name, "eagle3", k, prefix_caching=caching))
    out += [
        Config("eagle3-k3-eager-v2", "eagle3", 3, graphs=False),
        Config("eagle3-k5-served-v2", "eagle3", 5, prefix_caching=True, served=True),
        Config("eagle3-k3-slivers-v2", "eagle3", 3, shape="slivers"),
        Config("eagle3-k7-slivers-prefix-v2", "eagle3", 7, shape="slivers", prefix_caching=True),
        Config("eagle3-k3-preempt-prefix-v2", "eagle3", 3, shape="preempt", prefix_caching=True),
        Config("eagle3-k5-wide-v2", "eagle3", 5, shape="wide"),
        Config("ngram-k3-graphs-prefix-v2", "ngram", 3, prefix_caching=True),
        Config("ngram-k3-eager-slivers-v2", "ngram", 3, graphs=False, shape="slivers"),
        Config("eagle3-k3-eager-prefix-v1", "eagle3", 3, False, True, "v1"),
        Config("eagle3-k5-graphs-slivers-v1", "eagle3", 5, runner="v1", shape="slivers"),
        Config("ngram-k3-eager-slivers-v1", "ngram", 3, False, False, "v1", "slivers"),
        Config("stock-eagle3-k3-graphs-v2", "eagle3", 3, stock=True),
        Config("stock-ngram-k3-graphs-v2", "ngram", 3, stock=True),
        Config("stock-ngram-k3-slivers-v2", "ngram", 3, shape="slivers", stock=True),
        Config("stock-eagle3-k5-slivers-v1", "eagle3", 5, False, False, "v1", "slivers", True),
        Config(
            "stock-eagle3-k5-graphs-slivers-v1", "eagle3", 5, True, False, "v1", "slivers", True
        ),
        Config("ngram-k3-eager-chunks-v2", "ngram", 3, graphs=False, shape="chunks"),
        Config(
            "stock-order-ngram-k3-eager-chunks-v2",
            "ngram",
            3,
            graphs=False,
            shape="chunks",
            stock=True,
            env={"DRAFTHEAD_SKIP_PATCHES": "batch_order"},
        ),
        Config("plain-graphs-v2-tf32", tf32=True),
        Config("eagle3-k3-graphs-v2-tf32", "eagle3", 3, tf32=True),
    ]
    return out


def tiny_configurations() -> list[Config]:
    """What a CPU can rehearse: the older runner, eager."""
    return [
        Config("plain", graphs=False, runner="v1"),
        Config("eagle3-k3", "eagle3", 3, False, runner="v1"),
        Config("eagle3-k5-slivers", "eagle3", 5, False, runner="v1", shape="slivers"),
        Config("ngram-k3-prefix", "ngram", 3, False, True, "v1"),
        Config("stock-ngram-k3", "ngram", 3, False, False, "v1", stock=True),
    ]


def request_sets(vocab: int, seed: int = 0) -> dict[str, list[tuple[list[int], int]]]:
    """Named lists of (prompt ids, output tokens)."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(5, vocab) for _ in range(length)]

    lengths, outputs = (1, 1, 2, 3, 4, 5, 8, 20, 60, 130, 200), (1, 2, 5, 17, 40)
    stress = [(prompt(rng.choice(lengths)), rng.choice(outputs)) for _ in range(80)]
    # Every length around 1 + k and around a block, so that prompt chunks look like verify rows.
    short = [(prompt(1 + i % 18), rng.choice((3, 9, 30))) for i in range(54)]
    # Prompts that share beginnings and end one token after a block's edge, twice over.
    trunk = prompt(320)
    shared = [(trunk[: 16 * (1 + i % 20)] + prompt(i % 3), 12) for i in range(40)] * 2
    long = [(prompt(rng.randrange(150, 400)), rng.randrange(20, 60)) for _ in range(16)]
    return {"stress80": stress, "short": short, "shared": shared, "long": long}
