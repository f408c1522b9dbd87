"""Reading a recipe: each mistake is named with its file and field, and the nearest right key."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from drafthead.errors import DraftheadError
from drafthead.fsio import shortened
from drafthead.recipe.schema import Recipe, Source


def _nearest(location: tuple, found: str) -> str:
    """Suggest the known key closest to a misspelt one, in the section where it stands."""
    model: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if part == "sources":
            annotation = Source
        model = annotation
    names = list(getattr(model, "model_fields", {}))
    elsewhere = [
        name
        for name, field in Recipe.model_fields.items()
        if found in getattr(field.annotation, "model_fields", {})
    ]
    if len(elsewhere) == 1:
        return f"did you mean `{elsewhere[0]}.{found}`?"
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(names)}"


_PLAIN = {
    "bool_type": "should be `true` or `false`",
    "bool_parsing": "should be `true` or `false`",
    "int_type": "should be a whole number, such as `2`",
    "int_parsing": "should be a whole number, such as `2`",
    "int_from_float": "should be a whole number, such as `2`",
    "float_type": "should be a number, such as `0.5`",
    "float_parsing": "should be a number, such as `0.5`",
    "too_short": "should have at least one entry",
    "string_too_short": "should not be empty",
}
"""What a field should be, by the type of pydantic's error, where pydantic's words are Python's."""
_PATTERNS = {
    "name": "should be letters, digits, `.`, `_` and `-`, the first one a letter or a digit",
    "repo": "should be `OWNER/NAME`",
}


def _shape(item: Any) -> str:
    """Describe the expected type of a field and how to write it. ``item`` is one of pydantic's
    errors."""
    kind, value, key = item["type"], item["input"], item["loc"][-1] if item["loc"] else ""
    if value == "None":
        return "should be `null`, YAML's word for Python's None"
    scalar = isinstance(value, int | float | str) and not isinstance(value, bool)
    if kind in ("list_type", "tuple_type") and value is not None:
        entries: list[Any] = [{"path": value} if key == "sources" and scalar else value]
        if isinstance(value, str) and re.fullmatch(r"[\d., ]+", value):  # 1,3 was meant as numbers
            entries = yaml.safe_load(f"[{value}]")
        written = yaml.safe_dump(entries, default_flow_style=True, width=1000).strip()
        return f"should be a list: write `{written}`"
    if kind in ("model_type", "dict_type"):
        if scalar and ("sources" in item["loc"] or key == "target"):
            return f"should be a mapping: write `{{path: {value}}}`"
        return "should be a mapping (`key: value` lines)"
    if kind == "string_type" and scalar:
        return f'should be a text: write `"{value}"`'
    if kind == "string_pattern_mismatch" and key in _PATTERNS:
        return _PATTERNS[key]
    words = item["msg"].removeprefix("Value error, ")  # a check of the schema's own
    return _PLAIN.get(kind) or words.replace("Input should be", "should be")


def parse_recipe(data: Any, where: str) -> Recipe:
    """Check a recipe that is already read; ``where`` names it in errors.

    Raises:
        DraftheadError: one line for each wrong field.
    """
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise DraftheadError(
            f"{where}: a recipe is a mapping of sections (name, target, prompts, …), found {kind}"
        )
    # A section whose keys are all commented out is null in YAML; its defaults are meant.
    given = {key: value for key, value in data.items() if value is not None}
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"]) or "recipe"
            if item["type"] == "extra_forbidden":
                lines.append(
                    f"{where}: unknown key `{field}`; {_nearest(item['loc'], str(item['loc'][-1]))}"
                )
            elif item["type"] == "missing":
                lines.append(f"{where}: `{field}` is missing; add it")
            else:
                lines.append(
                    f"{where}: `{field}`: {_shape(item)}, found {shortened(item['input'])}"
                )
        raise DraftheadError("\n".join(lines)) from None


def with_options(recipe: Recipe, section: str, options: dict[str, Any]) -> Recipe:
    """The recipe with fields of one section replaced by what a command line gives.

    Args:
        recipe: the recipe.
        section: the section's name.
        options: value by field; None leaves the recipe's.

    Raises:
        DraftheadError: a value that the field does not take.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return recipe
    data = recipe.model_dump(mode="json")
    data[section] |= given
    return parse_recipe(data, "command line")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice: YAML itself would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if (first := seen.get(str(key.value))) is not None:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is written twice, here and in line {first}; keep one",
                    problem_mark=key.start_mark,
                )
            seen[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe. Relative file paths in it are relative to the folder it is run from.

    Raises:
        DraftheadError: no such file, not YAML, or a wrong field.
    """
    path = Path(path)
    try:
        # utf-8-sig: editors on Windows put a mark before the first line
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except FileNotFoundError:
        raise DraftheadError(
            f"{path}: no such recipe; `drafthead init TARGET` writes one, examples lie in recipes/"
        ) from None
    except IsADirectoryError:
        raise DraftheadError(f"{path}: is a folder; a recipe is a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DraftheadError(
            f"{path}: cannot be read ({error}); a recipe is a YAML file in UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise DraftheadError(f"{path}: not YAML: {error}") from error
    return parse_recipe(data, str(path))
