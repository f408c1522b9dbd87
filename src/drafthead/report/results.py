"""Everything that a run measured, read back from its files: what report, card and table quote.

No figure comes from anywhere else; what a run did not measure is None and is left out.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drafthead.errors import DraftheadError
from drafthead.fsio import read_json
from drafthead.prove.proof import read_proof
from drafthead.prove.records import (
    BENCH_AGAIN,
    ENDED,
    VERIFY_AGAIN,
    Bench,
    Coverage,
    Ended,
    Training,
    Verified,
    WrittenHead,
)
from drafthead.recipe import Recipe, without_paths, without_secrets
from drafthead.rundir import RECORD_MEND, RunDir
from drafthead.serve import served_k
from drafthead.train.log import read_metrics


@dataclass(frozen=True)
class Results:
    """A finished run, as its files tell it."""

    recipe: Recipe
    run: RunDir
    verify: dict
    bench: dict
    proof: dict
    training: dict | None
    """Training's own summary, its held-out evaluation with it."""
    coverage: dict | None
    """Of the head's draft vocabulary; None if that was not chosen in this run."""
    metrics: list[dict]
    """Training's log, a record a step logged."""
    stages: dict[str, dict]
    """Each stage's summary."""
    head_config: dict

    @property
    def target_name(self) -> str:
        return os.path.basename(os.path.abspath(self.recipe.target.path))  # of "." too

    @property
    def k(self) -> int:
        """Tokens drafted a step in the headline."""
        return self.bench["num_speculative_tokens"]

    @property
    def recommended_k(self) -> int:
        """The k to serve."""
        return served_k(self.recipe, self.run)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What was measured, and the command that did it; a command that did both is there once."""
        verify, bench = self.verify["command"], self.bench["command"]
        if verify == bench:
            pairs = [("losslessness, speed and acceptance", verify)]
        else:
            pairs = [("losslessness", verify), ("speed and acceptance", bench)]
        return [(what, command) for what, command in pairs if command]

    @property
    def recipe_yaml(self) -> str:
        """The recipe, defaults and secrets left out, local paths as names."""
        data = without_secrets(self.recipe.model_dump(mode="json", exclude_defaults=True))
        data = without_paths(data)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def read_results(recipe: Recipe, run: RunDir) -> Results:
    """Read a run that has been verified and benched.

    Raises:
        DraftheadError: verify or bench has not been run, or on another head, or a file is not what
            this version writes.
    """

    def optional(path: Path, what: str, shape: Any) -> Any:
        return read_json(path, what, shape) if path.exists() else None

    summaries = {}
    for path in sorted((run.root / ".stages").glob("*.done.json")):
        stage = path.name.split(".")[0]
        done = read_json(path, f"the record of stage {stage}", ENDED.get(stage, Ended), RECORD_MEND)
        summaries[stage] = done["summary"]
    coverage = run.vocab / "coverage.json"
    bench = read_json(run.bench_json, "the figures of `drafthead bench`", Bench, BENCH_AGAIN)
    proof = read_proof(run)
    if "head" in bench and bench["head"]["sha256"] != proof["head"]["sha256"]:
        raise DraftheadError(f"{run.bench_json}: of another head than lies there; {BENCH_AGAIN}")
    return Results(
        recipe=recipe,
        run=run,
        verify=read_json(
            run.verify_json, "the outcome of `drafthead verify`", Verified, VERIFY_AGAIN
        ),
        bench=bench,
        proof=proof,
        training=optional(run.train / "best.json", "the held-out evaluation", Training),
        coverage=None
        if recipe.train.start_from
        else optional(coverage, "the draft vocabulary's coverage", Coverage),
        metrics=read_metrics(run.train / "metrics.jsonl"),
        stages=summaries,
        head_config=read_json(run.head / "config.json", "the head's configuration", WrittenHead),
    )
