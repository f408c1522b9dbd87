"""One typed description of a whole run: its schema, and how it is read."""

from drafthead.recipe.read import load_recipe, parse_recipe, with_options
from drafthead.recipe.schema import (
    ENOUGH_STEPS,
    KEYS_OF_KIND,
    CaptureSection,
    HeadSection,
    Loss,
    PromptsSection,
    Recipe,
    Source,
    TargetSection,
    TrainSection,
    VocabSection,
)
from drafthead.recipe.secrets import without_paths, without_secrets

__all__ = [
    "ENOUGH_STEPS",
    "KEYS_OF_KIND",
    "CaptureSection",
    "HeadSection",
    "Loss",
    "PromptsSection",
    "Recipe",
    "Source",
    "TargetSection",
    "TrainSection",
    "VocabSection",
    "load_recipe",
    "parse_recipe",
    "with_options",
    "without_paths",
    "without_secrets",
]
