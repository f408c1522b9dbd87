"""What training tells: a line on the terminal, JSON lines, TensorBoard and other trackers."""

import contextlib
import importlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

from rich.console import Console
from typing_extensions import TypedDict

from drafthead.errors import DraftheadError
from drafthead.fsio import Count, Number, disk_errors, shaped, write_bytes
from drafthead.progress import progress


class Metrics(TypedDict):
    """The fields that every line of `metrics.jsonl` has, and those that are plotted."""

    step: Count
    loss: NotRequired[Number | None]
    accepted_length: NotRequired[Number | None]


class Log:
    """Metrics of a run, by step. Opening it cuts off what a killed run wrote after `step`.

    folder: `metrics.jsonl` and `tensorboard/` go there. trackers: "wandb", used through
    its `init`, `log` and `finish`. total: steps of the run. `quiet` is for processes that
    only compute. A context manager.

    Raises:
        DraftheadError: a tracker that is not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total: int,
        name: str,
        trackers: list[str],
        console: Console,
        quiet: bool = False,
    ):
        self.quiet, self.console, self.step, self.total = quiet, console, step, total
        self._open = contextlib.ExitStack()
        if quiet:
            return
        self.trackers = import_trackers(trackers)
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        run_id = _run_id(folder / "tracker_id") if trackers else ""
        for tracker in self.trackers:
            # A run that goes on after a kill stays one run; another run of the recipe is another.
            tracker.init(project="drafthead", resume="allow", name=name, id=run_id)
        self.length: float | None = None

    def __enter__(self) -> "Log":
        if not self.quiet:
            shown = progress(self.console, "train", self.total, self.step, unit="steps")
            self.bar = self._open.enter_context(shown)
            self.bar.advance(0, note="waiting for the first figures")
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self.quiet:
            return
        self._open.__exit__(*exc_info)
        self.board.close()
        for tracker in self.trackers:
            tracker.finish()

    def write(self, step: int, metrics: dict[str, float | list[float]]) -> None:
        """Record metrics of `step`; a list goes by position. Known names also show in the line."""
        if self.quiet:
            return
        flat: dict[str, float] = {}
        for name, value in metrics.items():
            values = value if isinstance(value, list) else [value]
            names = [f"{name}/{i + 1}" for i in range(len(values))]
            flat |= dict(zip(names if isinstance(value, list) else [name], values))
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, number in flat.items():
            self.board.add_scalar(name, number, step)
        for tracker in self.trackers:
            tracker.log(flat, step=step)
        self.length = flat.get("accepted_length", self.length)
        if "loss" in flat:
            figures = f"loss {flat['loss']:.3f} · {flat['tokens_per_s']:,.0f} tokens/s"
            figures += f" · MFU {flat['mfu']:.0%} · waiting for data {flat['waiting']:.0%}"
            if self.length is not None:
                figures += f" · accepted length {self.length:.2f}"
            self.bar.advance(step - self.bar.done, note=figures)


def import_trackers(names: Sequence[str]) -> list[Any]:
    """The modules of these trackers.

    Raises:
        DraftheadError: one is not installed.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            raise DraftheadError(
                f"recipe: train.track names {name}, which is not installed: pip install {name}"
            ) from None
    return modules


def _run_id(path: Path) -> str:
    """The name that trackers know this folder's run by, drawn once."""
    if not path.exists():
        write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a `metrics.jsonl`; a last one that a kill cut off is left out. What is
    no finite number is None.

    Raises:
        DraftheadError: a line is no record of training.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):  # no JSON, or not even text
            break
        shaped(record, f"{path}, line {number}", "a record of training", Metrics)
        records.append(record)
    return records
