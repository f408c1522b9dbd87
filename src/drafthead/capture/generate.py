"""The target answers the prompts, and its states are captured in the same pass."""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from drafthead.capture.checks import check_share
from drafthead.capture.engine import CaptureEngine, SequenceToKeep, Written
from drafthead.capture.plan import WorkPlan
from drafthead.data.answers import (
    Answer,
    part_left_out,
    part_path,
    pending_path,
    read_part,
    write_part,
)
from drafthead.data.chats import Chat
from drafthead.data.template import Template
from drafthead.errors import DraftheadError
from drafthead.fsio import shortened
from drafthead.rundir import RunDir
from drafthead.serve import reasoning_parser
from drafthead.states.index import load_unit, unit_path
from drafthead.states.writer import open_store

# Tokens that a template puts around one more turn; more than any known one does.
_TURN_MARGIN = 64
# Answers by which a target that ends every one at once is known.
_ENOUGH_ANSWERS = 32
_TOO_LONG = "prompt longer than the model"
_NO_EMBEDDING = "a prompt with tokens that the tokenizer has and the target's vocabulary has not"
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
    """The answers of a unit, and the conversations left out of it, by reason."""

    answers: list[Answer]
    wanted: list[SequenceToKeep]
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
    only its states are kept. A conversation ends early, with the turns so far, where one more might
    not fit the model, where an answer is all thinking, or where the template refuses an answer
    (some raise on an empty one).
    """
    done: dict[str, tuple[Conversation, Written]] = {}
    left_out: dict[str, list[str]] = {}
    live = [Conversation(chat, split) for chat, split in chats]
    history = History(plan.template, reasoning_parser(plan.recipe, plan.target))
    while live:
        asked = []
        for conversation in live:
            messages = conversation.chat.messages(conversation.answers)
            reason = None
            try:
                ids, mask = plan.template.encode(messages)
            except DraftheadError:
                if conversation.answered is None:
                    raise
                reason = _REFUSED
            else:
                if len(ids) >= plan.max_len:
                    reason = _TOO_LONG if conversation.answered is None else _NO_ROOM
                elif max(ids, default=0) >= plan.target.vocab_size:
                    reason = _NO_EMBEDDING
            if reason is not None:
                left_out.setdefault(reason, []).append(conversation.chat.id)
                if conversation.answered is not None:
                    done[conversation.chat.id] = (conversation, conversation.answered)
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
            wanted.append(to_keep(done[chat.id][1].key, answers[-1]))
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


def to_keep(key: int, answer: Answer) -> SequenceToKeep:
    """The line of a unit's manifest that asks for an answer's states."""
    return SequenceToKeep(
        key=key,
        prompt_len=len(answer.prompt_ids),
        prompt_mask=answer.prompt_mask.tolist(),
        conversation=answer.conversation,
        split=answer.split,
    )


class History:
    """Turns answers into what later turns show the chat template.

    The server leaves out special tokens and, if it has a reasoning parser, the thinking, which chat
    clients do not send back.

    Args:
        template: the target's.
        parser: the server's ``--reasoning-parser``, None without one.
    """

    def __init__(self, template: Template, parser: str | None):
        self._template, self._parser = template, parser

    def content(self, ids: Sequence[int]) -> str | None:
        """The `content` of the server's message for an answer; None if it is all thinking.

        Raises:
            DraftheadError: vLLM's parser cannot read the answer.
        """
        if not self._parser:
            return self._template.answer_text(ids, special_tokens=False)
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        try:
            parser_class = ParserManager.get_parser(
                reasoning_parser_name=self._parser, is_harmony=self._parser == "openai_gptoss"
            )
            # A parser keeps a state: each answer gets its own, as each request does.
            parser = parser_class(
                self._template.tokenizer, None, chat_template_kwargs=self._template.arguments
            )
            request = parser.adjust_request(ChatCompletionRequest(messages=[]))
            text = self._template.answer_text(ids, special_tokens=not request.skip_special_tokens)
            _, content, _ = parser.parse(text, request, model_output_token_ids=list(ids))
        except Exception as error:  # parsers raise whatever they like
            raise DraftheadError(
                f"vLLM's reasoning parser {self._parser} cannot read an answer of "
                f"{self._template.where}: {error!r}"
            ) from None
        return content


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

    With ``states`` the answers of a unit first go to a hidden file. They count once the states are
    on disk, which say which of the answers are left out: an answer on disk says that the unit is
    whole, and a kill loses the unit in flight only.

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
        DraftheadError: a check of the states failed, too many of them are unusable, the answers
            teach nothing, or the disk is full; finished units stay.
    """
    engine: CaptureEngine | None = None
    waiting: deque[int] = deque()
    unusable = Unusable(plan)
    length = AnswerLength(plan)

    def planned(number: int) -> int:
        return sum(len(chat.turns) for chat, _ in plan.units[number])

    def captured(number: int) -> bool:
        assert states is not None
        return pending_path(answers, number).exists() and unit_path(states, number).exists()

    def commit(number: int) -> None:
        assert states is not None
        pending = pending_path(answers, number)
        left_out = unusable.of_unit(states, number)
        names = {name for reason in left_out.values() for name in reason}
        kept = [answer for answer in read_part(pending) if answer.conversation not in names]
        write_part(answers, number, kept, part_left_out(pending) | left_out)
        pending.unlink()
        report({"unit": number})

    def settle() -> None:
        while waiting and captured(waiting[0]):
            commit(waiting.popleft())

    try:
        for number in units:
            if part_path(answers, number).exists():
                continue
            if states is not None and captured(number):
                commit(number)
                report({"answers": planned(number), "tokens": 0})
                continue
            engine = engine or start()
            if states is not None:
                # An index from before belongs to answers that were lost.
                unit_path(states, number).unlink(missing_ok=True)
            counter = _AnswerCounter(report)
            unit = answer_unit(plan, engine, plan.units[number], counter.add)
            counter.skip_to(planned(number))
            length.check(unit.answers)
            write_part(answers, number, unit.answers, unit.left_out, pending=states is not None)
            if states is None:
                report({"unit": number})
                continue
            engine.save(number, unit.wanted)
            waiting.append(number)
            settle()
        if engine and states is not None:
            report({"doing": "writing the last states"})
            engine.flush()
        settle()
    except DraftheadError:
        if engine and states is not None:
            # The other of two units under way may yet be finished, and then it counts.
            with contextlib.suppress(DraftheadError):
                engine.flush()
                settle()
        raise
    finally:
        if engine:
            report({"doing": "ending the engine"})
            engine.close()


