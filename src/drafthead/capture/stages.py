"""The stages `generate` and `capture` of a run, each with its engine in a process of its own.

A process per engine gives all memory back for certain, keeps what vLLM does to its process away
from training, and keeps what it prints out of the way.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import generate_units, prefill_units
from drafthead.capture.plan import WorkPlan, make_plan
from drafthead.data.answers import part_path, read_answers, read_left_out
from drafthead.errors import DraftheadError
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states.index import unit_path
from drafthead.states.reader import StateReader
from drafthead.states.writer import open_store


def generate(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: the target answers every prompt into ``run.answers``; with ``capture.mode: generate``
    its states go to ``run.states`` in the same pass.

    Returns:
        Counts of answers, tokens, and what was left out.

    Raises:
        DraftheadError: wrong input, a failed check, a full disk, or the engine died.
    """
    plan = make_plan(recipe)
    if not all(part_path(run.answers, unit).exists() for unit in range(len(plan.units))):
        _in_child("generate", plan, run, console)
    answers = list(read_answers(run.answers))
    too_long = read_left_out(run.answers)
    for reason, names in too_long.items():
        console.print(
            f"[yellow]left out {len(names)} conversations: {reason} "
            f"({', '.join(names[:5])}{', …' if len(names) > 5 else ''})[/yellow]"
        )
    if not any(answer.split == "train" for answer in answers):
        raise DraftheadError(
            f"{run.answers}: no answer to train on; every prompt was left out ({too_long})"
        )
    return {
        "conversations": len(answers),
        "heldout": sum(answer.split == "heldout" for answer in answers),
        "prompt_tokens": sum(len(answer.prompt_ids) for answer in answers),
        "answer_tokens": sum(len(answer.answer_ids) for answer in answers),
        "ended": sum(answer.finish_reason == "stop" for answer in answers),
        "left_out": plan.left_out | {reason: len(names) for reason, names in too_long.items()},
    }


def capture(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Stage: the states of every answer in ``run.states``, checked. What ``generate`` captured is
    only looked at; what is missing is captured in a pass of its own.

    Returns:
        Counts, bytes, and the share of greedily served tokens that the states explain.

    Raises:
        DraftheadError: as ``generate``.
    """
    plan = make_plan(recipe)
    open_store(run.states, plan.meta)
    if not all(unit_path(run.states, unit).exists() for unit in range(len(plan.units))):
        _in_child("capture", plan, run, console)
    reader = StateReader(run.states)
    checked = sum(unit.checks.get("greedy_checked", 0) for unit in reader.units)
    agree = sum(unit.checks.get("greedy_agree", 0) for unit in reader.units)
    return {
        "samples": len(reader),
        "tokens": int(reader.states.sum()),
        "bytes": sum(shard.bytes for shard in reader.shards),
        "bytes_per_token": reader.meta.bytes_per_token,
        "layers": list(reader.meta.layers),
        "format": reader.meta.encoding,
        "greedy_checked": checked,
        "greedy_agreement": agree / checked if checked else None,
    }


def _work(stage: str, plan: WorkPlan, run: RunDir, report: Callable[[dict], None]) -> None:
    """Do a stage's work in this process."""
    units = range(len(plan.units))
    one_pass = plan.recipe.capture.mode == "generate"
    if stage == "generate":
        states = run.states if one_pass else None
        if states is not None:
            open_store(states, plan.meta)
        generate_units(
            plan,
            run.answers,
            states,
            units,
            lambda: CaptureEngine(plan.recipe, plan.target, plan.meta, states),
            report,
        )
    else:
        prefill_units(
            plan,
            run.answers,
            run.states,
            units,
            lambda: CaptureEngine(plan.recipe, plan.target, plan.meta, run.states),
            report,
        )


def _in_child(stage: str, plan: WorkPlan, run: RunDir, console: Console) -> None:
    """Run ``_work`` in a process of its own and show its progress.

    What the engine prints goes to ``run.root/logs``; errors quote its end.
    """
    log = run.root / "logs" / f"{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    order = {"stage": stage, "recipe": plan.recipe.model_dump(mode="json"), "run": str(run.root)}
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "drafthead.capture.stages"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        with _progress(console) as progress:
            total = sum(len(unit) for unit in plan.units)
            bar = progress.add_task(stage, total=total, tokens=0)
            tokens = 0
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise DraftheadError(message["error"])
                tokens += message.get("tokens", 0)
                if "tokens" in message:
                    progress.update(bar, advance=1, tokens=tokens)
        if process.wait() != 0:
            with log.open("rb") as file:
                file.seek(begin)
                tail = file.read()[-16384:].decode(errors="replace").splitlines()[-15:]
            raise DraftheadError(
                f"{stage}: the vLLM process died (exit code {process.returncode}); the end of "
                f"{log}:\n" + "\n".join(f"  {line}" for line in tail)
            )
    finally:
        process.stdin.close()  # the child ends itself, and all that it started, when this closes
        process.stdout.close()
        process.wait()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} conversations"),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """The child's side: an order on stdin, progress as JSON lines on stdout. stdin closes when
    the parent ends, however it ends; then this ends too."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints to stdout; that goes to the log

    def report(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        plan = make_plan(parse_recipe(order["recipe"], "recipe"))
        _work(order["stage"], plan, RunDir(Path(order["run"])), report)
    except DraftheadError as error:
        report({"error": str(error)})
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
