"""The target answers the prompts, and its states are captured in the same pass."""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from drafthead.capture.engine import CaptureEngine, Wanted, Written
from drafthead.capture.history import History
from drafthead.capture.plan import WorkPlan
from drafthead.data.answers import Answer, part_path, read_part, write_part
from drafthead.data.chats import Chat
from drafthead.errors import DraftheadError
from drafthead.serve import reasoning_parser
from drafthead.states.index import unit_path

# Tokens that a template puts around one more turn; more than any known one does.
_TURN_MARGIN = 64
_NO_ROOM = "later turns, which might not fit into engine.max_model_len"
_REFUSED = "later turns, as the template refuses an answer before them"
_NO_CONTENT = "later turns, as an answer before them is all thinking"
_UNREADABLE = "later turns, as vLLM's reasoning parser cannot read an answer before them"


@dataclass
class Conversation:
    """One conversation on its way through the turns."""

    chat: Chat
    split: str
    answers: list[str] = field(default_factory=list)
    """The target's answers so far, as its template is given them."""
    turn: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    prompt_mask: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    answered: Written | None = None
    """The target's answer to that prompt."""


@dataclass
class Unit:
    """A unit's answers and what was left out of it, by reason."""

    answers: list[Answer]
    wanted: list[Wanted]
    left_out: dict[str, list[str]]


def answer_unit(
    plan: WorkPlan,
    engine: CaptureEngine,
    chats: list[tuple[Chat, str]],
    progress: Callable[[int], None] | None = None,
) -> Unit:
    """Let the target answer each conversation of a unit, turn by turn.

    Every turn is answered in the context of the target's own earlier answers, as a chat client
    sends them back and the template shows them. The last turn's prompt and answer are the sample;
    only its states are kept. A conversation ends early where one more turn might not fit the model,
    where an answer is all thinking, or where the template refuses an answer (some raise on an empty
    one).
    """
    done: dict[str, tuple[Conversation, Written]] = {}
    left_out: dict[str, list[str]] = {}
    live = [Conversation(chat, split) for chat, split in chats]
    history = History(plan.template, reasoning_parser(plan.recipe, plan.target))
    while live:
        asked = []
        for conversation in live:
            messages = conversation.chat.messages(conversation.answers)
            try:
                ids, mask = plan.template.encode(messages)
            except DraftheadError:
                if conversation.answered is None:
                    raise
                left_out.setdefault(_REFUSED, []).append(conversation.chat.id)
                done[conversation.chat.id] = (conversation, conversation.answered)
                continue
            if len(ids) >= plan.max_len:
                left_out.setdefault("prompt longer than the model", []).append(conversation.chat.id)
                continue
            conversation.prompt_ids, conversation.prompt_mask = ids, mask
            conversation.turn += 1
            asked.append((conversation, _is_last(plan, conversation)))
        written = engine.generate(
            [conversation.prompt_ids for conversation, _ in asked],
            [_seed(plan, conversation) for conversation, _ in asked],
            progress,
        )
        live = []
        for (conversation, last), answer in zip(asked, written, strict=True):
            if last:
                if conversation.turn < len(conversation.chat.turns):
                    left_out.setdefault(_NO_ROOM, []).append(conversation.chat.id)
                done[conversation.chat.id] = (conversation, answer)
                continue
            conversation.answered = answer
            try:
                content, reason = history.content(answer.ids), _NO_CONTENT
            except DraftheadError:
                content, reason = None, _UNREADABLE
            if content is None:
                left_out.setdefault(reason, []).append(conversation.chat.id)
                done[conversation.chat.id] = (conversation, answer)
                continue
            conversation.answers.append(content)
            live.append(conversation)
    answers, wanted = [], []
    for chat, _ in chats:
        if chat.id in done:
            answers.append(_as_answer(plan, *done[chat.id]))
            wanted.append(as_wanted(done[chat.id][1].key, answers[-1]))
    return Unit(answers, wanted, left_out)


def _is_last(plan: WorkPlan, conversation: Conversation) -> bool:
    if conversation.turn == len(conversation.chat.turns):
        return True
    following = conversation.chat.turns[conversation.turn]
    tokens = sum(
        len(plan.template.tokenizer(text, add_special_tokens=False)["input_ids"]) + _TURN_MARGIN
        for text in following
    )
    answer = plan.recipe.generate.max_new_tokens
    return len(conversation.prompt_ids) + answer + tokens >= plan.max_len


def _seed(plan: WorkPlan, conversation: Conversation) -> int:
    text = f"{plan.recipe.generate.seed}/{conversation.chat.id}/{conversation.turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _as_answer(plan: WorkPlan, conversation: Conversation, written: Written) -> Answer:
    return Answer(
        conversation=conversation.chat.id,
        source=conversation.chat.source,
        split=conversation.split,
        prompt_ids=np.array(conversation.prompt_ids, np.int32),
        prompt_mask=conversation.prompt_mask,
        answer_ids=np.array(written.ids, np.int32),
        finish_reason=written.finish_reason,
        text=plan.template.answer_text(written.ids),
    )


