"""Whichever record of a run was altered, cut short or is another version's: it is named."""

import contextlib
import copy
import json

import pytest
from rich.console import Console

from drafthead.errors import DraftheadError
from drafthead.fsio import read_json, write_json
from drafthead.prove.proof import seal
from drafthead.report.page import report
from tests.prove import made_run

RECORDS = (
    *(".stages/capture.done.json", ".stages/generate.done.json", ".stages/train.done.json"),
    *("bench.json", "proof.json", "verify.json", "train/best.json", "train/metrics.jsonl"),
    "vocab/coverage.json",
)
ALIKE = ("by_source", "beside", "sha256", "commands", "served")
"""What stands under a name in these is of one kind."""
GONE = object()
OTHERS = (
    *(None, "text", -1, 0, 3.5, [], {}, True, [None], {"a": None}, 10**400, 1e308),
    *(float("nan"), float("inf"), "\ud800"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    recipe, run = made_run.make(tmp_path_factory.mktemp("made"), ks=(3, 1))
    bench = read_json(run.bench_json, "")
    for cell in [*bench["grid"], *(other["grid"][0] for other in bench["beside"].values())]:
        del cell["pairs"]  # nothing of the report reads them, and they are most of the file
    write_json(run.bench_json, bench)
    return recipe, run


def fields(content, at=()):
    """Where everything in ``content`` is, of lists and of what is alike only the first."""
    yield at
    if isinstance(content, list) and content:
        yield from fields(content[0], (*at, 0))
    elif isinstance(content, dict):
        first = dict([*content.items()][:1]) if at and at[-1] in ALIKE else content
        for name in first:
            yield from fields(content[name], (*at, name))


def changed(content, at, value):
    if not at:
        return None if value is GONE else value
    content = inner = copy.deepcopy(content)
    for part in at[:-1]:
        inner = inner[part]
    if value is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return content


def attempts(content):
    """``content`` without each of its fields, and with something else there."""
    for number, at in enumerate(sorted(fields(content), key=str)):
        for value in (GONE, OTHERS[number % len(OTHERS)]):
            yield at, changed(content, at, value)


def told(made) -> str | None:
    """What the report says against the run, if it does."""
    recipe, run = made
    try:
        report(recipe, run, console=Console(quiet=True))
    except DraftheadError as error:
        return str(error)
    return None


@pytest.mark.parametrize("record", RECORDS)
def test_a_field_that_is_gone_or_something_else_is_no_traceback(made, record):
    path = made[1].root / record
    text = path.read_text()
    lines = text.splitlines() if record.endswith(".jsonl") else []
    refused = 0
    try:
        for at, content in attempts(json.loads(lines[-1] if lines else text)):
            if record == "proof.json" and isinstance(content, dict) and at != ("seal",):
                with contextlib.suppress(UnicodeEncodeError):
                    content["seal"] = seal(content)
            path.write_text("\n".join([*lines[:-1], json.dumps(content)]))
            error = told(made)
            refused += error is not None
            assert error is None or str(path) in error, at
    finally:
        path.write_text(text)
    assert refused
    assert told(made) is None


@pytest.mark.parametrize("record", [r for r in RECORDS if r.endswith(".json")])
def test_a_record_cut_short_is_named(made, record):
    path = made[1].root / record
    text = path.read_text()
    try:
        for end in (0, 1, len(text) // 2, len(text) - 3):
            path.write_text(text[:end])
            assert str(path) in told(made)
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("record", "at", "value", "words"),
    [
        ("bench.json", ("commands",), GONE, r"no `commands` in it; .*measure anew with"),
        ("bench.json", ("grid",), [], "`grid`: List should have at least 1 item.*, found []"),
        ("bench.json", ("grid", 1, "step_s"), GONE, "no `grid.1.step_s` in it"),
        ("bench.json", ("speedup",), "fast", "`speedup`: Input should be a valid number, found 'f"),
        ("verify.json", ("runs",), GONE, "no `runs` in it; .*prove anew with"),
        ("vocab/coverage.json", ("curve",), GONE, "no `curve` in it"),
        ("train/best.json", ("heldout",), GONE, "no `heldout` in it"),
        (".stages/generate.done.json", ("summary", "heldout"), GONE, "no `summary.heldout` in it"),
        (".stages/train.done.json", ("summary",), 3, "`summary`: Input should be a valid dict"),
    ],
)
def test_the_field_and_the_mend_are_named(made, record, at, value, words):
    path = made[1].root / record
    before = read_json(path, "")
    write_json(path, changed(before, at, value))
    try:
        error = told(made)
    finally:
        write_json(path, before)
    assert error.startswith(f"{path}: not ")
    for part in words.split(".*"):
        assert part in error
