"""Units of work of a stage, done in this process."""

from collections.abc import Callable, Iterable

from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import generate_units, prefill_units
from drafthead.capture.plan import WorkPlan
from drafthead.rundir import RunDir
from drafthead.states.writer import open_store


def work(
    stage: str, plan: WorkPlan, run: RunDir, units: Iterable[int], report: Callable[[dict], None]
) -> None:
    """Do units of a stage in this process.

    report: called with progress: ``{"ready": True}`` once an engine runs, what
    :func:`generate_units` and :func:`prefill_units` report, and ``{"doing": text}`` for what still
    takes time after the last unit.
    """
    one_pass = stage == "generate" and plan.recipe.capture.mode == "generate"
    states = run.states if one_pass or stage == "capture" else None
    if states is not None:
        open_store(states, plan.meta)

    def start() -> CaptureEngine:
        engine = CaptureEngine(plan.recipe, plan.target, plan.meta, states)
        report({"ready": True})
        return engine

    if stage == "generate":
        generate_units(plan, run.answers, states, units, start, report)
    else:
        prefill_units(plan, run.answers, run.states, units, start, report)


def answers_in(stage: str, plan: WorkPlan, units: Iterable[int]) -> int:
    """How many answers a stage works on in these units: ``generate`` writes one a turn,
    ``capture`` takes one a conversation."""
    chats = [chat for unit in units for chat, _ in plan.units[unit]]
    return sum(len(chat.turns) for chat in chats) if stage == "generate" else len(chats)
