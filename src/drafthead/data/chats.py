"""Chats out of the records of prompt files: what the target will be asked.

Only what people said is kept, with the system message: the target writes every answer itself. A
record that asks for more than text (tools, images, …) is left out and counted; one of an unknown
form is an error.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from drafthead.data.records import read_records
from drafthead.data.template import Message, Template
from drafthead.errors import DraftheadError
from drafthead.fsio import shortened
from drafthead.recipe import PromptsSection, Source

_LISTS = ("messages", "conversations", "conversation")
"""Keys of a list of messages: OpenAI's, ShareGPT's, LMSYS-Chat-1M's and WildChat's."""
_TEXTS = ("instruction", "question", "query")
"""Keys of a user's message in sets of instructions (Alpaca, Dolly), questions (OpenOrca, GSM8K)."""
_ADDED = ("input", "context")
"""Keys of a text that belongs to an `instruction` (Alpaca, Dolly)."""
_UNCLEAR = (*_ADDED, "history", "choices", "options")
"""Keys of what belongs to a question in ways that differ from set to set."""
_SYSTEMS = ("system", "system_prompt", "system_message")
"""Keys of a system message beside the conversation."""
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLES = {
    *("tool", "tools", "tool_call", "tool_response", "observation", "ipython"),
    *("function", "function_call", "function_response"),
}
_TOOLS = re.compile(
    r"(tools?|functions|available_(tools|functions)|(tool|function)_(calls?|responses?|schemas?)"
    r"|tool_(use|result|reference))"
)
_MEDIA = re.compile(
    r"(input_)?(image|img|picture|video|audio)s?"
    r"(_(url|uri|path|file|filepath|filename|name|id|bytes|data|embed|pil)s?)?"
)
_MEDIA_WORDS = dict.fromkeys(("image", "img", "picture"), "images") | {
    "video": "video",
    "audio": "audio",
}
_MESSAGE_LIST = re.compile(
    r"""(?s)\s*\[\s*\{(?=.*['"](role|from)['"]\s*:)(?=.*['"](content|value)['"]\s*:).*\}\s*\]\s*"""
)
"""A list of messages as a string, of JSON or of Python."""
_SEEN_BEFORE = "seen before"
_REFUSED = "refused by the target's chat template"
_STAND_IN = "Yes."
"""Takes the place of the target's answers where only the form of a conversation matters."""
_EXAMPLES = 3
_WRITE = 'Write each conversation as a record: {"prompt": "…"} or {"messages": [{"role": …}, …]}'


