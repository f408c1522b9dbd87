"""The answers that the target wrote, as Parquet parts of one unit of work each."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drafthead.errors import DraftheadError
from drafthead.fsio import write_bytes

_SCHEMA = pa.schema(
    [
        ("conversation", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_mask", pa.list_(pa.bool_())),
        ("answer_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Answer:
    """One conversation, ended by what the target wrote last."""

    conversation: str
    source: str
    split: str
    """``train`` or ``heldout``."""
    prompt_ids: np.ndarray
    """int32 [n]: the rendered prompt, earlier turns included."""
    prompt_mask: np.ndarray
    """bool [n]: True where the target wrote the token, in earlier turns."""
    answer_ids: np.ndarray
    """int32 [m]: as generated, the end token included if there was one."""
    finish_reason: str
    """``stop`` (the target ended) or ``length`` (cut)."""
    text: str
    """The answer in words, for people."""

    @property
    def ids(self) -> np.ndarray:
        """int32 [T]: prompt and answer."""
        return np.concatenate([self.prompt_ids, self.answer_ids])

    @property
    def teaches(self) -> bool:
        """Whether a head can learn from it: two tokens of the target's own in a row."""
        mask = self.loss_mask
        return bool((mask[1:] & mask[:-1]).any())

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [T]: True where the target wrote the token."""
        return np.concatenate([self.prompt_mask, np.ones(len(self.answer_ids), bool)])


def part_path(folder: Path, unit: int) -> Path:
    return folder / f"part-{unit:06d}.parquet"


def pending_path(folder: Path, unit: int) -> Path:
    """Where a unit's answers wait for its states."""
    return folder / f".part-{unit:06d}.parquet"


def write_part(
    folder: Path,
    unit: int,
    answers: Sequence[Answer],
    left_out: dict[str, list[str]],
    *,
    pending: bool = False,
) -> None:
    """Write one unit's answers, whole or not at all; ``left_out`` names, by reason, the
    conversations of the unit that have none, or not to all their turns. ``pending``: its states
    are not on disk yet.

    Raises:
        DraftheadError: the disk is full or refuses.
    """
    columns = {
        field.name: [getattr(answer, field.name) for answer in answers] for field in fields(Answer)
    }
    sink = pa.BufferOutputStream()
    schema = _SCHEMA.with_metadata({"left_out": json.dumps(left_out)})
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
    path = (pending_path if pending else part_path)(folder, unit)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_part(path: Path) -> list[Answer]:
    """The answers of one part.

    Raises:
        DraftheadError: missing, broken, or of another form.
    """
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise DraftheadError(
            f"{path}: not a readable part of the answers: {error}; delete it and "
            f"{path.parent.parent / '.stages' / 'generate.done.json'}, then run again"
        ) from None
    rows = []
    for row in table.to_pylist():
        arrays = {
            "prompt_ids": np.array(row["prompt_ids"], np.int32),
            "prompt_mask": np.array(row["prompt_mask"], bool),
            "answer_ids": np.array(row["answer_ids"], np.int32),
        }
        rows.append(Answer(**(row | arrays)))
    return rows


def part_left_out(path: Path) -> dict[str, list[str]]:
    """Reason -> the conversations of a part that have no answer, or not to all their turns."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"left_out", b"{}"))


def read_left_out(folder: Path) -> dict[str, list[str]]:
    """As :func:`part_left_out`, of all parts of a run."""
    left_out: dict[str, list[str]] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        for reason, names in part_left_out(path).items():
            left_out.setdefault(reason, []).extend(names)
    return left_out


def read_answers(folder: Path, split: str | None = None) -> Iterator[Answer]:
    """All answers of a run, in their order; of ``train`` or ``heldout`` only, if named.

    Raises:
        DraftheadError: there are none, or a part is broken.
    """
    parts = sorted(folder.glob("part-*.parquet")) if folder.is_dir() else []
    if not parts:
        raise DraftheadError(
            f"{folder}: no answers; run `drafthead generate RECIPE`", field="answers"
        )
    for path in parts:
        for answer in read_part(path):
            if split is None or answer.split == split:
                yield answer
