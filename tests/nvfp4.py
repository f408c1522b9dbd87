"""NVFP4 checkpoints out of dense ones, without ModelOpt, and dense ones out of them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from drafthead.targets import nvfp4

PLAIN = ("lm_head", "embed_tokens", ".conv.", "feed_forward.gate.")


def pack_folder(dense: Path, out: Path, ignore: list[str], plain: tuple[str, ...] = PLAIN) -> Path:
    """Write `dense` in NVFP4, all matrices but those whose name has one of `plain` in it; the
    configuration says `ignore`, right or wrong."""
    out.mkdir(parents=True)
    weights = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if weight.ndim != 2 or any(part in name for part in plain):
            weights[name] = weight
            continue
        scale_2 = weight.abs().max().float() / (6 * 448)
        weights[name], weights[f"{name}_scale"] = nvfp4.pack(weight, scale_2)
        weights[f"{name}_scale_2"] = scale_2
        weights[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.01)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in dense.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, out)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ignore,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def dense_folder(folder: Path, out: Path) -> Path:
    """Write a dense fp32 checkpoint with the values of an NVFP4 one of a single file."""
    out.mkdir()
    stored, weights = load_file(folder / "model.safetensors"), {}
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    for name, tensor in stored.items():
        if name.endswith(scales):
            continue
        if f"{name}_scale" in stored:
            tensor = nvfp4.dequantize(tensor, stored[f"{name}_scale"], stored[f"{name}_scale_2"])
        weights[name] = tensor
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "hf_quant_config.json":
            shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out
