"""The pages of the documentation that are not typed: commands, recipe, what lies in the root.

A hook of MkDocs (`hooks:` in mkdocs.yml). The command line and the recipe's schema are the only
source of their own reference.
"""

import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from drafthead.cli import app
from drafthead.recipe import Recipe
from drafthead.vllm_plugin import registry

ROOT = Path(__file__).resolve().parent.parent


def commands(group: Any = None, prefix: str = "drafthead") -> dict[str, Any]:
    """Every command by its full name (`drafthead states check`), in the order of the help."""
    group = group or typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        found |= commands(command, full) if hasattr(command, "commands") else {full: command}
    return found


def sections(model: type[BaseModel] = Recipe) -> dict[str, type[BaseModel]]:
    """The recipe's sections by their names; `prompts.sources` is the one that lies deeper."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = field.annotation
            for inner, value in field.annotation.model_fields.items():
                for part in get_args(value.annotation):
                    if isinstance(part, type) and issubclass(part, BaseModel):
                        found[f"{name}.{inner}"] = part
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _option_rows(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
            need = "needed" if parameter.required else "may be left out"
            rows.append(f"| `{name}` | {_cell(parameter.help or '')} | {need} |")
        elif parameter.name != "help" and not parameter.hidden:
            names = ", ".join(f"`{opt}`" for opt in parameter.opts)
            default = parameter.default
            if parameter.required:
                shown = "needed"
            elif default in (None, False, [], ()) or callable(default):
                shown = ""
            else:
                shown = f"`{getattr(default, 'value', default)}`"
            rows.append(f"| {names} | {_cell(parameter.help or '')} | {shown} |")
    return rows


def cli_page() -> str:
    """Each command with its arguments, options and example, as the command line itself has them."""
    lines = [
        "# Commands",
        "",
        "Exit codes: 0 done, 1 the claim failed (not lossless, broken states), 2 the input or the",
        "environment is wrong, 130 stopped by Ctrl-C. With `--json` a command prints one object on",
        'stdout, `{"error": …}` if it failed; what people read goes to stderr.',
        "",
    ]
    for name, command in commands().items():
        lines += [f"## {name}", "", command.help.strip(), ""]
        if command.epilog:
            lines += ["```sh", command.epilog.removeprefix("Example: "), "```", ""]
        lines += ["| argument | meaning | default |", "|---|---|---|", *_option_rows(command), ""]
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    """A field's type in words that fit YAML, its limits included."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [item for field in args[1:] for item in getattr(field, "metadata", [field])]
        return ", ".join(filter(None, [_type(args[0]), _limits(limits)]))
    if annotation is type(None):
        return "null"
    if origin is None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return "mapping"
        names = {str: "text", int: "integer", float: "number", bool: "true or false"}
        return names.get(annotation, str(annotation))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_type(args[0])}s"
    if origin is dict:
        return "mapping"
    return " or ".join(_type(part) for part in args)


def _limits(metadata: list[Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = []
    for item in metadata:
        for key, word in words.items():
            if (limit := getattr(item, key, None)) is not None:
                found.append(f"{word} {limit:g}")
        if (least := getattr(item, "min_length", None)) is not None:
            found.append(f"at least {least} of them")
    return ", ".join(found)


def _default(field: Any) -> str:
    if field.is_required():
        return "**needed**"
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def recipe_page() -> str:
    """Every section and key of the recipe with type, limits, default and its reason."""
    lines = [
        "# Recipe",
        "",
        "A recipe is one YAML file that describes a whole run. Unknown or misspelt keys are",
        "refused, with the nearest right one. `drafthead init TARGET` writes one with every key",
        "and its comment; only `name`, `target` and `prompts` are needed. Paths are relative to",
        "the folder that drafthead is run from. None in a meaning is YAML's `null`.",
        "",
        f"`name`: {Recipe.model_fields['name'].description}",
        "",
        f"`for_kind`: {_cell(Recipe.model_fields['for_kind'].description or '')}",
        "",
    ]
    for name, section in sections().items():
        lines += [f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            kind = ", ".join(filter(None, [_type(field.annotation), _limits(field.metadata)]))
            lines.append(
                f"| `{key}` | {_cell(kind)} | {_cell(_default(field))} "
                f"| {_cell(field.description or '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def vllm_page() -> str:
    """The plugin's table of patches: for whom each is, and which vLLM needs it."""
    known = [f"{major}.{minor}" for major, minor in registry.VERSIONS]
    columns = ["patch", "for whom", "without it", "device", *known]
    lines = [
        "# Which vLLM",
        "",
        f"drafthead's plugin was written for vLLM {known[0]}, which the extras `[cuda]` and",
        f"`[cpu]` install. It was checked against the Python files of {' and '.join(known[1:])}",
        "too, but no answers were proved there yet: run `drafthead verify` before you trust it.",
        "",
        "The plugin patches these faults of vLLM. Where a fault can be provoked without an engine,",
        "the plugin tries it and patches what is broken, whatever the version. Otherwise the",
        "version decides. `drafthead doctor` prints how each patch stands with the vLLM that is",
        "installed, and `drafthead verify` writes what is not protected into its proof. Under a",
        "version that is not in this table a patch for correctness is applied if its place in vLLM",
        "is unchanged, and a warning says that it is unproved; one that only saves time is left",
        f"out. The environment variable `{registry.SKIP}` leaves patches out, by name.",
        "",
        "[Upstream reports](../upstream/README.md) have symptom, cause and reproduction of each.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in registry.TABLE:
        needed = ("needed" if release in row.versions else "" for release in registry.VERSIONS)
        cells = (f"`{row.name}`", row.concerns, row.without, row.device, *needed)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def root_page(name: str) -> str:
    """A Markdown file of the repository's root, as a page: its links to docs/ made to fit."""
    return re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "reference/cli.md": cli_page(),
        "reference/recipe.md": recipe_page(),
        "reference/which-vllm.md": vllm_page(),
        "contributing.md": root_page("CONTRIBUTING.md"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files
