"""Everything that a run measured, read back from its files: what report, card and table quote.

No figure comes from anywhere else; what a run did not measure is None and is left out.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drafthead.drafters import DRAFTERS, drafter_of
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
from drafthead.prove.served import as_served, recommended_k, served_k, with_headline
from drafthead.recipe import Recipe, without_paths, without_secrets
from drafthead.rundir import RECORD_FIX, RunDir
from drafthead.train.log import read_metrics


@dataclass(frozen=True)
class Results:
    """A finished run, as its files tell it."""

    recipe: Recipe
    run: RunDir
    verify: dict
    bench: dict
    """Its headline is the k to serve, if that was measured; empty if speed was not measured."""
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
    served_k: int
    """Tokens to draft a step, measured or not."""
    draft_sample_method: str
    """How drafts are drawn when served."""

    @property
    def target_name(self) -> str:
        return os.path.basename(os.path.abspath(self.recipe.target.path))  # of "." too

    @property
    def kind(self) -> str:
        """Of the head."""
        return drafter_of(self.run.head).kind

    @property
    def kind_name(self) -> str:
        """The same, for people."""
        return DRAFTERS[self.kind].name

    @property
    def k(self) -> int:
        """Tokens drafted a step in the headline."""
        return self.bench["num_speculative_tokens"] if self.bench else self.served_k

    @property
    def recommended(self) -> bool:
        """The k to serve is the fastest of several that were proved and measured; else the recipe
        names it, or there was nothing to choose from."""
        ks = {cell["num_speculative_tokens"] for cell in self.bench.get("grid", [])}
        named = self.recipe.serve.num_speculative_tokens is not None
        return len(ks) > 1 and not named and self.served_k == recommended_k(self.recipe, self.run)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands that measured, each with what it measured; a command that did both is listed
        once."""
        verify, bench = self.verify["command"], self.bench.get("command")
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
    """Read a run that has been verified and, as a rule, benched.

    Raises:
        DraftheadError: verify has not been run, or on another head, or a file is not what this
            version writes.
    """

    def optional(path: Path, what: str, shape: Any, fix: str = "make it anew") -> Any:
        return read_json(path, what, shape, fix) if path.exists() else None

    summaries = {}
    for path in sorted((run.root / ".stages").glob("*.done.json")):
        stage = path.name.split(".")[0]
        done = read_json(path, f"the record of stage {stage}", ENDED.get(stage, Ended), RECORD_FIX)
        summaries[stage] = done["summary"]
    coverage = run.vocab / "coverage.json"
    proof = read_proof(run)
    bench = optional(run.bench_json, "the figures of `drafthead bench`", Bench, BENCH_AGAIN) or {}
    if bench and bench["head"]["sha256"] != proof["head"]["sha256"]:
        bench = {}  # of a head that is no longer there
    k = served_k(recipe, run)
    return Results(
        recipe=recipe,
        run=run,
        verify=read_json(
            run.verify_json, "the outcome of `drafthead verify`", Verified, VERIFY_AGAIN
        ),
        bench=with_headline(bench, k) if bench else {},
        proof=proof,
        served_k=k,
        draft_sample_method=as_served(recipe, run).serve.named_method,
        training=optional(run.train / "best.json", "the held-out evaluation", Training),
        coverage=None
        if recipe.train.start_from
        else optional(coverage, "the draft vocabulary's coverage", Coverage),
        metrics=read_metrics(run.train / "metrics.jsonl"),
        stages=summaries,
        head_config=read_json(run.head / "config.json", "the head's configuration", WrittenHead),
    )
