"""The stage `train` of a run."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drafthead.capture.online import open_states
from drafthead.drafters import DRAFTERS, Drafter, drafter_of
from drafthead.errors import DraftheadError
from drafthead.head.checkpoint import head_folder, trained_steps
from drafthead.head.formats import Provenance
from drafthead.ops.losses import Teacher
from drafthead.progress import waiting
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.states import StateReader
from drafthead.states.dataset import chosen_layers
from drafthead.targets import Target, captured_layers, recipe_target
from drafthead.train.loop import Task, fit
from drafthead.train.parallel import World, check
from drafthead.train.plan import Plan


def train(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: train the head on the run's states for the vocabulary in `run.vocab`.

    Under torchrun all its processes train together. Leaves in `run.train` what `loop.fit` says,
    `best/` being the head. Returns `best.json`.

    Raises:
        DraftheadError: states, vocabulary and target do not fit together, or training failed.
    """
    target = recipe_target(recipe)
    world = World.join()
    try:
        with waiting(console, "reading states, target and the head to start from"):
            task = make_task(recipe, run, target)
        try:
            result = fit(task, run.train, world, console)
            for note in task.reader.notes():
                console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
            return result
        finally:
            task.reader.close()
    finally:
        world.leave()


def make_task(recipe: Recipe, run: RunDir, target: Target) -> Task:
    """The training job of a recipe, on the states and the vocabulary of its run."""
    try:
        reader = open_states(recipe, run)
    except DraftheadError:
        _check_states(recipe, run)
        raise
    if reader.meta.hidden_size != target.hidden_size:
        raise DraftheadError(
            f"{reader.path}: states of width {reader.meta.hidden_size}, the target {target.path} "
            f"has {target.hidden_size}: they are of another target; capture again"
        )
    head, embedding = _first_head(recipe, run, reader.aux_layers, target)
    weight, eps = target.final_norm()
    teacher = Teacher(weight, eps, target.lm_head()[head.target_ids()], target.logits)
    return Task(
        drafter=_drafter(recipe),
        head=head,
        embedding=target.embedding() if embedding is None else embedding,
        teacher=teacher,
        reader=reader,
        settings=recipe.train.model_copy(update={"ttt_steps": trained_steps(recipe)}),
        k=recipe.serve.k,
        provenance=Provenance(recipe.target.path, target.fingerprint, target.architectures),
        own_embedding=embedding is not None,
        name=recipe.name,
    )


def check_shape(recipe: Recipe, run: RunDir) -> None:
    """What of the head training would refuse, or the engine later, as far as it is known before
    there are states.

    Raises:
        DraftheadError: there is no head to start from, none of that shape can be made, or it cannot
            draft as many tokens a step as the recipe says.
    """
    target = recipe_target(recipe)
    captured = captured_layers(recipe, target)
    layers = chosen_layers(run.states, captured, recipe.head.aux_layers)
    drafter = _drafter(recipe)
    if start := recipe.train.start_from:
        folder = head_folder(start)
        config = drafter.read(folder, target)
        _check_given(folder, config, layers, target)
    else:
        config = drafter.shape(recipe.head, target, layers, recipe.vocab.size)
    most = drafter.most_drafts(config)
    for name, ks in (
        ("serve", [recipe.serve.num_speculative_tokens or 1]),
        ("verify", recipe.verify.num_speculative_tokens or [1]),
        ("bench", recipe.bench.num_speculative_tokens or [1]),
    ):
        if max(ks) > most:
            field = f"{name}.num_speculative_tokens"
            raise DraftheadError(
                f"{field}: {max(ks)} drafts a step, and the head drafts blocks of {most}; lower "
                "it, or raise head.block_size",
                field=field,
            )


def _drafter(recipe: Recipe) -> Drafter:
    """The kind of head that the recipe asks for.

    Raises:
        DraftheadError: the head to start from is of another.
    """
    kind = recipe.head.only_kind
    start = recipe.train.start_from
    if start and (other_kind := drafter_of(head_folder(start)).kind) != kind:
        raise DraftheadError(
            f"train.start_from: {start} is a head of kind {other_kind}, and head.kind is {kind}; "
            f"set head.kind: {other_kind}",
            field="head.kind",
        )
    return DRAFTERS[kind]


