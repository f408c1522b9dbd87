"""Training many heads on one store."""

from dataclasses import replace

from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.states import StateReader
from drafthead.targets import Target
from drafthead.train.loop import Task
from drafthead.train.stage import make_task


def unverified_task(recipe: Recipe, run: RunDir, target: Target) -> Task:
    """What the recipe asks to be trained. Shards are not verified again for each of many heads: it
    would take longer than training one."""
    reader = StateReader(run.states, verify=False, aux_layers=recipe.head.aux_layers)
    return replace(make_task(recipe, run, target), reader=reader)
