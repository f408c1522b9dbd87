"""Units of work of a stage: done in this process, and shown as they are."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import generate_units, prefill_units
from drafthead.capture.plan import WorkPlan
from drafthead.rundir import RunDir
from drafthead.states.writer import open_store


def work(
    stage: str, plan: WorkPlan, run: RunDir, units: Iterable[int], report: Callable[[dict], None]
) -> None:
    """Do units of a stage in this process."""
    one_pass = stage == "generate" and plan.recipe.capture.mode == "generate"
    states = run.states if one_pass or stage == "capture" else None
    if states is not None:
        open_store(states, plan.meta)

    def start() -> CaptureEngine:
        return CaptureEngine(plan.recipe, plan.target, plan.meta, states)

    if stage == "generate":
        generate_units(plan, run.answers, states, units, start, report)
    else:
        prefill_units(plan, run.answers, run.states, units, start, report)


@contextlib.contextmanager
def progress_bar(
    stage: str, plan: WorkPlan, console: Console
) -> Iterator[Callable[[int, int], None]]:
    """Shows how many conversations are done, and their tokens; yields what counts them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} conversations"),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    tokens = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(stage, total=sum(map(len, plan.units)), tokens=0)

        def advance(conversations: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            progress.update(bar, advance=conversations, tokens=tokens)

        yield advance