def check_start(recipe: Recipe, run: RunDir) -> None:
    """Check now for mistakes that training would find only after the previous training was deleted.

    Raises:
        DraftheadError: there are no states or no head to start from, this machine cannot train it
            so, or the states do not fill one step.
    """
    target = recipe_target(recipe)
    captured = captured_layers(recipe, target)
    layers = chosen_layers(run.states, captured, recipe.head.aux_layers)
    _first_head(recipe, run, layers, target)
    world, train = World.of_environment(), recipe.train
    rows_per_step = train.rows_per_step or world.size
    check(train, rows_per_step, world)
    _check_states(recipe, run)
    if recipe.capture.mode != "online":
        with contextlib.closing(StateReader(run.states)) as reader:
            Plan.make(reader, train.epochs, train.row_tokens, rows_per_step, train.seed)


def _check_states(recipe: Recipe, run: RunDir) -> None:
    """Look for what was captured. If it is gone, deleted for its disk, capture is no longer done:
    else the command that the error names would find nothing to do."""
    if recipe.capture.mode == "online":
        return
    try:
        StateReader(run.states).close()
    except DraftheadError:
        run.forget("capture")
        raise


def _first_head(
    recipe: Recipe, run: RunDir, aux_layers: tuple[int, ...], target: Target
) -> tuple[Any, Tensor | None]:
    """The head that training starts from, and its own embedding if it has one."""
    embedding = None
    if recipe.train.start_from:
        start = head_folder(recipe.train.start_from)
        if start.resolve().is_relative_to(run.root.resolve()):
            raise DraftheadError(
                f"{start}: is this run's own output, which it will replace; copy the head "
                "elsewhere and start from the copy"
            )
        head, embedding = _drafter(recipe).load(start, target)
        _check_given(start, head.config, aux_layers, target)
        _extend(head, target)
        head = head.float()
    else:
        path = run.vocab / "vocab.safetensors"
        try:
            d2t = load_file(path)["d2t"]
        except (OSError, SafetensorError, KeyError) as error:
            run.forget("vocab")
            raise DraftheadError(
                f"{path}: no draft vocabulary ({error}); `drafthead vocab RECIPE` makes one"
            ) from None
        new = _drafter(recipe).new
        head = new(recipe.head, target, aux_layers, d2t, recipe.train.seed)
    if recipe.train.loss == "ce+smoothl1" and head.config.hidden_size != target.hidden_size:
        raise DraftheadError(
            f"recipe: train.loss ce+smoothl1 compares the states of head and target, which are "
            f"{head.config.hidden_size} and {target.hidden_size} wide; use `kl`"
        )
    return head, embedding


def _extend(head: Any, target: Target) -> None:
    """Let a head go as far as the target: no weight depends on where it ends, and vLLM drafts
    nothing beyond."""
    config, reach = head.config, {"max_position_embeddings": target.max_position_embeddings}
    if config.max_position_embeddings < target.max_position_embeddings:
        changed = config.model_copy(update=reach) if isinstance(config, BaseModel) else None
        head.config = changed or replace(config, **reach)


def _check_given(folder: Path, config: Any, aux_layers: tuple[int, ...], target: Target) -> None:
    """Refuse a head for another target's states, or for those of other layers."""
    for name, value, expected in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("aux layers", tuple(config.aux_layer_ids), aux_layers),
    ):
        if value != expected:
            raise DraftheadError(
                f"{folder}: its {name} is {value}, the states and target of this run have "
                f"{expected}" + ("; set head.aux_layers" if name == "aux layers" else "")
            )


def from_head(recipe: Recipe, head: str | None) -> Recipe:
    """The recipe with `train.start_from` set: `drafthead train --from HEAD`."""
    if head is None:
        return recipe
    section = recipe.train.model_copy(update={"start_from": head})
    return recipe.model_copy(update={"train": section})
