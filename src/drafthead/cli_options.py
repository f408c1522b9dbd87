"""Shared by the commands: the console, common options, printing of results."""

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from drafthead import progress

# pydantic takes as long to import as all else that the command line needs to print its help.
if TYPE_CHECKING:
    from drafthead.recipe import Recipe

_PLACE = re.compile(r"(\bdrafthead (?:\w+ )+)RECIPE\b")


class _Console(Console):
    """Puts the recipe's file into the commands of a message. Code that writes messages does not
    know the file and writes RECIPE: "run `drafthead capture RECIPE`"."""

    recipe: Path | None = None
    """The file, once a command has read it."""
    runs = Path("runs")
    """What ``--runs`` names; commands in messages name it too, unless it is this."""

    def forget(self) -> None:
        """Another command begins in this process."""
        self.recipe, self.runs = None, Path("runs")

    def named(self, text: str, markup: bool = False) -> str:
        """``text`` with RECIPE replaced by the recipe's file and ``--runs``."""
        if self.recipe is None:
            return text
        file = shlex.quote(str(self.recipe))
        if self.runs != Path("runs"):
            file += f" --runs {shlex.quote(str(self.runs))}"
        file = escape(file) if markup else file
        return _PLACE.sub(lambda match: match[1] + file, text)

    def print(self, *objects: Any, **options: Any) -> None:
        named = (self.named(o, markup=True) if isinstance(o, str) else o for o in objects)
        super().print(*named, **options)


console = _Console(stderr=True)


def _hide_progress(as_json: bool) -> bool:
    """A program that asks for JSON watches no bar."""
    progress.hide(console, as_json)
    return as_json


def _remember_runs(runs: Path) -> Path:
    console.runs = runs
    return runs


RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
RunsDir = Annotated[
    Path, typer.Option("--runs", callback=_remember_runs, help="Folder of all runs.")
]
AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_hide_progress, help="Print one JSON object on stdout."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace output made with other settings.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the target."),
]
Kind = Annotated[
    str | None, typer.Option(help="Of several kinds of head (head.kind), the only one to do.")
]
Again = Annotated[bool, typer.Option("--again", help="Measure again what is finished.")]


def read_recipe(path: Path) -> "Recipe":
    """The recipe in a file, which messages name from now on."""
    from drafthead.recipe import load_recipe

    console.recipe = path
    return load_recipe(path)


def emit(result: Any, as_json: bool) -> None:
    """A command's result: one JSON object on stdout, or for people on stderr."""
    if as_json:
        # Named in the strings, not in the JSON text, where a file's name would need escapes.
        print(json.dumps(_named(result), ensure_ascii=False))
    elif result is not None:
        console.print_json(json.dumps(result))


def _named(value: Any) -> Any:
    """A JSON-able value with :meth:`_Console.named` applied to each string."""
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    return console.named(value) if isinstance(value, str) else value


def run_stage(
    name: str,
    recipe: "Recipe",
    runs: Path,
    overwrite: bool,
    again: bool = False,
    kind: str | None = None,
) -> dict:
    """Run one stage; returns its summary."""
    from drafthead.run import execute

    summaries = execute(
        recipe,
        runs,
        first=name,
        last=name,
        kind=kind,
        overwrite=overwrite,
        again=again,
        console=console,
    )
    return summaries[name]


def one_stage(
    name: str,
    recipe: "Recipe",
    runs: Path,
    overwrite: bool,
    as_json: bool,
    again: bool = False,
    kind: str | None = None,
) -> None:
    """Run one stage and tell its summary."""
    emit(run_stage(name, recipe, runs, overwrite, again, kind), as_json)