def as_wanted(key: int, answer: Answer) -> Wanted:
    """The line of a unit's manifest that asks for an answer's states."""
    return Wanted(
        key=key,
        prompt_len=len(answer.prompt_ids),
        prompt_mask=answer.prompt_mask.tolist(),
        conversation=answer.conversation,
        split=answer.split,
    )


class _AnswerCounter:
    """Reports the answers of one unit as they end."""

    def __init__(self, report: Callable[[dict], None]):
        self.report, self.answers = report, 0

    def add(self, tokens: int) -> None:
        """An answer has ended."""
        self.answers += 1
        self.report({"answers": 1, "tokens": tokens})

    def skip_to(self, planned: int) -> None:
        """The unit is done; answers that were planned and left out do not come any more."""
        if self.answers < planned:
            self.report({"answers": planned - self.answers, "tokens": 0})


def generate_units(
    plan: WorkPlan,
    answers: Path,
    states: Path | None,
    units: Iterable[int],
    start: Callable[[], CaptureEngine],
    report: Callable[[dict], None],
) -> None:
    """Answer, and with ``states`` capture, the given units; those finished before are skipped.

    A unit's answers are written once its states are on disk, so an answer on disk says that the
    unit is whole.

    Args:
        plan: the run's work.
        answers: folder of the answers.
        states: folder of the state store, or None to only generate.
        units: numbers of the units to do; the next is drawn when the one before is computed.
        start: makes the engine; called only if there is work.
        report: called with progress: ``{"answers": 1, "tokens": n}`` for each answer,
            ``{"answers": m, "tokens": 0}`` for those of a unit that are not written after all,
            ``{"unit": n}`` for each unit, ``{"doing": text}`` for the rest.

    Raises:
        DraftheadError: a check of the states failed, or the disk is full; finished units stay.
    """
    engine: CaptureEngine | None = None
    waiting: deque[tuple[int, Unit]] = deque()

    def settle(everything: bool) -> None:
        while waiting and (
            everything or states is None or unit_path(states, waiting[0][0]).exists()
        ):
            number, done = waiting.popleft()
            write_part(answers, number, done.answers, done.left_out)
            report({"unit": number})

    try:
        for number in units:
            if part_path(answers, number).exists():
                continue
            engine = engine or start()
            if states is not None:
                # An index from before belongs to answers that were lost.
                unit_path(states, number).unlink(missing_ok=True)
            counter = _AnswerCounter(report)
            unit = answer_unit(plan, engine, plan.units[number], counter.add)
            counter.skip_to(sum(len(chat.turns) for chat, _ in plan.units[number]))
            if states is not None:
                engine.save(number, unit.wanted)
            waiting.append((number, unit))
            settle(False)
        if engine and states is not None:
            report({"doing": "writing the last states"})
            engine.flush()
        settle(True)
    except DraftheadError:
        if engine and states is not None:
            # The other of two units under way may yet be finished, and then it counts.
            with contextlib.suppress(DraftheadError):
                engine.flush()
            settle(False)
        raise
    finally:
        if engine:
            report({"doing": "ending the engine"})
            engine.close()


def prefill_units(
    plan: WorkPlan,
    answers: Path,
    states: Path,
    units: Iterable[int],
    start: Callable[[], CaptureEngine],
    report: Callable[[dict], None],
) -> None:
    """Capture, in a pass of their own, the states of answers that have none.

    For ``mode: prefill``, and for units that `drafthead states check --repair` threw out. The
    states are those of prefill, which differ from decoding's by rounding. Arguments and errors as
    for ``generate_units``.
    """
    engine: CaptureEngine | None = None
    waiting: deque[int] = deque()

    def settle(everything: bool) -> None:
        while waiting and (everything or unit_path(states, waiting[0]).exists()):
            report({"unit": waiting.popleft()})

    try:
        for number in units:
            if unit_path(states, number).exists():
                continue
            engine = engine or start()
            written = read_part(part_path(answers, number))
            counter = _AnswerCounter(report)
            keys = engine.prefill([answer.ids.tolist() for answer in written], counter.add)
            counter.skip_to(len(plan.units[number]))
            engine.save(number, [as_wanted(key, a) for key, a in zip(keys, written, strict=True)])
            waiting.append(number)
            settle(False)
        if engine:
            report({"doing": "writing the last states"})
            engine.flush()
        settle(True)
    finally:
        if engine:
            report({"doing": "ending the engine"})
            engine.close()
