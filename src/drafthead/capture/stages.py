"""The stages `generate` and `capture` of a run, each with its engine in a child process."""

import itertools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from drafthead.capture.checks import FIXES, check_share
from drafthead.capture.cluster import spread
from drafthead.capture.generate import answers_in, work
from drafthead.capture.plan import WorkPlan, make_plan
from drafthead.data.answers import Answer, part_path, read_answers, read_left_out
from drafthead.data.chats import count_left_out
from drafthead.errors import DraftheadError
from drafthead.fsio import keep_hashes
from drafthead.process import Child, child_main
from drafthead.progress import progress, waiting
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StoreMeta
from drafthead.states.index import unit_path
from drafthead.states.reader import StateReader
from drafthead.states.remote import Location, fetch_store
from drafthead.states.writer import open_store


def check_prompts(recipe: Recipe, run: RunDir) -> None:
    """Check now what ``generate`` would find only after it has deleted earlier answers.

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
            f"{run.answers}: {len(strange)} answers ({strange[0]}, …) belong to other prompts "
            "than the recipe's, or to another split; delete that folder, or give this run another "
            "name"
        )
    left_out = read_left_out(run.answers)
    _print_left_out(left_out, plan, console)
    unusable = {reason: names for reason, names in left_out.items() if reason in FIXES}
    _check_unusable(unusable, len(answers), plan)
    _check_lengths(answers, left_out, run)
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
    answered = {answer.conversation for answer in read_answers(run.answers)}
    unusable = _unusable(reader, answered)
    _print_left_out(unusable, plan, console)
    _check_unusable(unusable, len(reader), plan)
    checked = sum(unit.checks.get("greedy_checked", 0) for unit in reader.units)
    agree = sum(unit.checks.get("greedy_agree", 0) for unit in reader.units)
    return _summary(
        reader.meta,
        samples=len(reader),
        tokens=int(reader.states.sum()),
        bytes_=sum(shard.bytes for shard in reader.shards),
    ) | {"greedy_checked": checked, "greedy_agreement": agree / checked if checked else None}


def _print_left_out(left_out: dict[str, list[str]], plan: WorkPlan, console: Console) -> None:
    """Name the conversations that are left out, by reason."""
    labels = plan.labels
    for reason, names in left_out.items():
        examples = "; ".join(labels.get(name, name) for name in names[:3])
        examples += "; …" * (len(names) > 3)
        note = f"left out {len(names)} conversations: {reason} ({examples})"
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)


def _unusable(reader: StateReader, answered: set[str]) -> dict[str, list[str]]:
    """Reason -> conversations that have an answer and no usable states."""
    left_out: dict[str, list[str]] = {}
    for unit in reader.units:
        for reason, names in unit.checks.get("left_out", {}).items():
            left_out.setdefault(reason, []).extend(name for name in names if name in answered)
    return {reason: names for reason, names in left_out.items() if names}


def _check_unusable(unusable: dict[str, list[str]], usable: int, plan: WorkPlan) -> None:
    conversations = usable + sum(map(len, unusable.values()))
    share = plan.recipe.capture.max_unusable
    check_share(unusable, conversations, share, plan.labels, more_to_come=False)


def _check_lengths(answers: list[Answer], left_out: dict[str, list[str]], run: RunDir) -> None:
    """Check that both splits have an answer that is long enough.

    Raises:
        DraftheadError: one has none.
    """
    sides = {
        "to train on": (answer.teaches for answer in answers if answer.split == "train"),
        "held out": (len(a.answer_ids) > 1 for a in answers if a.split == "heldout"),
    }
    for side, long_enough in sides.items():
        if not any(long_enough):
            reasons = ", ".join(f"{len(names)}: {reason}" for reason, names in left_out.items())
            raise DraftheadError(
                f"{run.answers}: no answer of two tokens or more {side} ({len(answers)} answers; "
                f"left out: {reasons or 'none'}); take other prompts, raise prompts.heldout, or "
                "look at what ends the target's answers (`eos_token_id`, the chat template)"
            )


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
                "cluster.location and cluster.workers need a cluster, and "
                "none is named: set cluster.address, or give --ray ADDRESS"
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
    """Run ``work`` in a child process and show its progress."""
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
        messages, finished = child.messages(), answers_in(stage, plan, done)
        with waiting(console, "starting the engine"):
            for message in itertools.takewhile(lambda message: "ready" not in message, messages):
                finished += message.get("answers", 0)  # of units that a kill had left captured
        with progress(console, stage, total, finished, unit="answers") as bar:
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
