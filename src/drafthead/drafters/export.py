"""The stage `export`: from the best head of training to the folder that vLLM serves."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from drafthead.data.template import given_template
from drafthead.drafters import drafter_of
from drafthead.drafters.inspect import inspect_head
from drafthead.errors import DraftheadError
from drafthead.fsio import read_json, write_bytes
from drafthead.head.formats import Format, Provenance
from drafthead.progress import waiting
from drafthead.recipe import Recipe, without_paths
from drafthead.rundir import RunDir
from drafthead.targets import Target, recipe_target

CHAT_TEMPLATE = "chat_template.jinja"
"""File of the recipe's chat template in the head's folder, for who serves a published head."""


def export(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: write `run.head`, vLLM's own format, from `run.train/best`; with `export.speculators`
    also `run.head_speculators`, the speculators library's.

    Returns the paths, the shape, and what drafting costs (`DraftCost`).

    Raises:
        DraftheadError: nothing trained yet, or the head is broken or of another target.
    """
    target = recipe_target(recipe)
    best = run.train / "best"
    if not best.is_dir():
        run.forget("train")  # deleted since: or the command named here would find nothing to do
        raise DraftheadError(f"{best}: no trained head there; `drafthead train RECIPE` makes one")
    k = recipe.serve.k
    paths = {"head": str(run.head)}
    with waiting(console, "writing the head"):
        found = convert(best, run.head, "vllm", target, k)
        if (template := given_template(recipe)) is not None:
            write_bytes(run.head / CHAT_TEMPLATE, template.encode())
        if recipe.export.speculators:
            convert(best, run.head_speculators, "speculators", target, k)
            paths["speculators"] = str(run.head_speculators)
    console.print(
        f"{escape(str(run.head))}: {found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['cost']['bytes_per_draft_step'] / 1e6:.1f} MB read for each drafted token"
    )
    return {
        "paths": paths,
        "config": found["config"],
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "cost": found["cost"],
        "notes": found["notes"],
    }


def convert(source: Path, folder: Path, format: Format, target: Target, k: int) -> dict:
    """Read a head of either format and write it in another; returns what `inspect_head` found.

    k: the speculative tokens that speculators' format proposes.

    Raises:
        DraftheadError: the head cannot be served on this target; every reason is named.
    """
    if problems := inspect_head(source, target)["problems"]:
        raise DraftheadError("\n".join(f"{source}: {problem}" for problem in problems))
    drafter = drafter_of(source)
    head, embedding = drafter.load(source, target)
    raw: Any = read_json(source / "config.json", "a head's configuration")
    about = raw.get("drafthead")
    about = about if isinstance(about, dict) else {}
    name = str(about.get("target", target.path))
    made = Provenance(
        # vLLM's format is published; of speculators' vLLM loads the target by this name.
        target=without_paths(name) if format == "vllm" else name,
        target_fingerprint=str(about.get("target_fingerprint", "")),
        target_architectures=target.architectures,
        trained=about.get("trained") or {},
    )
    dtype = head.fc.weight.dtype
    drafter.save(head, folder, made, k=k, format=format, embedding=embedding, dtype=dtype)
    return inspect_head(folder, target)
