"""What a benchmark leaves behind: a JSON file that begins with a flat `summary` of its figures."""

import re
import sys
import time
from pathlib import Path

from drafthead.fsio import write_json
from drafthead.machine import this_machine


def begin(benchmark: str) -> dict:
    """What every record says of its run."""
    script = sys.modules["__main__"].__spec__  # None unless run by `python -m`
    program = f"python -m {script.name}" if script else "python"
    return {
        "benchmark": benchmark,
        "command": " ".join([program, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": this_machine().as_dict(),
    }


def flat(figures: dict, prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by their joined names; a pair of numbers is `_low` and `_high`."""
    numbers: dict[str, float] = {}
    for name, value in figures.items():
        key = "_".join(filter(None, (prefix, re.sub(r"\W", "_", str(name)))))
        if isinstance(value, dict):
            numbers |= flat(value, key)
        elif isinstance(value, int | float):
            numbers[key] = value
        elif isinstance(value, list | tuple) and len(value) == 2:
            numbers |= flat(dict(zip(("low", "high"), value)), key)
    return numbers


def save(path: Path, record: dict, figures: dict) -> None:
    """Write ``record`` with the numbers of ``figures`` as its summary."""
    write_json(path, {"summary": flat(figures), **record})


def pick(values: dict, *names: str) -> dict:
    """Those of ``names`` that ``values`` has."""
    return {name: values[name] for name in names if name in values}
