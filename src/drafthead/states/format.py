"""How states lie on disk. A store is a folder:

    meta.json                      what the states are of: layers, width, encoding, inputs
    unit-000012.json               index of one finished unit of work; written last, so it commits
    unit-000012-00.safetensors     its samples one after the other; more shards if they are large

A unit belongs to one writer and is finished or redone whole. Its index holds each sample's
lengths and place and each shard's size and SHA-256, and its own SHA-256, so that it can be read
and trusted without the shards. Tensors of a shard, n and m being the sums of its samples' T and T':

    ids        int32 [n]           token ids, prompt and answer
    loss_mask  bool [n]            True where the target wrote the token
    states     [m, L, Ht]          bf16, fp32 or e4m3; in fp8-aux [m, L-1, Ht], all but the last
    scale      fp32 [m, L]         of e4m3; in fp8-aux [m, L-1]
    final      bf16 [m, Ht]        in fp8-aux: the last layer's, which the teacher reads

A store is of the first version that can read it: 2 for fp8-aux, 1 for the others.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_file, fingerprint, read_json, write_json

VERSION = 2
MAX_UNITS = 1_000_000  # file names have six digits
Encoding = Literal["bf16", "fp8-aux", "fp8", "fp32"]
E4M3_MAX = 448.0

_NAMES = {
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class Sample:
    """One sequence and the target's states over it. T' is T or T-1: the last token that a target
    writes is never an input.

    ``states`` is the residual stream entering each layer of ``layers`` (ascending; the last one,
    ``num_layers``, is the stream before the final norm), in bf16 or fp32, or in e4m3 with
    ``scale``; the last one may lie beside them as ``final``. ``aux`` and ``last`` decode what they
    return, on the device that it lies on.
    """

    ids: torch.Tensor
    """int32 [T]: prompt and answer exactly as generated."""
    loss_mask: torch.Tensor
    """bool [T]: True where the target wrote the token at that index."""
    states: torch.Tensor
    """[T', L, Ht], or [T', L-1, Ht] if there is ``final``."""
    num_aux: int
    """A: the first A of the L layers are the auxiliary ones."""
    prompt_len: int
    conversation: str
    split: str
    """``train`` or ``heldout``."""
    scale: torch.Tensor | None = None
    """fp32 [T', L] or [T', L-1] if ``states`` are e4m3."""
    final: torch.Tensor | None = None
    """bf16 [T', Ht]: the last layer's states, if they are not among ``states``."""

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """``states``, ``scale`` and ``final``, as far as there are any."""
        named = {"states": self.states, "scale": self.scale, "final": self.final}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Sample":
        """The same with each of ``stored`` changed; their first axis is the position."""
        return replace(self, **{name: change(tensor) for name, tensor in self.stored.items()})

    def to(self, device: torch.device | str) -> "Sample":
        """The same with its states on ``device``, still encoded: half the bytes to move in fp8."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def aux(self) -> torch.Tensor:
        """[T', A, Ht]: the auxiliary states, bf16 or fp32."""
        return aux_layers(self.stored, self.num_aux)

    @property
    def last(self) -> torch.Tensor:
        """[T', Ht]: the stream before the final norm, bf16 or fp32."""
        return last_layer(self.stored)


def aux_layers(stored: dict[str, torch.Tensor], num_aux: int) -> torch.Tensor:
    """``Sample.aux`` of ``Sample.stored``."""
    scale = stored["scale"][:, :num_aux] if "scale" in stored else None
    aux = _widened(stored["states"][:, :num_aux], scale)
    if "final" not in stored or aux.shape[1] == num_aux:
        return aux
    return torch.cat([aux, stored["final"][:, None]], dim=1)  # the last layer is one of them


def last_layer(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """``Sample.last`` of ``Sample.stored``."""
    if "final" in stored:
        return stored["final"]
    scale = stored["scale"][:, -1] if "scale" in stored else None
    return _widened(stored["states"][:, -1], scale)


@dataclass(frozen=True)
class StoreMeta:
    """What the states of a store are of."""

    aux_layers: tuple[int, ...]
    """Ascending layer ids, vLLM's convention: id i is the residual stream that enters layer i."""
    num_layers: int
    """Layers of the target; as a layer id, the stream before the final norm."""
    hidden_size: int
    """Ht."""
    encoding: Encoding
    units: int
    """Units that the whole store has."""
    inputs: dict[str, Any]
    """What the content follows from (target, template, prompts, engine, …), JSON-able."""

    def __post_init__(self) -> None:
        if list(self.aux_layers) != sorted(set(self.aux_layers)) or not self.aux_layers:
            raise DraftheadError(
                f"capture.aux_layers: {list(self.aux_layers)} must ascend without repeats"
            )
        if not 0 <= self.units <= MAX_UNITS:
            raise DraftheadError(
                f"{self.units} units of work; at most {MAX_UNITS:,}: raise generate.chunk"
            )
        bad = [i for i in self.aux_layers if not 0 <= i <= self.num_layers]
        if bad:
            raise DraftheadError(
                f"capture.aux_layers: {bad} out of range; this target has layer ids "
                f"0 to {self.num_layers}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The L layer ids on disk: ``aux_layers`` and ``num_layers``."""
        return tuple(sorted({*self.aux_layers, self.num_layers}))

    @property
    def dtype(self) -> torch.dtype:
        """What the states decode to: fp32 from fp32, else bf16."""
        return torch.float32 if self.encoding == "fp32" else torch.bfloat16

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape of one position) of what states lie on disk as; see ``encode``."""
        layers, width = len(self.layers), self.hidden_size
        if self.encoding in ("bf16", "fp32"):
            return {"states": (self.dtype, (layers, width))}
        if self.encoding == "fp8":
            return _in_fp8(layers, width)
        return _in_fp8(layers - 1, width) | {"final": (torch.bfloat16, (width,))}

    @property
    def version(self) -> int:
        """The first version of the format that can read this store."""
        return 2 if self.encoding == "fp8-aux" else 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk for one token's states, ids and mask not counted."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.stored.values())

    def bytes_of(self, tokens: int, states: int) -> int:
        """Bytes of a sample of so many tokens and states, ids and mask counted."""
        return states * self.bytes_per_token + 5 * tokens

    @property
    def fingerprint(self) -> str:
        return fingerprint(asdict(self))

    @classmethod
    def of(cls, record: dict[str, Any]) -> "StoreMeta":
        """From its ``asdict``, which may have been JSON in between."""
        return cls(**(record | {"aux_layers": tuple(record["aux_layers"])}))

    def save(self, store: Path) -> None:
        record = {"format": "drafthead-states", "version": self.version, **asdict(self)}
        write_json(store / "meta.json", record | {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, store: Path) -> "StoreMeta":
        """Read ``meta.json``.

        Raises:
            DraftheadError: missing, broken, of a later version, or altered.
        """
        path = store / "meta.json"
        what = "the description of a state store (a run's is runs/NAME/states)"
        record = read_json(path, what, dict[str, Any])
        check_version(path, record)
        try:
            meta = cls(**{field.name: record[field.name] for field in fields(cls)})
            meta = cls(**(asdict(meta) | {"aux_layers": tuple(int(i) for i in meta.aux_layers)}))
            sizes = (meta.num_layers, meta.hidden_size, meta.units)
            if meta.encoding not in get_args(Encoding) or any(type(n) is not int for n in sizes):
                raise ValueError("impossible encoding or size")
            if record["version"] < meta.version:
                raise ValueError(f"version {record['version']} has no {meta.encoding}")
        except (KeyError, TypeError, ValueError, DraftheadError) as error:
            raise DraftheadError(f"{path}: not a description of a state store: {error}") from None
        if record.get("fingerprint") != meta.fingerprint:
            raise DraftheadError(f"{path}: was changed: its fingerprint does not match its content")
        return meta


def check_version(path: Path, record: dict) -> None:
    version = record.get("version")
    if record.get("format") != "drafthead-states" or type(version) is not int or version < 1:
        raise DraftheadError(f"{path}: not part of a state store (no format and version in it)")
    if version > VERSION:
        raise DraftheadError(
            f"{path}: version {version}, written by a later drafthead; this one reads up to "
            f"{VERSION}: upgrade drafthead"
        )


def _in_fp8(layers: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "states": (torch.float8_e4m3fn, (layers, width)),
        "scale": (torch.float32, (layers,)),
    }


def encode(states: torch.Tensor, encoding: Encoding) -> dict[str, torch.Tensor]:
    """States [m, L, Ht], the last layer at the end, as they go to disk (``StoreMeta.stored``).

    fp8 is e4m3 with scale = max|x| / 448 over Ht, for each token and layer by itself: layers
    differ in size by orders of magnitude, and so do a sequence's first tokens from the rest.
    A row that is not finite gets a scale that is not. fp8-aux does that to all but the last layer,
    which the teacher's logits follow from and which stays in bf16.
    """
    if encoding == "fp8-aux":
        final = states[:, -1].to(torch.bfloat16).contiguous()
        return {**encode(states[:, :-1], "fp8"), "final": final}
    if encoding != "fp8":
        return {"states": states.to(torch.float32 if encoding == "fp32" else torch.bfloat16)}
    wide = states.float()
    # Times the inverse: dividing by a constant is that on a GPU, and rounds differently on a CPU.
    scale = wide.abs().amax(-1) * (1 / E4M3_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    return {"states": (wide / scale[..., None]).to(torch.float8_e4m3fn), "scale": scale}


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of ``encode``: [m, L, Ht], bf16 from e4m3, else as they are."""
    states = _widened(stored["states"], stored.get("scale"))
    if "final" in stored:
        states = torch.cat([states, stored["final"][:, None]], dim=1)
    return states


def _widened(states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[..., Ht]: bf16 from e4m3 with ``scale`` [...], without one as they are."""
    if scale is None:
        return states
    return (states.float() * scale[..., None]).to(torch.bfloat16)


def gathered(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]``, e4m3 as bytes: not every PyTorch gathers it otherwise."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor[index]
    return tensor.view(torch.uint8)[index].view(tensor.dtype)


def shard_tensors(meta: StoreMeta, tokens: int, states: int) -> dict[str, tuple[str, list[int]]]:
    """Name -> (safetensors dtype, shape) of a shard that holds so many tokens and states."""
    out = {"ids": ("I32", [tokens]), "loss_mask": ("BOOL", [tokens])}
    for name, (dtype, shape) in meta.stored.items():
        out[name] = (_NAMES[dtype], [states, *shape])
    return out


def write_shard(path: Path, name: str, tensors: dict[str, list[torch.Tensor]]) -> tuple[int, str]:
    """Write lists of tensors, each list joined along its first axis, as one safetensors file.

    By hand rather than with ``save_file``: pieces go to disk without being joined in memory, and
    are hashed on the way.

    Returns:
        The file's size and SHA-256.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "drafthead": name}}
    offset = 0
    for key, parts in tensors.items():
        size = sum(part.numel() * part.element_size() for part in parts)
        header[key] = {
            "dtype": _NAMES[parts[0].dtype],
            "shape": [sum(part.shape[0] for part in parts), *parts[0].shape[1:]],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with atomic_file(path) as temporary, open(temporary, "wb", buffering=0) as file:

        def put(piece: memoryview | bytes) -> None:
            digest.update(piece)
            while piece := piece[file.write(piece) :]:
                pass

        put(len(text).to_bytes(8, "little") + text)
        for parts in tensors.values():
            for part in parts:
                put(part.contiguous().flatten().view(torch.uint8).numpy().data)
        size = file.tell()
        os.fsync(file.fileno())
    return size, digest.hexdigest()
