"""Where a run leaves what it makes. One folder, the same names in every run."""

from dataclasses import dataclass
from pathlib import Path

from drafthead.fsio import fingerprint, read_json, write_json


@dataclass(frozen=True)
class RunDir:
    """The paths of one run, under ``root`` (usually ``runs/NAME``)."""

    root: Path

    @property
    def answers(self) -> Path:
        """What the target wrote: token ids, loss masks, one record a conversation."""
        return self.root / "answers"

    @property
    def states(self) -> Path:
        """The target's hidden states for those tokens."""
        return self.root / "states"

    @property
    def vocab(self) -> Path:
        """Draft vocabulary: ``d2t``, ``t2d``, counts, coverage curve."""
        return self.root / "vocab"

    @property
    def train(self) -> Path:
        """Checkpoints, metrics and the held-out evaluation."""
        return self.root / "train"

    @property
    def head(self) -> Path:
        """The folder to publish, as vLLM reads it."""
        return self.root / "head"

    @property
    def verify_json(self) -> Path:
        return self.root / "verify.json"

    @property
    def bench_json(self) -> Path:
        return self.root / "bench.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    def _stage_file(self, stage: str) -> Path:
        return self.root / ".stages" / f"{stage}.json"

    def finished(self, stage: str, inputs: object) -> dict | None:
        """The summary of ``stage`` if it ended before with the same ``inputs``, else None."""
        path = self._stage_file(stage)
        if not path.exists():
            return None
        record = read_json(path, f"the record of stage {stage}")
        if record.get("inputs") != fingerprint(inputs):
            return None
        return record["summary"]

    def finish(self, stage: str, inputs: object, summary: dict) -> None:
        """Record that ``stage`` ended with these ``inputs``."""
        write_json(self._stage_file(stage), {"inputs": fingerprint(inputs), "summary": summary})
