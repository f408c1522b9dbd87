"""The stage `train` of a run."""

from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from drafthead.capture.online import open_states
from drafthead.errors import DraftheadError
from drafthead.head.checkpoint import load_head
from drafthead.head.formats import Provenance
from drafthead.head.init import new_head
from drafthead.head.model import Eagle3Head
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.states import Samples
from drafthead.targets import Target, recipe_target
from drafthead.train.loop import Task, fit
from drafthead.train.losses import Teacher
from drafthead.train.parallel import World


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
        task = make_task(recipe, run, target)
        try:
            return fit(task, run.train, world, console)
        finally:
            task.reader.close()
    finally:
        world.leave()


def make_task(recipe: Recipe, run: RunDir, target: Target) -> Task:
    """What a recipe asks to be trained, on the states and the vocabulary of its run."""
    reader = open_states(recipe, run)
    if reader.meta.hidden_size != target.hidden_size:
        raise DraftheadError(
            f"{reader.path}: states of width {reader.meta.hidden_size}, the target {target.path} "
            f"has {target.hidden_size}: they are of another target; capture again"
        )
    embedding = None
    if recipe.train.start_from:
        head, embedding = _given_head(Path(recipe.train.start_from), reader.aux_layers, target)
    else:
        head = _new_head(recipe, run, reader, target)
    if recipe.train.loss == "ce+smoothl1" and head.config.hidden_size != target.hidden_size:
        raise DraftheadError(
            f"recipe: train.loss ce+smoothl1 compares the states of head and target, which are "
            f"{head.config.hidden_size} and {target.hidden_size} wide; use `kl`"
        )
    weight, eps = target.final_norm()
    teacher = Teacher(weight, eps, target.lm_head()[head.target_ids()])
    return Task(
        head=head,
        embedding=target.embedding() if embedding is None else embedding,
        teacher=teacher,
        reader=reader,
        settings=recipe.train.model_copy(update={"ttt_steps": recipe.ttt_steps}),
        k=recipe.serve.k,
        provenance=Provenance(recipe.target.path, target.fingerprint, target.architectures),
        own_embedding=embedding is not None,
        name=recipe.name,
    )


def _new_head(recipe: Recipe, run: RunDir, reader: Samples, target: Target) -> Eagle3Head:
    path = run.vocab / "vocab.safetensors"
    if not path.exists():
        raise DraftheadError(f"{path}: no draft vocabulary; run `drafthead vocab` first")
    d2t = load_file(path)["d2t"]
    return new_head(recipe.head, target, reader.aux_layers, d2t, recipe.train.seed)


def check_start(recipe: Recipe) -> None:
    """Whether the head to go on from, if any, fits the run: looked at before what was trained is
    thrown away.

    Raises:
        DraftheadError: it cannot be read, or is of another target or other layers.
    """
    if recipe.train.start_from:
        target = recipe_target(recipe)
        layers = recipe.head.aux_layers or recipe.capture.aux_layers
        _given_head(Path(recipe.train.start_from), target.check_aux_layers(layers), target)


def _given_head(
    folder: Path, aux_layers: tuple[int, ...], target: Target
) -> tuple[Eagle3Head, Tensor | None]:
    """A head of either format to go on from, and its own embedding if it has one."""
    loaded = load_head(folder, target)
    config = loaded.head.config
    for name, found, wanted in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("aux layers", tuple(config.aux_layer_ids), aux_layers),
    ):
        if found != wanted:
            raise DraftheadError(
                f"{folder}: its {name} is {found}, the states and target of this run have "
                f"{wanted}" + ("; set head.aux_layers" if name == "aux layers" else "")
            )
    return loaded.head.float(), loaded.embedding


def from_head(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with `train.start_from` set: `drafthead train --from HEAD`."""
    if folder is None:
        return recipe
    section = recipe.train.model_copy(update={"start_from": str(folder)})
    return recipe.model_copy(update={"train": section})
