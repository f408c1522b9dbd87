"""The stages `generate` and `capture` of a run, each with its engine in a process of its own."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from drafthead.capture.child import Child, child_main
from drafthead.capture.cluster import spread
from drafthead.capture.plan import WorkPlan, make_plan
from drafthead.capture.work import answers_in, work
from drafthead.data.answers import part_path, read_answers, read_left_out
from drafthead.data.chats import count_left_out
from drafthead.errors import DraftheadError
from drafthead.fsio import keep_hashes
from drafthead.progress import progress, waiting
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StoreMeta
from drafthead.states.index import unit_path
from drafthead.states.reader import StateReader
from drafthead.states.remote import Location, fetch_store
from drafthead.states.writer import open_store


def check_prompts(recipe: Recipe, run: RunDir) -> None:
    """What ``generate`` would find only once earlier answers are thrown away.

    Raises:
        DraftheadError: target, template, prompts or layers are not usable.
    """
    make_plan(recipe)


def generate(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: the target answers every prompt into ``run.answers``; with ``capture.mode: generate``
    its states go to ``run.states`` in the same pass.

    Returns:
        Counts of answers, tokens, and what was left out.

    Raises:
        DraftheadError: wrong input, a failed check, a full disk, the engine died, or answers that
            lay there before are not to these prompts.
    """
    with waiting(console, "reading prompts"):
        plan = make_plan(recipe, run.began("generate"))
    for note in [note for source in plan.sources for note in source.notes()]:
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    if not all(part_path(run.answers, unit).exists() for unit in range(len(plan.units))):
        _do("generate", plan, run, console)
    with waiting(console, "reading the answers", unit="answers") as reading:
        answers = list(reading.each(read_answers(run.answers)))
    split = {chat.id: side for unit in plan.units for chat, side in unit}
    if strange := [a.conversation for a in answers if split.get(a.conversation) != a.split]:
        raise DraftheadError(
            f"{run.answers}: {len(strange)} answers ({strange[0]}, …) are to other prompts than "
            "the recipe's, or held out otherwise; delete that folder, or give this run another name"
        )
    left_out = read_left_out(run.answers)
    where = {chat.id: chat.where for unit in plan.units for chat, _ in unit}
    for reason, names in left_out.items():
        examples = "; ".join(where.get(name, name) for name in names[:3]) + "; …" * (len(names) > 3)
        note = f"left out {len(names)} conversations: {reason} ({examples})"
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    if not any(answer.split == "train" for answer in answers):
        reasons = ", ".join(f"{len(names)}: {reason}" for reason, names in left_out.items())
        raise DraftheadError(
            f"{run.answers}: no answer to train on, every prompt was left out ({reasons}); raise "
            "engine.max_model_len, or take shorter prompts"
        )
    return {
        "conversations": len(answers),
        "heldout": sum(answer.split == "heldout" for answer in answers),
        "prompt_tokens": sum(len(answer.prompt_ids) for answer in answers),
        "answer_tokens": sum(len(answer.answer_ids) for answer in answers),
        "ended": sum(answer.finish_reason == "stop" for answer in answers),
        "left_out": count_left_out(plan.sources)
        | {reason: len(names) for reason, names in left_out.items()},
    }


def capture(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: the states of every answer in ``run.states``, checked. What ``generate`` captured is
    only looked at; what is missing is captured in a pass of its own. With ``capture.mode: online``
    there is nothing to do: training draws them from an engine of its own.

    Returns:
        Counts, bytes, and the share of greedily served tokens that the states explain.

    Raises:
        DraftheadError: as ``generate``.
    """
    with waiting(console, "reading prompts"):
        plan = make_plan(recipe)
    if recipe.capture.mode == "online":
        tokens = [len(answer.ids) - 1 for answer in read_answers(run.answers)]
        return _summary(plan.meta, samples=len(tokens), tokens=sum(tokens), bytes_=0)
    open_store(run.states, plan.meta)
    if not all(unit_path(run.states, unit).exists() for unit in range(len(plan.units))):
        _do("capture", plan, run, console)
    reader = StateReader(run.states)
    checked = sum(unit.checks.get("greedy_checked", 0) for unit in reader.units)
    agree = sum(unit.checks.get("greedy_agree", 0) for unit in reader.units)
    return _summary(
        reader.meta,
        samples=len(reader),
        tokens=int(reader.states.sum()),
        bytes_=sum(shard.bytes for shard in reader.shards),
    ) | {"greedy_checked": checked, "greedy_agreement": agree / checked if checked else None}


def _summary(meta: StoreMeta, *, samples: int, tokens: int, bytes_: int) -> dict:
    return {
        "samples": samples,
        "tokens": tokens,
        "bytes": bytes_,
        "bytes_per_token": meta.bytes_per_token,
        "layers": list(meta.layers),
        "format": meta.encoding,
        "greedy_checked": 0,
        "greedy_agreement": None,
    }


def _do(stage: str, plan: WorkPlan, run: RunDir, console: Console) -> None:
    """A stage's work, on this machine or on the cluster that the recipe names."""
    cluster = plan.recipe.cluster
    if cluster.address is None:
        if cluster.location or cluster.workers:
            raise DraftheadError(
                "cluster.location and cluster.workers are for a cluster, and all of this would be "
                "done here: set cluster.address, or give --ray ADDRESS"
            )
        _in_child(stage, plan, run, console)
        return
    spread(stage, plan, run, console)
    if cluster.location is None:
        return
    location = Location(cluster.location)
    if stage == "generate":
        parts = [part_path(run.answers, unit) for unit in range(len(plan.units))]
        missing = [part for part in parts if not part.exists()]
        with progress(console, "fetching answers", len(missing), unit="units") as bar:
            for part in bar.each(missing):
                location.get(f"answers/{part.name}", part)
    else:
        fetch_store(location, "states", run.states, console)


def _in_child(stage: str, plan: WorkPlan, run: RunDir, console: Console) -> None:
    """Run ``work`` in a process of its own and show its progress."""
    order = {
        "stage": stage,
        "recipe": plan.recipe.model_dump(mode="json"),
        "run": str(run.root),
        "now": plan.template.now.isoformat(),
    }
    child = Child(stage, "drafthead.capture.stages", order, run.root / "logs" / f"{stage}.log")
    units, tokens = range(len(plan.units)), 0
    path_of, folder = (part_path, run.answers) if stage == "generate" else (unit_path, run.states)
    done = [unit for unit in units if path_of(folder, unit).exists()]
    total = answers_in(stage, plan, units)
    try:
        messages = child.messages()
        with waiting(console, "starting the engine"):
            next(messages, None)  # that it is ready
        with progress(console, stage, total, answers_in(stage, plan, done), unit="answers") as bar:
            for message in messages:
                if "doing" in message:
                    bar.advance(0, note=message["doing"])
                elif "answers" in message:
                    tokens += message["tokens"]
                    bar.advance(message["answers"], note=f"{tokens:,} tokens")
    finally:
        child.close()


def _child(order: dict, report: Callable[[dict], None]) -> None:
    run = RunDir(Path(order["run"]))
    keep_hashes(run.root)
    now = datetime.fromisoformat(order["now"])
    plan = make_plan(parse_recipe(order["recipe"], "recipe"), now)
    work(order["stage"], plan, run, range(len(plan.units)), report)


if __name__ == "__main__":
    child_main(_child)
