"""Where a run leaves what it makes. One folder, the same names in every run."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from drafthead.errors import DraftheadError
from drafthead.fsio import clear, read_json, shortened, write_json

RECORD_FIX = "delete it, and the stage is looked at again"
SHARED = ("generate", "capture", "vocab")
"""The stages whose output heads of all kinds are made of."""
_BEGAN = "began"
"""Key of the time in a begun stage's record, beside its inputs."""


class Done(TypedDict):
    """The record of a stage that ended."""

    inputs: dict[str, Any]
    summary: dict[str, Any]


MADE = {
    "export": "head",
    "verify": "verify.json",
    "bench": "bench.json",
    "report": "report.html",
}
"""What stages leave that take minutes. Answers and states that were deleted for their disk stay
done: hours of work start by no accident."""


@dataclass(frozen=True)
class RunDir:
    """The paths of one run, under ``root`` (usually ``runs/NAME``)."""

    root: Path
    shared: Path | None = None
    """Of one of several kinds of head: the run's own folder, with what all are made of."""

    def of_kind(self, kind: str) -> "RunDir":
        """Where a head is made of what heads of other kinds are made of, too."""
        return RunDir(self.top / kind, self.top)

    @property
    def top(self) -> Path:
        """The whole run's folder."""
        return self.shared or self.root

    @property
    def answers(self) -> Path:
        """What the target wrote: token ids, loss masks, one record a conversation."""
        return self.top / "answers"

    @property
    def states(self) -> Path:
        """The target's hidden states for those tokens."""
        return self.top / "states"

    @property
    def vocab(self) -> Path:
        """Draft vocabulary: ``d2t``, ``t2d``, counts, coverage curve."""
        return self.top / "vocab"

    @property
    def train(self) -> Path:
        """Checkpoints, metrics and the held-out evaluation."""
        return self.root / "train"

    @property
    def head(self) -> Path:
        """The folder to publish, as vLLM reads it."""
        return self.root / "head"

    @property
    def head_speculators(self) -> Path:
        """The same head in the speculators library's format, if the recipe asks for it."""
        return self.root / "head-speculators"

    @property
    def verify_json(self) -> Path:
        return self.root / "verify.json"

    @property
    def bench_json(self) -> Path:
        return self.root / "bench.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    def record(self, stage: str, state: str) -> Path:
        """The file that says that ``stage`` has begun, or is done (``state``)."""
        folder = self.top if stage in SHARED else self.root
        return folder / ".stages" / f"{stage}.{state}.json"

    def finished(self, stage: str, inputs: dict) -> dict | None:
        """The summary of ``stage`` if it ended before with the same ``inputs``, else None; also
        None if what it left was deleted and is soon made again."""
        path, made = self.record(stage, "done"), MADE.get(stage)
        if not path.exists() or (made is not None and not (self.root / made).exists()):
            return None
        record = read_json(path, f"the record of stage {stage}", Done, RECORD_FIX)
        return record["summary"] if record["inputs"] == inputs else None

    def changed(self, stage: str, settings: dict) -> list[str]:
        """The ``settings`` that ``stage`` ended with other values of, as `section.field: old ->
        new`; none if it has not ended, or keeps no record of them."""
        path = self.record(stage, "done")
        if not path.exists():
            return []
        before = read_json(path, f"the record of stage {stage}", Done, RECORD_FIX)["inputs"]
        return _differences(before, {**before, **{k: settings[k] for k in settings if k in before}})

    def begin(self, stage: str, inputs: dict, overwrite: bool) -> None:
        """Start or go on with ``stage``, which from now on is not done. Output made with other
        inputs is swept away first; a mistake that was found before any was made leaves nothing to
        hold the next try against.

        Raises:
            DraftheadError: there is such output and ``overwrite`` is off, or it cannot be deleted.
        """
        path, before, now = self.record(stage, "begun"), inputs, datetime.now()
        if path.exists():
            before = read_json(path, f"the record of stage {stage}", dict[str, Any], RECORD_FIX)
            before.pop(_BEGAN, None)
            if before == inputs:
                now = self.began(stage) or now
        if before != inputs:
            made = any(out.is_dir() and any(out.iterdir()) for out in self._outputs(stage))
            if made and not overwrite:
                raise DraftheadError(
                    f"{self.root}: its {stage} stage was made with other settings "
                    f"({', '.join(_differences(before, inputs))}); give this run another name, "
                    "or pass --overwrite to make it anew"
                )
        self.forget(stage)  # first: nothing that is killed from here on counts as done
        if before != inputs:
            if self.states in self._outputs(stage):
                self.forget("capture")
            for output in self._outputs(stage):
                clear(output)
        write_json(path, {**inputs, _BEGAN: now.isoformat()})

    def began(self, stage: str) -> datetime | None:
        """When ``stage`` began, the first time if it was resumed since; None if it did not."""
        path = self.record(stage, "begun")
        if not path.exists():
            return None
        record = read_json(path, f"the record of stage {stage}", dict[str, Any], RECORD_FIX)
        try:
            return datetime.fromisoformat(record[_BEGAN])
        except (KeyError, TypeError, ValueError):  # a record from before this was kept
            return None

    def finish(self, stage: str, inputs: dict, summary: dict) -> None:
        """Record that ``stage`` ended with these ``inputs``."""
        write_json(self.record(stage, "done"), {"inputs": inputs, "summary": summary})

    def forget(self, stage: str) -> None:
        """Mark ``stage`` as not done: its inputs have changed."""
        self.record(stage, "done").unlink(missing_ok=True)

    def _outputs(self, stage: str) -> list[Path]:
        return {
            # The states belong to the answers, whichever of the two stages wrote them.
            "generate": [self.answers, self.states],
            "vocab": [self.vocab],
            "train": [self.train],
            "export": [self.head, self.head_speculators, self.root / "head-mlx"],
        }.get(stage, [])


def _differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """The fields that differ, as `section.field: old -> new`."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new or (prefix == "prompt_files." and None in (old, new)):
            continue  # of a file that is new or gone the sources tell
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _differences(old, new, f"{prefix}{key}.")
        else:
            changes.append(f"{prefix}{key}: {shortened(old, 60)} -> {shortened(new, 60)}")
    return changes
