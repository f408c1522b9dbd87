"""A recipe for heads of several kinds, as one recipe and one place in the run's folder for each.

Of one kind both are as they always were. Of several, answers, states and draft vocabulary lie in
the run's folder, and what is made of them for each kind in a folder of that name within it.
"""

from pathlib import Path
from typing import Any

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.errors import DraftheadError
from drafthead.head.checkpoint import head_folder
from drafthead.recipe import KEYS_OF_KIND, Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.targets import Target, captured_layers, recipe_target

Jobs = dict[str, tuple[Recipe, RunDir]]
"""By kind: the recipe of that head alone, and where it is made."""


def each_kind(recipe: Recipe, runs: Path, kind: str | None = None) -> Jobs:
    """The job of each kind that the recipe asks for; with `kind`, of that one.

    Raises:
        DraftheadError: a kind that is not known or, with `kind`, not asked for; with several
            kinds, what one of them cannot be made with.
    """
    run, kinds = RunDir(runs / recipe.name), recipe.head.kinds
    if unknown := [name for name in kinds if name not in DRAFTERS]:
        raise DraftheadError(
            f"recipe: head.kind: {unknown[0]!r:.80}: no such kind of head; there are "
            f"{', '.join(DRAFTERS)}",
            field="head.kind",
        )
    if kind is not None and kind not in kinds:
        raise DraftheadError(
            f"--kind {kind}: the recipe makes heads of kind {', '.join(kinds)} (head.kind)",
            field="head.kind",
        )
    if len(kinds) == 1:
        return {kinds[0]: (recipe, run)}
    target = recipe_target(recipe)
    jobs = {name: (_of_kind(recipe, name, target), run.of_kind(name)) for name in kinds}
    return jobs if kind is None else {kind: jobs[kind]}


def _of_kind(recipe: Recipe, kind: str, target: Target) -> Recipe:
    """The recipe of one of its kinds: its own settings, and its columns of the states of all."""
    data: dict[str, Any] = recipe.model_dump(mode="json")
    changes = data.pop("for_kind").get(kind, {})
    captured = captured_layers(recipe, target)
    data["capture"]["aux_layers"] = list(captured)
    data["head"]["kind"] = kind
    # What only another kind has.
    for name in {name for other in KEYS_OF_KIND for name in KEYS_OF_KIND[other] if other != kind}:
        section, _, key = name.partition(".")
        del data[section][key]
    start = data["train"]["start_from"]
    if start and drafter_of(head_folder(start)).kind != kind:
        data["train"]["start_from"] = None
    usual = target.default_aux_layers()
    if kind == "eagle3" and data["head"]["aux_layers"] is None and {*usual} <= {*captured}:
        data["head"]["aux_layers"] = list(usual)
    for section, given in changes.items():
        data[section] |= given
    return parse_recipe(data, f"for_kind.{kind}")
