"""Everything that a run measured, read back from its files: what report, card and table quote.

No figure comes from anywhere else; what a run did not measure is None and is left out.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from drafthead.errors import DraftheadError
from drafthead.fsio import read_json
from drafthead.prove.proof import read_proof
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
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
    metrics: list[dict]
    """Training's log, a record a step logged."""
    stages: dict[str, dict]
    """Each stage's summary."""
    head_config: dict

    @property
    def target_name(self) -> str:
        return Path(self.recipe.target.path).name

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
        """What was measured or made, and the command that did it."""
        found = [
            ("lossless", self.verify["command"]),
            ("speed and acceptance", self.bench["command"]),
        ]
        return [(what, command) for what, command in found if command]

    @property
    def recipe_yaml(self) -> str:
        """The recipe, defaults left out."""
        data = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


_VERIFIED = ("lossless", "prompts", "identical", "ties", "differences", "runs", "command")
_BENCHED = (
    "num_speculative_tokens",
    "speedup",
    "speedup_ci95",
    "acceptance_by_position",
    "predicted_acceptance_by_position",
    "grid",
    "cost_model",
    "cost_model_error",
    "recommended_num_speculative_tokens",
    "command",
    "machine",
)
_POINT = (
    "num_speculative_tokens",
    "concurrency",
    "temperature",
    "tensor_parallel_size",
    "speedup",
    "speedup_ci95",
    "verdict",
    "accepted_length",
    "step_s",
    "latency",
    "by_source",
)


def read_bench(path: Path) -> dict:
    """The figures of a bench, each point of its grid whole.

    Raises:
        DraftheadError: missing, or not what this version's bench writes.
    """
    bench = read_json(path, "the figures of `drafthead bench`", _BENCHED)
    mend = "measure anew with `drafthead bench RECIPE --again`"
    if not bench["grid"]:
        raise DraftheadError(f"{path}: no point in `grid`; {mend}")
    for number, point in enumerate(bench["grid"]):
        for name in _POINT:
            if name not in point:
                raise DraftheadError(
                    f"{path}: no `grid.{number}.{name}` in it; it was altered, or written by "
                    f"another version: {mend}"
                )
    return bench


def read_results(recipe: Recipe, run: RunDir) -> Results:
    """Read a run that has been verified and benched.

    Raises:
        DraftheadError: verify or bench has not been run, or the proof is of another head.
    """

    def optional(path: Path, what: str, needs: tuple[str, ...]) -> dict | None:
        return read_json(path, what, needs) if path.exists() else None

    summaries = {}
    for path in sorted((run.root / ".stages").glob("*.done.json")):
        record = read_json(path, "the record of a stage", ("summary",))
        summaries[path.name.split(".")[0]] = record["summary"]
    return Results(
        recipe=recipe,
        run=run,
        verify=read_json(run.verify_json, "the outcome of `drafthead verify`", _VERIFIED),
        bench=read_bench(run.bench_json),
        proof=read_proof(run),
        training=optional(
            run.train / "best.json", "the held-out evaluation", ("heldout", "steps", "tokens")
        ),
        coverage=optional(
            run.vocab / "coverage.json",
            "the draft vocabulary's coverage",
            ("size", "coverage", "curve"),
        ),
        metrics=read_metrics(run.train / "metrics.jsonl"),
        stages=summaries,
        head_config=read_json(run.head / "config.json", "the head's configuration"),
    )
