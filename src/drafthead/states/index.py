"""The index of a unit: which samples its shards hold, and how to tell that they still do."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafthead.errors import DraftheadError
from drafthead.fsio import read_json, write_json
from drafthead.states.format import StoreMeta, check_version

UNIT_FILE = re.compile(r"unit-(\d{6})\.json")


@dataclass
class Shard:
    """One shard's line in the index. The lists run over its samples, in their order on disk."""

    file: str
    bytes: int
    sha256: str
    conversation: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    """Tokens of the prompt."""
    tokens: list[int] = field(default_factory=list)
    """T."""
    states: list[int] = field(default_factory=list)
    """T'."""


@dataclass
class Unit:
    """A finished unit of work."""

    number: int
    shards: list[Shard]
    checks: dict[str, Any]
    """What was found when the states were captured (see ``capture.checks``)."""


def unit_path(store: Path, number: int) -> Path:
    return store / f"unit-{number:06d}.json"


def shard_name(number: int, part: int) -> str:
    return f"unit-{number:06d}-{part:02d}.safetensors"


def _digest(record: dict) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save_unit(store: Path, meta: StoreMeta, unit: Unit) -> None:
    """Write the index of a unit, and so commit it."""
    record = {
        "format": "drafthead-states",
        "version": meta.version,
        "store": meta.fingerprint,
        "unit": unit.number,
        "checks": unit.checks,
        "shards": [vars(shard) for shard in unit.shards],
    }
    write_json(unit_path(store, unit.number), record | {"sha256": _digest(record)})


def load_unit(store: Path, meta: StoreMeta, number: int) -> Unit:
    """Read a unit's index and check all that can be checked without its shards.

    Raises:
        DraftheadError: broken, altered, of another store or version, or not adding up.
    """
    path = unit_path(store, number)
    record = read_json(path, "the index of a unit of states", dict[str, Any])
    check_version(path, record)
    digest = record.pop("sha256", None)
    if digest != _digest(record):
        raise DraftheadError(f"{path}: was changed: its checksum does not match its content")
    if record.get("store") != meta.fingerprint:
        raise DraftheadError(f"{path}: belongs to another store (the fingerprints differ)")
    if record.get("unit") != number or number >= meta.units:
        raise DraftheadError(f"{path}: is the index of unit {record.get('unit')} of {meta.units}")
    try:
        shards = [Shard(**shard) for shard in record["shards"]]
        for part, shard in enumerate(shards):
            _check_shard(shard, shard_name(number, part), meta)
        return Unit(number, shards, dict(record["checks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DraftheadError(f"{path}: not the index of a unit of states: {error}") from None


def _check_shard(shard: Shard, name: str, meta: StoreMeta) -> None:
    if shard.file != name:
        raise ValueError(f"shard file {shard.file!r} should be {name!r}")
    columns = (shard.conversation, shard.split, shard.prompt, shard.tokens, shard.states)
    if len({len(column) for column in columns}) != 1:
        raise ValueError("columns of different lengths")
    for prompt, tokens, states in zip(shard.prompt, shard.tokens, shard.states):
        if any(type(n) is not int for n in (prompt, tokens, states)):
            raise ValueError("a length that is not a whole number")
        if not (0 <= prompt <= tokens and 0 <= states <= tokens):
            raise ValueError("lengths that contradict each other")
    if meta.bytes_of(sum(shard.tokens), sum(shard.states)) > shard.bytes:
        raise ValueError("more samples than the shard has bytes for")
    if not all(isinstance(text, str) for text in shard.conversation + shard.split):
        raise ValueError("a name that is not text")


def unit_numbers(store: Path) -> list[int]:
    """The numbers of the finished units, ascending."""
    matches = (UNIT_FILE.fullmatch(entry.name) for entry in store.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def missing_units(meta: StoreMeta, numbers: list[int]) -> tuple[int, int]:
    """How many units a store lacks, and the first of them, given those it has, ascending."""
    first = next((i for i, number in enumerate(numbers) if i != number), len(numbers))
    return meta.units - len(numbers), first
