"""Chats out of JSONL, Parquet or a hub data set: what the target will be asked.

A record holds `messages` (role/content), `conversations` (ShareGPT's from/value) or a plain
`prompt`, and may have its system message beside them, as `system`. Only what people said is kept,
with the system message: the target writes every answer itself.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafthead.errors import DraftheadError
from drafthead.recipe import PromptsSection, Source

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True)
class Chat:
    """What one conversation asks: a system message, if any, and the user's messages in order."""

    system: str | None
    turns: tuple[str, ...]
    source: str

    @property
    def id(self) -> str:
        """Names the conversation by its text: 16 hex digits."""
        text = json.dumps([self.system, *self.turns])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def opening(self) -> list[dict[str, str]]:
        """The messages before the target's first answer."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.turns[0]}]


@dataclass
class Chats:
    """The conversations of a recipe, each once, and what was left out."""

    train: list[Chat]
    heldout: list[Chat]
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> records."""

    def all(self) -> list[tuple[Chat, str]]:
        """Every conversation with its split, in an order that follows from its text alone: work
        is cut into units along it, so each unit mixes the sources."""
        pairs = [(c, "train") for c in self.train] + [(c, "heldout") for c in self.heldout]
        return sorted(pairs, key=lambda pair: pair[0].id)


def check_file(path: Path | str) -> None:
    """Whether a source's path is a file.

    Raises:
        DraftheadError: it is a folder, or nothing.
    """
    if Path(path).is_dir():
        raise DraftheadError(
            f"prompts: {path} is a folder; name the JSONL or Parquet file in it, or give "
            "the folder as `dataset`"
        )
    if not Path(path).is_file():
        raise DraftheadError(
            f"prompts: {path}: no such file; a path in a recipe is relative to the folder that "
            "drafthead is run from"
        )


def read_records(source: Source) -> Iterator[tuple[str, Any]]:
    """The records of a source, each with where it stands (file and line), for errors.

    Raises:
        DraftheadError: no such file or data set, a broken line (named by number), another format.
    """
    if source.dataset is not None:
        yield from _hub_records(source)
        return
    path = Path(str(source.path))
    check_file(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(path)
            for number, batch in enumerate(table.iter_batches(1024)):
                for row, record in enumerate(batch.to_pylist()):
                    yield f"{path}, row {number * 1024 + row + 1}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise DraftheadError(f"{path}: not a readable Parquet file: {error}") from None
        return
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise DraftheadError(
            f"{path}: prompts come from .jsonl or .parquet, found {path.suffix or 'no suffix'}"
        )
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _parse(line: bytes, where: str) -> Any:
    try:
        # utf-8-sig: editors on Windows put a mark before the first line
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DraftheadError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); save the "
            "file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DraftheadError(f"{where}: broken JSON: {error}; each line is one record") from None


def _hub_records(source: Source) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.dataset, split=source.split)
    except Exception as error:  # datasets raises many kinds; each says what it is
        raise DraftheadError(
            f"prompts.sources: data set {source.dataset!r}, split {source.split!r} cannot be "
            f"loaded: {error}"
        ) from None
    for number, record in enumerate(dataset, 1):
        yield f"{source.dataset}, record {number}", record


def to_chat(record: Any, where: str, source: str) -> Chat | str:
    """The chat in a record, or the reason why it has none that can be asked.

    Raises:
        DraftheadError: the record is of no known form.
    """
    if not isinstance(record, dict):
        raise DraftheadError(
            f"{where}: a record is an object, found {type(record).__name__}; write each on a line "
            'of its own: {"prompt": …}'
        )
    names = ("messages", "conversations", "prompt")
    for name in names:
        if record.get(name):
            found = record[name]
            break
    else:
        if any(name in record for name in names):
            return "empty message"
        raise DraftheadError(
            f"{where}: no `messages`, `conversations` or `prompt` (found: "
            f"{', '.join(map(str, record)) or 'nothing'})"
        )
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    if not isinstance(found, list):
        raise DraftheadError(f"{where}: `{name}` is a {type(found).__name__}, not a list")
    if record.get("tools") not in (None, [], "", "[]"):  # the served prompt would describe them
        return "tools, images or other roles"
    if record.get("system"):
        found = [{"role": "system", "content": record["system"]}, *found]
    system, turns = None, []
    for number, message in enumerate(found):
        if not isinstance(message, dict):
            raise DraftheadError(f"{where}: `{name}`[{number}] is not an object with a role")
        role = _ROLES.get(str(message.get("role") or message.get("from")).lower())
        text = _text(message.get("content", message.get("value")))
        if role is None or text is None or message.get("tool_calls"):
            return "tools, images or other roles"
        if role != "assistant" and not _is_unicode(text):
            return "half a character"
        if role == "system":
            if number:
                return "a system message that is not the first"
            system = text
        elif role == "user":
            if not text.strip():
                return "empty message"
            turns.append(text)
        elif role == "assistant" and not turns:
            return "starts with the assistant"
    return Chat(system, tuple(turns), source) if turns else "no user message"


def _text(content: Any) -> str | None:
    """A message's text; content parts are joined if all of them are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part.get("text", "")) for part in content)
    return None


def _is_unicode(text: str) -> bool:
    """Whether no tokenizer would refuse it: JSON may escape half of a character, as whoever cuts
    texts in JavaScript or Java leaves it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_chats(prompts: PromptsSection) -> Chats:
    """Read, dedup and split the recipe's prompts.

    The held-out side is the ``heldout`` conversations whose hash with the seed is smallest, so it
    follows from the texts and not from their order or source.

    Raises:
        DraftheadError: a source cannot be read, has no prompt, or nothing is left to train on.
    """
    unique: dict[str, Chat] = {}
    left_out: dict[str, int] = {}
    for source in prompts.sources:
        kept = 0
        for chat in _chats(source, left_out):
            if chat.id in unique:
                left_out["seen before"] = left_out.get("seen before", 0) + 1
                continue
            unique[chat.id] = chat
            kept += 1
            if kept == source.limit:
                break
        if not kept:
            reasons = ", ".join(f"{n} {why}" for why, n in left_out.items()) or "it is empty"
            raise DraftheadError(f"{source.path or source.dataset}: no prompt in it ({reasons})")
    if len(unique) <= prompts.heldout:
        raise DraftheadError(
            f"prompts: {len(unique)} conversations and prompts.heldout is {prompts.heldout}: "
            "nothing would be left to train on; add prompts or hold out fewer"
        )

    def rank(chat: Chat) -> str:
        return hashlib.sha256(f"{prompts.seed}/{chat.id}".encode()).hexdigest()

    ranked = sorted(unique.values(), key=rank)
    heldout = {chat.id for chat in ranked[: prompts.heldout]}
    chats = list(unique.values())
    return Chats(
        [chat for chat in chats if chat.id not in heldout],
        [chat for chat in chats if chat.id in heldout],
        left_out,
    )


def chats_of(source: Source) -> list[Chat]:
    """The conversations of one source that can be asked, as they come.

    Raises:
        DraftheadError: it cannot be read.
    """
    return list(itertools.islice(_chats(source, {}), source.limit))


def _chats(source: Source, left_out: dict[str, int]) -> Iterable[Chat]:
    name = source.name or Path(source.path or str(source.dataset)).stem
    for where, record in read_records(source):
        chat = to_chat(record, where, name)
        if isinstance(chat, Chat):
            yield chat
        else:
            left_out[chat] = left_out.get(chat, 0) + 1
