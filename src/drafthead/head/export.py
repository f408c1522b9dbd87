"""The stage `export`: from the best head of training to the folder that vLLM serves."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from drafthead.errors import DraftheadError
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.formats import Format, Provenance
from drafthead.head.inspect import inspect_head
from drafthead.recipe import Recipe, without_paths
from drafthead.rundir import RunDir
from drafthead.targets import Target, recipe_target


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
        raise DraftheadError(f"{best}: no trained head there; run `drafthead train` first")
    k = recipe.serve.k
    found = convert(best, run.head, "vllm", target, k)
    paths = {"head": str(run.head)}
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
    loaded = load_head(source, target)
    about = loaded.read.provenance or {}
    name = str(about.get("target", target.path))
    made = Provenance(
        # vLLM's format is published; of speculators' vLLM loads the target by this name.
        target=without_paths(name) if format == "vllm" else name,
        target_fingerprint=str(about.get("target_fingerprint", "")),
        target_architectures=target.architectures,
        trained=about.get("trained") or {},
    )
    dtype = loaded.head.fc.weight.dtype
    save_head(
        loaded.head,
        folder,
        made,
        format=format,
        speculative_tokens=k,
        embedding=loaded.embedding,
        dtype=dtype,
    )
    return inspect_head(folder, target)
