"""From the best head of training to the folders that engines serve, and from others' heads."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from drafthead.data.template import given_template
from drafthead.drafters import drafter_of
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.drafters.engines import ENGINES
from drafthead.drafters.inspect import inspect_head
from drafthead.drafters.support import check_engines, layout
from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.fsio import clear, read_json, write_bytes, write_json
from drafthead.head.formats import AUX_IDS, Format, Provenance
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
        raise DraftheadError(f"{best}: no trained head; run `drafthead train RECIPE`")
    k = recipe.serve.k
    paths = {"head": str(run.head)}
    with waiting(console, "writing the head"):
        about = convert(best, run.head, "vllm", target, k)
        if (template := given_template(recipe)) is not None:
            write_bytes(run.head / CHAT_TEMPLATE, template.encode())
        if recipe.export.speculators:
            convert(best, run.head_speculators, "speculators", target, k)
            paths["speculators"] = str(run.head_speculators)
    console.print(
        f"{escape(str(run.head))}: {about['parameters'] / 1e6:.1f} M parameters, "
        f"{about['cost']['bytes_per_draft_step'] / 1e6:.1f} MB read for each drafted token"
    )
    return {
        "paths": paths,
        "config": about["config"],
        "parameters": about["parameters"],
        "bytes": about["bytes"],
        "cost": about["cost"],
        "notes": about["notes"],
    }


def convert(source: Path, folder: Path, format: Format, target: Target, k: int) -> dict:
    """Read a head of either format and write it in another; returns what `inspect_head` found.

    k: the speculative tokens that speculators' format proposes.

    Raises:
        DraftheadError: the head cannot be served on this target; every reason is named.
    """
    if problems := inspect_head(source, target)["problems"]:
        raise DraftheadError("\n".join(f"{source}: {problem}" for problem in problems))
    return _write(source, folder, format, target, k)


def _write(
    source: Path,
    folder: Path,
    format: Format,
    target: Target | None,
    k: int,
    with_embedding: bool = False,
) -> dict:
    drafter = drafter_of(source)
    head, embedding = drafter.load(source, target)
    raw: Any = read_json(source / "config.json", "a head's configuration")
    about = raw.get("drafthead")
    about = about if isinstance(about, dict) else {}
    name = str(about.get("target", target.path if target else ""))
    made = Provenance(
        # vLLM's format is published; of speculators' vLLM loads the target by this name.
        target=without_paths(name) if format == "vllm" else name,
        target_fingerprint=str(about.get("target_fingerprint", "")),
        target_architectures=target.architectures if target else (),
        trained=about.get("trained") or {},
    )
    dtype = head.fc.weight.dtype
    if with_embedding and embedding is None:
        if target is None:
            raise DraftheadError(
                f"{source}: needs the target's embedding; name the target with --target"
            )
        embedding = target.embedding()
    if isinstance(head, DSparkHead) and target is not None:
        _share(head, target)
    drafter.save(head, folder, made, k=k, format=format, embedding=embedding, dtype=dtype)
    return inspect_head(folder, target)


def _share(head: DSparkHead, target: Target) -> None:
    """Write how many layers the target has, and leave an LM head that is the target's to it: other
    engines than vLLM have no place for one."""
    changes: dict[str, Any] = {"num_target_layers": target.num_layers}
    whole = head.config.draft_vocab_size == target.vocab_size and target.logits.scale == 1
    if head.lm_head is not None and whole:
        weight = head.lm_head.weight
        if torch.equal(weight, target.lm_head().to(weight.dtype)):
            head.lm_head, changes["own_lm_head"] = None, False
    head.config = head.config.model_copy(update=changes)


def export_for(
    recipe: Recipe, run: RunDir, engines: Sequence[str], *, console: Console
) -> dict[str, Any]:
    """Write the exported head for other engines too, where one folder does not serve them all.

    Args:
        recipe: the run's.
        run: exported.
        engines: names of `ENGINES`.
        console: told what each engine makes of the head.

    Returns:
        By engine: its folder, and what `support` says of that.

    Raises:
        DraftheadError: an engine that is not known, or none of them serves the head.
    """
    target, found = recipe_target(recipe), {}
    about = inspect_head(run.head, target, deep=False)
    for engine in check_engines(engines):
        folder = run.head
        if layout(engine, about) != "vllm":
            folder = run.root / f"head-{engine}"
            _write(run.head, folder, layout(engine, about), target, recipe.serve.k, True)
        can = inspect_head(folder, target, deep=False)["engines"][engine]
        found[engine] = {"folder": str(folder), **can}
        console.print(support_words(engine, can, folder), soft_wrap=True)
    if not any(can["serves"] for can in found.values()):
        raise DraftheadError(
            "\n".join(f"{ENGINES[e].title}: {'; '.join(c['why'])}" for e, c in found.items()),
            field="for",
        )
    return found


def support_words(engine: str, can: dict[str, Any], folder: Path | str) -> str:
    """For people: whether an engine serves a head."""
    title = ENGINES[engine].title
    if can["serves"]:
        return escape("; ".join([f"{title}: serves {folder}", *can["notes"]]))
    return f"[yellow]{escape(f'{title}: does not serve it: ' + '; '.join(can['why']))}[/yellow]"


def convert_head(
    source: Path,
    out: Path,
    *,
    target: Target | None = None,
    engine: str = "vllm",
    layer_ids: str | None = None,
) -> dict[str, Any]:
    """Write a published head as an engine reads it: configuration and names, no weight is changed.

    Args:
        source: the head's folder.
        out: the folder to make.
        target: the model that it is for; needed where the head leaves something to it.
        engine: a name of `ENGINES`.
        layer_ids: "inputs" or "outputs": what layers that stand in `eagle_config` alone mean.

    Returns:
        What `inspect_head` found in `out`.

    Raises:
        UnsupportedHead: drafthead does not know what the head computes.
        DraftheadError: it is broken, could mean two things, the engine does not serve it however
            it is written, or `out` is there already.
    """
    check_engines([engine])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DraftheadError(f"{out}: exists already; name a new folder")
    with TemporaryDirectory() as temporary:
        if layer_ids is not None:
            source = _with_layer_ids(source, Path(temporary), layer_ids)
        about = inspect_head(source, target, deep=False)
        if about["unsupported"]:
            raise UnsupportedHead("\n".join(about["unsupported"]))
        k = about.get("config", {}).get("block_size", 3)
        file_layout = layout(engine, about)
        converted = _write(
            source, out, file_layout, target, k, with_embedding=file_layout != "vllm"
        )
    if not (can := converted["engines"][engine])["serves"]:
        clear(out)
        why = "\n".join(f"{ENGINES[engine].title}: {reason}" for reason in can["why"])
        raise DraftheadError(why, field="for")
    return converted


def _with_layer_ids(source: Path, folder: Path, meaning: str) -> Path:
    """The head in `folder`, its layers as vLLM counts them at the top of config.json."""
    raw: Any = read_json(source / "config.json", "a head's configuration")
    nested = raw.get("eagle_config") if isinstance(raw, dict) else None
    ids = nested.get(AUX_IDS) if isinstance(nested, dict) and not raw.get(AUX_IDS) else None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise DraftheadError(
            f"{source}: --layer-ids says what {AUX_IDS} in eagle_config means, if it stands there "
            "alone; here it does not",
            field=AUX_IDS,
        )
    for file in source.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    layers = {AUX_IDS: [i + (meaning == "outputs") for i in ids], "eagle_config": {}}
    write_json(folder / "config.json", raw | layers)
    return folder
