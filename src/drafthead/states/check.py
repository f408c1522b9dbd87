"""Verify a whole store and name the broken units; removed units are captured again."""

import contextlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from drafthead.errors import DraftheadError
from drafthead.fsio import RunLock, sha256_file
from drafthead.progress import progress
from drafthead.rundir import RunDir
from drafthead.states.format import StoreMeta, decode
from drafthead.states.index import load_unit, missing_units, unit_numbers, unit_path
from drafthead.states.reader import open_shard


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: a unit that must be captured again."""

    unit: int
    what: str
    """The message, which names the file."""
    conversations: list[str]
    """The samples of the unit, as far as its index still tells."""


def check_store(path: Path | str, console: Console) -> list[Fault]:
    """Read every byte of a store and report each unit that differs from its index.

    Raises:
        DraftheadError: ``meta.json`` itself is missing or broken: then nothing can be told.
    """
    path = Path(path)
    meta = StoreMeta.load(path)
    numbers = unit_numbers(path)
    missing, first = missing_units(meta, numbers)
    faults = []
    if missing > 0:
        what = f"{unit_path(path, first)}: missing: {missing} of {meta.units} are not captured yet"
        faults.append(Fault(first, what, []))
    with progress(console, f"checking {path}", len(numbers), unit="units") as bar:
        faults += [fault for unit in bar.each(numbers) for fault in _unit_faults(path, meta, unit)]
    return sorted(faults, key=lambda fault: fault.unit)


def _unit_faults(path: Path, meta: StoreMeta, number: int) -> list[Fault]:
    try:
        unit = load_unit(path, meta, number)
    except DraftheadError as error:
        return [Fault(number, str(error), [])]
    names = [name for shard in unit.shards for name in shard.conversation]
    for shard in unit.shards:
        try:
            handle = open_shard(path, meta, shard, sha256_file)
            first = 0
            for name, count in zip(shard.conversation, shard.states):
                rows = {n: handle.get_slice(n)[first : first + count] for n in meta.stored}
                if not decode(rows).isfinite().all():
                    what = f"{path / shard.file}: states of {name} are not finite"
                    return [Fault(number, what, names)]
                first += count
        except DraftheadError as error:
            return [Fault(number, str(error), names)]
    return []


def repair(path: Path | str, faults: list[Fault]) -> None:
    """Throw the faulty units out, so that `drafthead capture` makes just those again.

    A store that lies in a run's folder has its run told that the stage is not finished.
    """
    path = Path(path)
    for fault in faults:
        unit_path(path, fault.unit).unlink(missing_ok=True)
        for shard in path.glob(f"unit-{fault.unit:06d}-*.safetensors"):
            shard.unlink()
    if faults:
        _run(path).forget("capture")


def _run(store: Path) -> RunDir:
    """The run that a store lies in. By its name, not by where a link leads; `.` has one, too."""
    return RunDir(Path(os.path.abspath(store)).parent)


def _fix(path: Path, faults: list[Fault]) -> str | None:
    """The command to type next; None for a whole store."""
    there = any(unit_path(path, fault.unit).exists() for fault in faults)
    if there or (faults and _run(path).record("capture", "done").exists()):
        return f"drafthead states check {shlex.quote(str(path))} --repair"
    return "drafthead capture RECIPE" if faults else None


def check_command(path: Path | str, *, fix: bool, console: Console) -> dict[str, Any]:
    """What `drafthead states check` prints: JSON-able, with one entry a faulty unit.

    Raises:
        DraftheadError: as ``check_store``; with ``fix``, a run is at work in the store's folder.
    """
    lock = RunLock(_run(Path(path)).root)
    with lock if fix and lock.path.exists() else contextlib.nullcontext():
        faults = check_store(path, console)
        if fix:
            repair(path, faults)
    return {
        "store": str(path),
        "units": StoreMeta.load(Path(path)).units,
        "whole": not faults,
        "repaired": fix and bool(faults),
        "faults": [vars(fault) for fault in faults],
        "mend": _fix(Path(path), faults),
    }
