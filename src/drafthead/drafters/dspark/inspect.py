"""What a DSpark head is, and what is wrong with a broken one."""

from pathlib import Path
from typing import Any

from drafthead.drafters.dspark.checkpoint import load_head
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.fsio import read_json
from drafthead.head.config import DraftCost
from drafthead.targets import Target


def estimate_cost(config: DSparkConfig, weight_bytes: int = 2, kv_bytes: int = 2) -> DraftCost:
    """Count what drafting a whole block costs, for each of its tokens. `weight_bytes`, `kv_bytes`:
    bytes of a weight, of a cached value."""
    h, d, r = config.hidden_size, config.head_dim, config.markov_rank
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = 2 * q * h + 2 * kv * h + 3 * h * config.intermediate_size
    layers = config.num_hidden_layers * layer
    fc = config.num_aux_hidden_states * config.target_hidden_size * h
    lm_head, w2 = config.draft_vocab_size * h, config.draft_vocab_size * r
    block = layers + lm_head + config.block_size * w2
    read = weight_bytes * block // config.block_size
    own = lm_head if config.own_lm_head else 0
    return DraftCost(
        parameters=fc + layers + own + w2 + config.vocab_size * r,
        bytes_per_draft_step=read,
        bytes_first_step=read + weight_bytes * fc,
        flops_per_draft_token=2 * (layers + lm_head + w2),
        lm_head_share=weight_bytes * lm_head / config.block_size / read,
        kv_bytes_per_token=2 * kv * kv_bytes * config.num_hidden_layers,
    )


def inspect_dspark(folder: Path, target: Target | None) -> dict[str, Any]:
    """Look at a DSpark head without running it, as `head.inspect.inspect_head` does."""
    problems: list[str] = []
    notes: list[str] = []
    result: dict[str, Any] = {
        "path": str(folder),
        "problems": problems,
        "unsupported": [],
        "notes": notes,
    }
    try:
        loaded = load_head(folder)
    except UnsupportedHead as error:
        return result | {"ok": False, "unsupported": [str(error)]}
    except DraftheadError as error:
        problems += str(error).splitlines()
        return result | {"ok": False}
    head, config = loaded.head, loaded.head.config
    raw: Any = read_json(folder / "config.json", "a head's configuration")
    tensors = dict(head.named_parameters())
    result |= {
        "format": "speculators" if "speculators_model_type" in raw else "vllm",
        "kind": "dspark",
        "config": {**config.model_dump(), "aux_layer_ids": list(config.aux_layer_ids)},
        "cost": vars(estimate_cost(config)),
        "provenance": loaded.about or {},
        "tensors": len(tensors),
        "parameters": sum(p.numel() for p in tensors.values()),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in tensors.values()}),
        "own_embedding": loaded.embedding is not None,
    }
    if target is not None:
        _compare(config, target, loaded.embedding is not None, problems, notes)
    return result | {"ok": not problems}


def _compare(
    config: DSparkConfig, target: Target, own_embedding: bool, problems: list[str], notes: list[str]
) -> None:
    """What does not fit the target."""
    for name, theirs in (
        ("vocab_size", target.vocab_size),
        ("target_hidden_size", target.hidden_size),
    ):
        if getattr(config, name) != theirs:
            problems.append(f"{name} is {getattr(config, name)}, the target's is {theirs}")
    if config.hidden_size != target.hidden_size and not own_embedding:
        problems.append(
            f"hidden_size is {config.hidden_size}, the target's is {target.hidden_size}, and the "
            "head brings no embedding of its own"
        )
    if max(config.aux_layer_ids) > target.num_layers:
        problems.append(
            f"reads layer {max(config.aux_layer_ids)}, the target has {target.num_layers}"
        )
    if config.mask_token_id in target.eos_token_ids:
        problems.append(f"mask_token_id {config.mask_token_id} ends the target's answers")
