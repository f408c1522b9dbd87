"""Heads as other trainers leave them: what each changes, and what vLLM 0.32 does with it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from drafthead.head.checkpoint import save_head
from drafthead.head.formats import Provenance


def rename(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def recast(name, dtype):
    return lambda tensors: tensors | {name: tensors[name].to(dtype)}


def add(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


def as_eagle_names(tensors):
    names = {name: name.replace("layers.0.", "midlayer.") for name in tensors}
    extra = {
        "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "midlayer.self_attn.rotary_emb.cos_cached": torch.ones(16),
        "rotary_emb.inv_freq": torch.ones(16),
    }
    return {names[name]: tensor for name, tensor in tensors.items()} | extra


def shards(folder):
    """Write the tensors as two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


NULL_FLAGS = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"))
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Each: what changes of the configuration, of the tensors, and the format it is first written in.
SERVED = {
    "rotary buffers, EAGLE's names": ({}, as_eagle_names, "vllm"),
    "int8 t2d": ({}, recast("t2d", torch.int8), "vllm"),
    "int32 d2t": ({}, recast("d2t", torch.int32), "vllm"),
    "float32 d2t": ({}, recast("d2t", torch.float32), "vllm"),
    "P-EAGLE's mask": ({}, add("mask_hidden", 192), "vllm"),
    "flags of null": (NULL_FLAGS, None, "vllm"),
    "flags of null, speculators": (NULL_FLAGS, None, "speculators"),
    "eagle_config of null": ({"eagle_config": None}, None, "vllm"),
    "fp16": (
        {"dtype": "float16"},
        lambda tensors: {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()},
        "vllm",
    ),
    "two thetas": ({"rope_theta": 5e5}, None, "vllm"),
    "older rope": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, None, "vllm"),
    "older rope, speculators": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, None, "speculators"),
    "a window of null": (
        {"layer_types": ["sliding_attention"], "sliding_window": None},
        None,
        "vllm",
    ),
    "speculators' default window": (
        {
            "layer_types": ["sliding_attention"],
            "sliding_window": 2048,
            "use_sliding_window": True,
        },
        None,
        "speculators",
    ),
    "Eagle3LlamaForCausalLM, layers in vLLM's way alone": (
        {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_config": {}},
        None,
        "vllm",
    ),
}
# vLLM does not start with these, though drafthead can read them. Each with a word of the reason.
STUMBLES = {
    "transformers' prefix": ({}, rename("model."), "vllm", "model.fc.weight"),
    "DataParallel's prefix": ({}, rename("module."), "vllm", "module.fc.weight"),
    "torch.compile's prefix": ({}, rename("_orig_mod."), "vllm", "_orig_mod.fc.weight"),
    "the verifier's norm": ({}, add("verifier_norm.weight", 64), "vllm", "verifier_norm.weight"),
    "aux states not counted": (
        {
            "eagle_aux_hidden_state_layer_ids": [1, 4],
            "eagle_config": {},
            "num_aux_hidden_states": None,
        },
        lambda tensors: tensors | {"fc.weight": tensors["fc.weight"][:, :128].contiguous()},
        "vllm",
        "num_aux_hidden_states",
    ),
}
# Keys that a null takes away rather than sets.
LEFT_OUT = ("eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states")


def write(folder: Path, head, changes, tensors, format) -> Path:
    """A head of `tests.heads` as one of the rows above has it."""
    save_head(head, folder, Provenance(target="some"), format=format)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    layer = config.get("transformer_layer_config", config)
    if "rope_scaling" in changes:
        del layer["rope_parameters"]
    for key, value in changes.items():
        place = layer if key in layer or key not in config else config
        place[key] = value
        if key in LEFT_OUT and value is None:
            del place[key]
    path.write_text(json.dumps(config))
    if tensors is not None:
        file = folder / "model.safetensors"
        save_file(tensors(load_file(file)), file)
    return folder
