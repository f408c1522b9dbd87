"""Training of the tiny hybrid on disk: weights alone, and all that a killed run goes on from."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_weights(path: Path, model) -> None:
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    fresh = path.with_suffix(".tmp")
    save_file(tensors, fresh)
    os.replace(fresh, path)


def save_state(path: Path, model, optimizer, step: int, spent: float, best: float) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, parameter in enumerate(optimizer.state_dict()["state"].values()):
        tensors |= {f"optimizer.{index}.{k}": v for k, v in parameter.items()}
    fresh = path.with_suffix(".tmp")
    meta = {"step": str(step), "spent": str(spent), "best": str(best)}
    save_file(tensors, fresh, metadata=meta)
    os.replace(fresh, path)


def load_state(path: Path, model, optimizer) -> tuple[int, float, float]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(meta["step"]), float(meta["spent"]), float(meta["best"])
