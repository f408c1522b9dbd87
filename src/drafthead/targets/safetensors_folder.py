"""Reading single tensors out of a folder of safetensors shards, after checking that it is whole."""

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open

from drafthead.errors import DraftheadError

# The safetensors format itself allows headers up to this size.
_MAX_HEADER_BYTES = 100_000_000


def check_file(path: Path) -> list[str]:
    """The tensor names of one safetensors file, after comparing its header with its length.

    Raises:
        DraftheadError: truncated, or not safetensors at all.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise DraftheadError(f"{path}: not a whole safetensors file; fetch or save it again")
        try:
            header = json.loads(file.read(length))
            names = [name for name in header if name != "__metadata__"]
            end = max((int(header[name]["data_offsets"][1]) for name in names), default=0)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as error:
            raise DraftheadError(
                f"{path}: broken safetensors header ({error}); fetch or save it again"
            ) from error
    if size != 8 + length + end:
        raise DraftheadError(
            f"{path}: truncated: {size} bytes, its header speaks of {8 + length + end}; "
            "fetch or save it again"
        )
    return names


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
                wanted = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DraftheadError(
                    f"{index}: broken index ({error}); fetch or save it again"
                ) from error
            missing = sorted(wanted - {file.name for file in files})
            if missing:
                raise DraftheadError(
                    f"{folder}: shards are missing: {', '.join(missing)}; fetch them again"
                )
            files = [folder / name for name in sorted(wanted)]
        if not files:
            raise DraftheadError(
                f"{folder}: no *.safetensors there; save the model with safe serialization"
            )
        self.files = files
        self.where: dict[str, Path] = {}
        for file in files:
            for name in check_file(file):
                if name in self.where and not index.exists():
                    raise DraftheadError(
                        f"{folder}: {self.where[name].name} and {file.name} both hold {name}; "
                        "remove the file that is not of this target"
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
