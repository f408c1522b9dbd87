"""Reading single tensors out of a folder of safetensors shards, after checking that it is whole."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from drafthead.errors import DraftheadError


def tensor_names(path: Path) -> list[str]:
    """The tensor names of one safetensors file.

    Raises:
        DraftheadError: truncated, or not safetensors at all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise DraftheadError(
            f"{path}: not a whole safetensors file ({error}); fetch or save it again"
        ) from error


class SafetensorsFolder:
    """The tensors of a checkpoint folder, by name, read one at a time."""

    def __init__(self, folder: Path):
        """Check every shard of ``folder``.

        Raises:
            DraftheadError: no safetensors there, a shard missing or truncated, or two files with
                the same tensor and no index.
        """
        index = folder / "model.safetensors.index.json"
        files = sorted(folder.glob("*.safetensors"))
        # Mistral's repositories hold the same weights again, in a format of its own.
        files = [f for f in files if not f.name.startswith("consolidated")]
        if index.exists():
            try:
                named = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DraftheadError(
                    f"{index}: broken index ({error}); fetch or save it again"
                ) from error
            missing = sorted(named - {file.name for file in files})
            if missing:
                raise DraftheadError(
                    f"{folder}: shards are missing: {', '.join(missing)}; fetch them again"
                )
            files = [folder / name for name in sorted(named)]
        if not files:
            raise DraftheadError(
                f"{folder}: no *.safetensors; save the model with safe serialization"
            )
        self.files = files
        self.where: dict[str, Path] = {}
        for file in files:
            for name in tensor_names(file):
                if name in self.where and not index.exists():
                    raise DraftheadError(
                        f"{folder}: {self.where[name].name} and {file.name} both hold {name}; "
                        "remove the file that belongs to another target"
                    )
                self.where[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[str, list[int]]:
        """A tensor's type, as safetensors names it (BF16, U8), and its shape."""
        with safe_open(self.where[name], framework="pt") as file:
            part = file.get_slice(name)
            return part.get_dtype(), part.get_shape()

    def rows(self, name: str, count: int) -> torch.Tensor:
        """The first rows of a tensor, as stored."""
        with safe_open(self.where[name], framework="pt") as file:
            return file.get_slice(name)[:count]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the type that it is stored in."""
        with safe_open(self.where[name], framework="pt") as file:
            return file.get_tensor(name)
