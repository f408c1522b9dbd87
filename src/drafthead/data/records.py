"""The records of prompt files: JSONL, a JSON array, Parquet, or a data set on the hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drafthead.errors import DraftheadError
from drafthead.recipe import Source

_BATCH = 1024
"""Rows of Parquet read at a time."""
_CHUNK = 1 << 20
"""Characters of a JSON array read at a time."""
_BINARY = {b"PA": "Parquet", b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5": "Zstandard"}
"""Other kinds of files by the two bytes that they begin with, as no JSON does."""
_GAP = re.compile(r"\s*,?\s*")
"""What stands between two elements of a JSON array."""


def check_file(path: Path | str) -> None:
    """Check that a source's path is a file.

    Raises:
        DraftheadError: it is a folder, a pipe, or nothing.
    """
    if Path(path).is_dir():
        raise DraftheadError(
            f"prompts: {path} is a folder; name the JSONL or Parquet file in it, or give "
            "the folder as `dataset`"
        )
    if Path(path).exists() and not Path(path).is_file():
        raise DraftheadError(
            f"prompts: {path} is a pipe or a device; prompts are read more than once, so write "
            "them to a file"
        )
    if not Path(path).is_file():
        raise DraftheadError(
            f"prompts: {path}: no such file; a path in a recipe is relative to the folder that "
            "drafthead is run from"
        )


def read_records(source: Source) -> Iterator[tuple[str, Any]]:
    """The records of a source, each with its place (file and line, record or row), for messages.

    Raises:
        DraftheadError: no such file or data set, a broken record (named by number), another format.
    """
    if source.dataset is not None:
        yield from _hub_records(source)
        return
    path = Path(str(source.path))
    check_file(path)
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
    elif path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise DraftheadError(
            f"{path}: prompts come from .jsonl, .json or .parquet, "
            f"found {path.suffix or 'no suffix'}; unpack or convert it"
        )
    elif kind := _BINARY.get(_begins(path)):
        raise DraftheadError(f"{path}: is {kind}, not JSON; rename or unpack it")
    elif _holds_array(path):
        yield from _array_records(path)
    else:
        yield from _line_records(path)


def _line_records(path: Path) -> Iterator[tuple[str, Any]]:
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
        raise DraftheadError(
            f"{where}: broken JSON: {error}; write one record on each line, or the whole file as "
            "one JSON array"
        ) from None


def _begins(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _holds_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a file that is one JSON array, as ShareGPT's is, without holding all of it.

    ``json`` has no incremental parser, but its ``raw_decode`` reads one value and says where that
    ends. Where it fails the value may be cut off by the end of the text read so far: read on.
    """
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        where, number = str(path), 1
        try:
            text = file.read(_CHUNK)
            at = text.index("[") + 1
            while True:
                where = f"{path}, record {number}"
                at = _GAP.match(text, at).end()  # type: ignore[union-attr]  # matches anything
                if text.startswith("]", at):
                    break
                try:
                    record, at = decode(text, at)
                except ValueError as error:
                    # At least as much again, so that a long record is not parsed too many times.
                    more = file.read(max(_CHUNK, len(text) - at))
                    if not more:
                        raise DraftheadError(
                            f"{where}: broken JSON, or the file ends before its array does: "
                            f"{getattr(error, 'msg', error)}"
                        ) from None
                    text, at = text[at:] + more, 0
                    continue
                yield where, record
                number += 1
            if (text[at + 1 :] + file.read(_CHUNK)).strip():
                raise DraftheadError(
                    f"{path}: more text follows the JSON array of {number - 1} records; write one "
                    "array, or one record (an object) on each line"
                )
        except UnicodeDecodeError as error:
            raise DraftheadError(
                f"{where}: not UTF-8 ({error.reason}) in it or after it; save the file as UTF-8"
            ) from None
        except RecursionError as error:
            raise DraftheadError(f"{where}: broken JSON: {error}") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        row = 0
        for batch in pq.ParquetFile(path).iter_batches(_BATCH):
            for record in _rows(batch):
                row += 1
                yield f"{path}, row {row}", record
    # Values that Python has no place for, a date in the year 146,000 say, are of the last kinds.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DraftheadError(f"{path}: not a readable Parquet file: {error}") from None


def _hub_records(source: Source) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.dataset, split=source.split)
    except Exception as error:  # datasets raises many kinds; each says what it is
        raise DraftheadError(
            f"prompts.sources: data set {source.dataset!r}, split {source.split!r} cannot be "
            f"loaded: {error}"
        ) from None
    number = 0
    # As Arrow: `datasets` itself would decode the images and audio of records that are left out.
    for table in dataset.with_format("arrow").iter(_BATCH):
        for record in _rows(table):
            number += 1
            yield f"{source.dataset}, record {number}", record


def _rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a table. What its schema calls JSON is parsed: `datasets` writes values of mixed
    types so, and a plain string beside a list is then `"…"`, quotes and all."""
    rows = table.to_pylist()
    for field in table.schema:
        if "arrow.json" in str(field.type):
            for row in rows:
                row[field.name] = _from_json(row[field.name], field.type)
    return rows


def _from_json(value: Any, type_: pa.DataType) -> Any:
    if value is None:
        return None
    if getattr(type_, "extension_name", None) == "arrow.json":
        parsed = json.loads(value)
        # `datasets` leaves a string as it is if that is JSON already, a user's "42" for one.
        return parsed if isinstance(parsed, (str, list, dict)) else value
    if pa.types.is_struct(type_):
        return {field.name: _from_json(value[field.name], field.type) for field in type_}
    if isinstance(value, list):
        return [_from_json(item, type_.value_type) for item in value]
    return value
