"""What the commands share: the console, common options, how a result is told."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from drafthead import progress
from drafthead.recipe import Recipe

console = Console(stderr=True)


def _hide_progress(as_json: bool) -> bool:
    """A program that asks for JSON watches no bar."""
    progress.hide(console, as_json)
    return as_json


RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
RunsDir = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_hide_progress, help="Print one JSON object on stdout."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace output made with other settings.")
]

Again = Annotated[bool, typer.Option("--again", help="Measure again what is finished.")]


def emit(result: Any, as_json: bool) -> None:
    """A command's result: one JSON object on stdout, or for people on stderr."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    elif result is not None:
        console.print_json(json.dumps(result))


def run_stage(name: str, recipe: Recipe, runs: Path, overwrite: bool, again: bool = False) -> dict:
    """Run one stage; returns its summary."""
    from drafthead.run import execute

    found = execute(
        recipe, runs, first=name, last=name, overwrite=overwrite, again=again, console=console
    )
    return found[name]


def one_stage(
    name: str, recipe: Recipe, runs: Path, overwrite: bool, as_json: bool, again: bool = False
) -> None:
    """Run one stage and tell its summary."""
    emit(run_stage(name, recipe, runs, overwrite, again), as_json)