class Unusable:
    """Counts conversations without usable states, and stops the work when they are too many."""

    def __init__(self, plan: WorkPlan):
        self.plan, self.conversations = plan, 0
        self.left_out: dict[str, list[str]] = {}

    def of_unit(self, states: Path, number: int) -> dict[str, list[str]]:
        """Reason -> conversations of a captured unit whose states are not in the store.

        Raises:
            DraftheadError: as ``check_share``, of all units so far.
        """
        checks = load_unit(states, self.plan.meta, number).checks
        left_out: dict[str, list[str]] = checks.get("left_out", {})
        for reason, names in left_out.items():
            self.left_out.setdefault(reason, []).extend(names)
            self.conversations += len(names)
        self.conversations += checks["samples"]
        if left_out:
            share = self.plan.recipe.capture.max_unusable
            labels = self.plan.labels
            check_share(self.left_out, self.conversations, share, labels, more_to_come=True)
        return left_out


class AnswerLength:
    """Detects a target whose answers end with their first token."""

    def __init__(self, plan: WorkPlan):
        self.plan, self.answers, self.teaching = plan, 0, 0

    def check(self, answers: Sequence[Answer]) -> None:
        """Count a unit's answers.

        Raises:
            DraftheadError: of ``_ENOUGH_ANSWERS`` none has two tokens.
        """
        self.answers += len(answers)
        self.teaching += sum(answer.teaches for answer in answers)
        if not self.teaching and self.answers >= _ENOUGH_ANSWERS:
            ends = sorted(self.plan.template.eos)
            raise DraftheadError(
                f"{self.plan.target.path}: all {self.answers} answers so far are of a single "
                "token: a head learns nothing from them. Check "
                f"the chat template, and at `eos_token_id` in generation_config.json: {len(ends)} "
                f"tokens end an answer ({shortened(ends, 40)})"
            )


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
    unusable = Unusable(plan)

    def settle() -> None:
        while waiting and unit_path(states, waiting[0]).exists():
            unusable.of_unit(states, waiting[0])
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
            engine.save(number, [to_keep(key, a) for key, a in zip(keys, written, strict=True)])
            waiting.append(number)
            settle()
        if engine:
            report({"doing": "writing the last states"})
            engine.flush()
        settle()
    finally:
        if engine:
            report({"doing": "ending the engine"})
            engine.close()


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