@dataclass(frozen=True)
class Chat:
    """What one conversation asks."""

    system: str | None
    turns: tuple[tuple[str, ...], ...]
    """The user's messages before each answer: mostly one, more where they wrote again before the
    assistant did."""
    source: str
    """What the recipe calls the source it comes from (chat, code, …)."""
    where: str = field(default="", compare=False)
    """File and row of the record, for messages."""

    @property
    def id(self) -> str:
        """Names the conversation by its text: 16 hex digits."""
        turns = [turn[0] if len(turn) == 1 else turn for turn in self.turns]
        return hashlib.sha256(json.dumps([self.system, *turns]).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """File, row and first words, for messages."""
        return f"{self.where}: {shortened(self.turns[0][0], 60)}"

    def messages(self, answers: Sequence[str] = ()) -> list[Message]:
        """The conversation after these answers, up to where the next one is due."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for number, turn in enumerate(self.turns[: len(answers) + 1]):
            messages += [{"role": "user", "content": text} for text in turn]
            if number < len(answers):
                messages.append({"role": "assistant", "content": answers[number]})
        return messages

    @property
    def opening(self) -> list[Message]:
        """The messages before the target's first answer."""
        return self.messages()

    @property
    def whole(self) -> list[Message]:
        """The messages before the last answer, with stand-ins for the earlier ones."""
        return self.messages([_STAND_IN] * (len(self.turns) - 1))


@dataclass
class LeftOut:
    """Records of one source that are not asked, for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """Where the first few are: file and row."""


@dataclass
class SourceCounts:
    """What one source gave."""

    place: str
    """The file or data set."""
    conversations: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By reason."""

    def leave_out(self, reason: str, where: str) -> None:
        left_out = self.left_out.setdefault(reason, LeftOut())
        left_out.count += 1
        if len(left_out.examples) < _EXAMPLES:
            left_out.examples.append(where)

    def notes(self) -> list[str]:
        """A sentence for each reason, for people."""
        notes = []
        for reason, left_out in self.left_out.items():
            examples = [where.removeprefix(f"{self.place}, ") for where in left_out.examples]
            examples += ["…"] * (left_out.count > len(examples))
            notes.append(
                f"{self.place}: left out {left_out.count} record{'s' * (left_out.count > 1)}: "
                f"{reason} ({', '.join(examples)})"
            )
        if not self.conversations:
            notes.append(f"{self.place}: gave nothing new, every conversation was seen before")
        return notes


@dataclass
class Chats:
    """The conversations of a recipe, each once, and what each source gave."""

    train: list[Chat]
    heldout: list[Chat]
    sources: list[SourceCounts]

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> records, of all sources."""
        return count_left_out(self.sources)

    def all(self) -> list[tuple[Chat, str]]:
        """Every conversation with its split, in an order that follows from its text alone: work
        is cut into units along it, so each unit mixes the sources."""
        pairs = [(c, "train") for c in self.train] + [(c, "heldout") for c in self.heldout]
        return sorted(pairs, key=lambda pair: pair[0].id)


def count_left_out(sources: Sequence[SourceCounts]) -> dict[str, int]:
    """Reason -> records, of all sources."""
    total: dict[str, int] = {}
    for source in sources:
        for reason, left_out in source.left_out.items():
            total[reason] = total.get(reason, 0) + left_out.count
    return total


class _NotAsked(Exception):
    """The record is of a known form, but cannot be asked; says why."""


def to_chat(record: Any, where: str, source: str) -> Chat | str:
    """The chat in a record, or the reason why it has none that can be asked.

    Raises:
        DraftheadError: the record is of no known form.
    """
    if not isinstance(record, dict):
        raise DraftheadError(
            f"{where}: a record is an object, found {type(record).__name__}. {_WRITE}"
        )
    if isinstance(record.get("body"), dict):  # a request of OpenAI's batches, vLLM's run-batch
        record = record["body"]
    try:
        _refuse_more_than_text(record)
        messages = _messages(record, where)
        return Chat(*_system_and_turns(messages, where), source, where)
    except _NotAsked as reason:
        return str(reason)


def _messages(record: dict, where: str) -> list[Any]:
    """The record's messages, in whichever form it holds them."""
    key = next((key for key in (*_LISTS, "prompt", "turns", *_TEXTS) if record.get(key)), None)
    if key is None:
        if any(key in record for key in (*_LISTS, "prompt", "turns", *_TEXTS)):
            raise _NotAsked("empty message")
        raise DraftheadError(
            f"{where}: no `messages`, `conversations` or `prompt`; its keys are "
            f"{', '.join(map(str, list(record)[:20])) or 'none'}. {_WRITE}"
        )
    value = record[key]
    if key == "turns" and isinstance(value, list) and all(isinstance(t, str) for t in value):
        # Of MT-Bench and Spec-Bench: the user's messages alone.
        messages = []
        for text in value:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    elif key in (*_LISTS, "turns") or not isinstance(value, str) or _MESSAGE_LIST.fullmatch(value):
        messages = _message_list(value, key, where)
    else:
        messages = [{"role": "user", "content": _with_additions(record, key, where)}]
    for key in _SYSTEMS:
        text = record.get(key)
        if _holds(text) and not _is_system(messages[0], text):
            messages = [{"role": "system", "content": text}, *messages]
    return messages


def _is_system(message: Any, text: Any) -> bool:
    """Whether a message is a system message of that text."""
    if not isinstance(message, dict):
        return False
    role = str(message.get("role") or message.get("from")).lower()
    return _ROLES.get(role) == "system" and text in message.values()


def _with_additions(record: dict, key: str, where: str) -> str:
    """The user's message of a record that may hold parts of it under other keys."""
    if key == "prompt":
        return record[key]
    added = _ADDED if key == "instruction" else ()
    unclear = [name for name in _UNCLEAR if name not in added and _holds(record.get(name))]
    texts = [record[key], *(record[name] for name in added if _holds(record.get(name)))]
    if unclear or not all(isinstance(text, str) for text in texts):
        raise DraftheadError(
            f"{where}: `{key}` beside {', '.join(f'`{name}`' for name in unclear or added)}: it is "
            "unclear how to combine them; write the user's message as one `prompt`"
        )
    return "\n\n".join(texts)


def _message_list(value: Any, key: str, where: str) -> list[Any]:
    """A list of messages, as it is, as a string of JSON, or as a table of columns."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DraftheadError(
                f"{where}: `{key}` is a string, and not of JSON ({error}); it must be a list of "
                "messages, or one as JSON"
            ) from None
    if isinstance(value, dict):  # older `datasets` wrote a list of objects as columns
        columns = [column for column in value.values() if isinstance(column, list)]
        if columns and len(columns) == len(value) and len({len(c) for c in columns}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        expected = "neither text nor a list of messages" if key == "prompt" else "not a list"
        raise DraftheadError(f"{where}: `{key}` is of type {type(value).__name__}, {expected}")
    if not value:
        raise _NotAsked("empty message")
    return value


def _system_and_turns(
    messages: list[Any], where: str
) -> tuple[str | None, tuple[tuple[str, ...], ...]]:
    system, turns = None, []
    answered = True
    for number, message in enumerate(messages):
        role, text = _role_and_text(message, number, where)
        if role != "assistant" and not _is_unicode(text):
            raise _NotAsked("half a character")
        if role == "system":
            if number:
                raise _NotAsked("a system message that is not the first")
            system = text
        elif role == "user":
            if not text.strip():
                raise _NotAsked("empty message")
            if answered:
                turns.append([text])
            else:
                turns[-1].append(text)
        elif not turns:
            raise _NotAsked("starts with the assistant")
        answered = role != "user"
    if not turns:
        raise _NotAsked("no user message")
    return system, tuple(map(tuple, turns))


def _role_and_text(message: Any, number: int, where: str) -> tuple[str, str]:
    """A message's role (user, assistant or system) and its text."""
    if isinstance(message, str) and message.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(message)
    if not isinstance(message, dict):
        raise DraftheadError(
            f"{where}: message {number} is a {type(message).__name__}, not an object with `role` "
            "and `content`"
        )
    _refuse_more_than_text(message)
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    texts = [message[key] for key in ("content", "value", "text") if key in message]
    if role is None or not texts:
        raise DraftheadError(
            f"{where}: message {number} has no `role` and `content` (or `from` and `value`); its "
            f"keys are {', '.join(map(str, message)) or 'none'}"
        )
    role = str(role).lower()
    if role in _TOOL_ROLES:
        raise _NotAsked("tools")
    if role not in _ROLES:
        raise _NotAsked("a role other than system, user and assistant")
    return _ROLES[role], _text(next((text for text in texts if text is not None), ""))


def _text(content: Any) -> str:
    """A message's text. Parts are joined as vLLM's server joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _NotAsked("content that is not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise _NotAsked("content that is not text")
        kind = str(part.get("type") or "text")
        _refuse_more_than_text({**part, kind: True})
        if kind not in ("text", "input_text", "output_text"):
            raise _NotAsked("content that is not text")
        if part.get("text") is not None:
            texts.append(str(part["text"]))
    return "\n".join(texts)


def _refuse_more_than_text(fields: dict) -> None:
    """Refuse tools, images, video and audio under any of the keys that people use for them: the
    served prompt would hold them, and asked without them it is another conversation."""
    for key, value in fields.items():
        kind = _beyond_text(str(key))
        if kind and _holds(value):
            raise _NotAsked(kind)


@lru_cache(maxsize=10_000)
def _beyond_text(key: str) -> str | None:
    """What a key's value adds to a conversation's text: tools, images, video, audio or nothing."""
    if _TOOLS.fullmatch(key.lower()):
        return "tools"
    media = _MEDIA.fullmatch(key.lower())
    return _MEDIA_WORDS[media[2]] if media else None


def _holds(value: Any) -> bool:
    """Whether a value holds anything: none of an empty list, string or object, also as JSON."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    return bool(value) and value == value  # pandas writes NaN where nothing is


def _is_unicode(text: str) -> bool:
    """Whether tokenizers take it. JSON can contain unpaired UTF-16 surrogates (texts cut off in
    JavaScript or Java), which they reject."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_chats(
    sources: Sequence[Source], template: Template | None = None
) -> tuple[list[Chat], list[SourceCounts]]:
    """The conversations of some sources that can be asked, each once, and what each source gave.

    Args:
        sources: read in order, each up to its limit of conversations not seen before.
        template: leaves out the conversations that it refuses; None asks no template.

    Raises:
        DraftheadError: a source cannot be read, or nothing in it can be asked; the template refuses
            more than half of all conversations.
    """
    chats: dict[str, Chat] = {}
    counts = []
    for source in sources:
        place = str(source.path or source.dataset)
        name, given = source.name or Path(place).stem, SourceCounts(place)
        counts.append(given)
        for where, record in read_records(source):
            chat = to_chat(record, where, name)
            if isinstance(chat, str):
                given.leave_out(chat, where)
            elif chat.id in chats:
                given.leave_out(_SEEN_BEFORE, where)
            elif template and (refused := _refusal(chat, template)):
                # What the template says stands beside the first example only.
                named = where if _REFUSED in given.left_out else f"{where}: {refused}"
                given.leave_out(_REFUSED, named)
            else:
                chats[chat.id] = chat
                given.conversations += 1
                if given.conversations == source.limit:
                    break
        if not given.conversations and _SEEN_BEFORE not in given.left_out:
            reasons = ", ".join(f"{left.count} {why}" for why, left in given.left_out.items())
            examples = [left.examples[0] for left in given.left_out.values()]
            raise DraftheadError(
                f"{place}: no prompt in it that can be asked ({reasons or 'it is empty'})"
                + (f"; see {', '.join(examples)}" if examples else "")
            )
    total = count_left_out(counts).get(_REFUSED, 0)
    if total > len(chats):
        first = next(c.left_out[_REFUSED].examples[0] for c in counts if _REFUSED in c.left_out)
        raise DraftheadError(
            f"{total} of {total + len(chats)} conversations are {_REFUSED}, so the template or "
            f"the format of the prompts is wrong. The first: {first}"
        )
    return list(chats.values()), counts


def _refusal(chat: Chat, template: Template) -> str | None:
    """What the template says against a conversation, from its first message to its last."""
    try:
        template.render(chat.whole, prompt=True)
    except DraftheadError as error:
        return str(error)
    return None


def load_chats(prompts: PromptsSection, template: Template | None = None) -> Chats:
    """Read, dedup and split the recipe's prompts.

    The held-out side is the ``heldout`` conversations whose hash with the seed is smallest, so it
    follows from the texts and not from their order or source.

    Raises:
        DraftheadError: as ``read_chats``, or nothing is left to train on.
    """
    chats, sources = read_chats(prompts.sources, template)
    if len(chats) <= prompts.heldout:
        reasons = ", ".join(f"{n} {why}" for why, n in count_left_out(sources).items())
        raise DraftheadError(
            f"prompts: {len(chats)} conversations and prompts.heldout is {prompts.heldout}: "
            "no conversation is left to train on; add prompts or hold out fewer"
            + (f" (records left out: {reasons})" if reasons else "")
        )

    def rank(chat: Chat) -> str:
        return hashlib.sha256(f"{prompts.seed}/{chat.id}".encode()).hexdigest()

    heldout = {chat.id for chat in sorted(chats, key=rank)[: prompts.heldout]}
    return Chats(
        [chat for chat in chats if chat.id not in heldout],
        [chat for chat in chats if chat.id in heldout],
        sources,
    )
