"""The commands verify and bench: their many options, as fields of the recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from drafthead.cli_options import (
    Again,
    AsJson,
    Kind,
    Overwrite,
    RecipeFile,
    RunsDir,
    console,
    emit,
    one_stage,
    read_recipe,
    run_stage,
)
from drafthead.errors import UnsupportedHead

if TYPE_CHECKING:
    from drafthead.recipe import Recipe


def _numbers(text: str | None) -> list[str] | None:
    """Split ``1,2,3``; the recipe's own validation checks each part."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _with_options(recipe: Path, section: str, options: dict[str, Any]) -> "Recipe":
    """The recipe with a section's fields as the command line gives them, and a word on it."""
    from drafthead.recipe import with_options

    changed = {name: value for name, value in options.items() if value is not None}
    changed_recipe = with_options(read_recipe(recipe), section, changed)
    if changed:
        given = json.dumps(changed)[1:-1].replace('"', "")
        console.print(
            f"{section}: {escape(given)}, for this once. run and report go by "
            f"{escape(str(recipe))}: write the same into it to keep it",
            soft_wrap=True,
        )
    return changed_recipe


def _sets(named: list[str] | None) -> list[dict[str, str]] | None:
    """``NAME=FILE`` as sources of the recipe."""
    if named is None:
        return None
    pairs = [entry.partition("=") for entry in named]
    return [{"path": file, "name": name} if file else {"path": name} for name, _, file in pairs]


def verify(
    recipe: RecipeFile,
    k: Annotated[str | None, typer.Option(help="Tokens drafted a step: 1,2,3.")] = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many prompts; beyond the held-out ones, of training.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of each answer.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    mixed_lengths: Annotated[
        bool | None, typer.Option(help="Also prompts and answers of mixed lengths.")
    ] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="Also answers that start from cached blocks.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an engine step: prompts in chunks.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Sampled answers at each context, with and without.")
    ] = None,
    kind: Kind = None,
    runs: RunsDir = Path("runs"),
    overwrite: Overwrite = False,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Prove that greedy output is the same with the head as without."""
    options = {
        "num_speculative_tokens": _numbers(k),
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "concurrency": concurrency,
        "mixed_lengths": mixed_lengths,
        "prefix_cache": prefix_cache,
        "max_num_batched_tokens": max_num_batched_tokens,
        "samples": samples,
    }
    loaded = _with_options(recipe, "verify", options)
    one_stage("verify", loaded, runs, overwrite, as_json, again, kind)


def bench(
    recipe: RecipeFile,
    k: Annotated[str | None, typer.Option(help="Tokens drafted a step: 1,3,5.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests at once: 1,4,16,64.")] = None,
    temperature: Annotated[str | None, typer.Option(help="Temperatures: 0,0.7.")] = None,
    tensor_parallel: Annotated[str | None, typer.Option(help="Numbers of GPUs: 1,2.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Prompts of your own, NAME=FILE; more than one is fine."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts to time.")] = None,
    max_new_tokens: Annotated[
        str | None, typer.Option(help="Tokens of each answer: 64,256.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Times each pair is run.")] = None,
    over: Annotated[
        Literal["engine", "http"] | None,
        typer.Option(help="Time the engine itself, or servers over HTTP."),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", help="Also another head, folder or hub id; more are fine."),
    ] = None,
    baseline: Annotated[
        Literal["ngram"] | None,
        typer.Option(help="Also a drafter that needs no head: prompt lookup."),
    ] = None,
    kind: Kind = None,
    runs: RunsDir = Path("runs"),
    overwrite: Overwrite = False,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Measure the speed with the head against the speed without, other drafters beside it."""
    options = {
        "num_speculative_tokens": _numbers(k),
        "concurrency": _numbers(concurrency),
        "temperature": _numbers(temperature),
        "tensor_parallel_size": _numbers(tensor_parallel),
        "sources": _sets(sets),
        "prompts": prompts,
        "max_new_tokens": _numbers(max_new_tokens),
        "repeats": repeats,
        "over": over,
    }
    loaded = _with_options(recipe, "bench", options)
    unsupported = False
    if heads:
        from drafthead.head.checkpoint import head_folder
        from drafthead.serve import existing_head, look_at
        from drafthead.targets import recipe_target

        # Fetched and looked at now, not after hours of measuring.
        for folder in [head_folder(existing_head(head)) for head in heads]:
            unsupported |= bool(look_at(loaded, folder, recipe_target(loaded))[0])
    summary = run_stage("bench", loaded, runs, overwrite, again, kind)
    if heads or baseline:
        from drafthead.prove.bench import contest
        from drafthead.prove.choice import to_serve

        (served, run), ngram = to_serve(loaded, runs, kind), baseline is not None
        beside = contest(served, run, heads=heads or [], ngram=ngram, console=console)
        summary = {**summary, "beside": beside}
    emit(summary, as_json)
    if unsupported:
        raise typer.Exit(UnsupportedHead.exit_code)
