"""A broken store is refused by name, or it is not broken: never a crash, never wrong states."""

import errno
import json
import resource
import shlex
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from drafthead.cli import app
from drafthead.errors import DraftheadError
from drafthead.fsio import RunLock, sha256_file
from drafthead.states import StateReader, StateWriter, StoreMeta, check
from drafthead.states.check import check_command, check_store, repair
from drafthead.states.format import StoreMeta as Meta
from drafthead.states.index import _digest
from tests.refused import refused
from tests.states.test_store import make_sample

QUIET = Console(quiet=True)
META = StoreMeta((1, 2), 4, 16, "fp8-aux", 3, {"target": "tiny"})  # all kinds of tensors in it


def write_store(path, meta=META, first=0):
    with StateWriter(path, meta, shard_bytes=1500) as writer:
        for unit in range(3):
            writer.submit(unit, [make_sample(first + unit * 4 + i, 6 + i) for i in range(4)])
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("whole"))
    assert len(list(path.glob("unit-000000-*.safetensors"))) > 1
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same shapes, other states and inputs."""
    meta = replace(META, inputs={"target": "other"})
    return write_store(tmp_path_factory.mktemp("other"), meta, first=100)


def content(path):
    reader = StateReader(path)
    return [
        (s.ids, s.loss_mask, s.aux, s.last, s.prompt_len, s.conversation, s.split)
        for s in (reader[i] for i in range(len(reader)))
    ]


def same(a, b):
    return len(a) == len(b) and all(
        all(torch.equal(x, y) for x, y in zip(one[:4], two[:4])) and one[4:] == two[4:]
        for one, two in zip(a, b)
    )


def refused_or_the_same(path, whole):
    """Reads a damaged store; the check must agree with the reader on whether it is whole."""
    read, refusal = attempt(content, path)
    faults, no_check = attempt(lambda path: check_store(path, QUIET), path)
    if refusal is None:
        assert same(read, content(whole))
        assert faults == []
    else:
        assert str(path) in refusal
        assert faults or "meta.json" in no_check


def attempt(function, path):
    try:
        return function(path), None
    except DraftheadError as error:
        return None, str(error)


def copy_of(whole, tmp_path):
    path = tmp_path / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    return path


MANY = settings(max_examples=60)


@MANY
@given(data=st.data())
def test_flipped_truncated_grown_swapped_removed(whole, other, tmp_path, data):
    path = copy_of(whole, tmp_path)
    names = sorted(p.name for p in path.iterdir())
    name = data.draw(st.sampled_from(names))
    file = path / name
    body = bytearray(file.read_bytes())
    damage = data.draw(
        st.sampled_from(["flip", "cut", "grow", "swap", "remove", "foreign", "zero"])
    )
    if damage == "flip":
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    elif damage == "grow":
        body += data.draw(st.binary(min_size=1, max_size=9))
    elif damage == "zero":
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + 64] = bytes(len(body[at : at + 64]))
    file.write_bytes(body)
    if damage == "swap":
        partner = path / data.draw(st.sampled_from(names))
        body, theirs = file.read_bytes(), partner.read_bytes()
        file.write_bytes(theirs)
        partner.write_bytes(body)
    elif damage == "remove":
        file.unlink()
    elif damage == "foreign":
        shutil.copy(other / name, file)
    refused_or_the_same(path, whole)


NUMBERS = st.one_of(st.integers(-3, 12), st.integers(1 << 30, 1 << 70), st.floats(), st.none())
JUNK = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=3), st.booleans()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@MANY
@given(data=st.data())
def test_hostile_index_with_a_right_checksum(whole, tmp_path, data):
    """Whoever forges the index can forge its checksum too: it must still not be believed blindly,
    nor make the reader allocate what it claims."""
    path = copy_of(whole, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if data.draw(st.booleans()):
        file = path / "unit-000001.json"
        record = json.loads(file.read_text())
        record.pop("sha256")
        shard = record["shards"][0]
        place = data.draw(st.sampled_from(["top", "shard", "column"]))
        if place == "top":
            key = data.draw(st.sampled_from(sorted(record)))
            record[key] = data.draw(JUNK)
        elif place == "shard":
            shard[data.draw(st.sampled_from(sorted(shard)))] = data.draw(JUNK)
        else:
            column = shard[data.draw(st.sampled_from(["prompt", "tokens", "states"]))]
            column[0] = data.draw(NUMBERS)
        try:
            text = json.dumps(record | {"sha256": _digest(record)})
        except ValueError:
            return
    else:
        file = path / "meta.json"
        record = json.loads(file.read_text())
        key = data.draw(st.sampled_from(sorted(record)))
        record[key] = data.draw(JUNK)
        try:
            fields = {f: record[f] for f in Meta.__dataclass_fields__}
            record["fingerprint"] = Meta(
                **(fields | {"aux_layers": tuple(fields["aux_layers"])})
            ).fingerprint
        except Exception:
            pass
        text = json.dumps(record)
    file.write_text(text)
    try:
        reader = StateReader(path)
        for i in range(len(reader)):
            sample = reader[i]
            assert len(sample.ids) == len(sample.loss_mask) >= len(sample.states)
    except DraftheadError:
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # Kilobytes. Claims that are large begin at 2**30; what other threads of a long run of tests
    # allocate meanwhile counts too, and was 211 MB once.
    assert grown < 800_000


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", (1 << 63) - 1),
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 1000) + b"{" * 1000,
        b"\0" * 4,
    ],
)
def test_hostile_shard_headers(whole, tmp_path, header):
    path = copy_of(whole, tmp_path)
    shard = path / "unit-000001-00.safetensors"
    body = header + shard.read_bytes()[len(header) :]
    forge(path, shard, body)
    with refused("unit-000001-00.safetensors"):
        content(path)


def forge(path, shard, body):
    """Write a shard and an index that vouches for it."""
    shard.write_bytes(body)
    file = path / "unit-000001.json"
    record = json.loads(file.read_text())
    record.pop("sha256")
    record["shards"][0] |= {"bytes": len(body), "sha256": sha256_file(shard)}
    file.write_text(json.dumps(record | {"sha256": _digest(record)}))


def test_forged_shapes_and_swapped_shards_that_the_index_vouches_for(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    shard = path / "unit-000001-00.safetensors"
    body = shard.read_bytes()
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    header["ids"]["shape"] = [1 << 40]
    text = json.dumps(header).encode()
    forge(path, shard, len(text).to_bytes(8, "little") + text + body[8 + size :])
    with refused("unit-000001-00.safetensors"):
        content(path)
    header = json.loads(body[8 : 8 + size])
    tokens = header["ids"]["shape"][0]
    header["ids"]["shape"], header["ids"]["dtype"] = [tokens * 2], "I16"
    text = json.dumps(header).encode()
    forge(path, shard, len(text).to_bytes(8, "little") + text + body[8 + size :])
    with refused("unit-000001-00.safetensors", "I16"):
        content(path)
    forge(path, shard, (path / "unit-000002-00.safetensors").read_bytes())
    with refused("unit-000001-00.safetensors", "unit-000002-00.safetensors"):
        content(path)


def test_later_version_says_upgrade(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    for name in ("unit-000001.json", "meta.json"):
        record = json.loads((path / name).read_text())
        record["version"] = 3
        record["sha256"] = _digest({k: v for k, v in record.items() if k != "sha256"})
        (path / name).write_text(json.dumps(record))
        with refused(name, "version 3"):
            StateReader(path)


def test_check_names_what_is_broken_and_repair_throws_just_that_out(whole, tmp_path):
    run = tmp_path / "run"
    path = run / "states"
    shutil.copytree(whole, path)
    (run / ".stages").mkdir()
    (run / ".stages" / "capture.done.json").write_text("{}")
    cli = CliRunner()
    assert cli.invoke(app, ["states", "check", str(path)]).exit_code == 0
    broken = sorted(path.glob("unit-000001-*.safetensors"))[1]
    body = bytearray(broken.read_bytes())
    body[-3] ^= 4
    broken.write_bytes(body)
    (path / "unit-000002.json").unlink()

    done = cli.invoke(app, ["states", "check", str(path), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [fault["unit"] for fault in found["faults"]] == [1, 2]
    assert found["mend"] == f"drafthead states check {path} --repair"
    assert broken.name in found["faults"][0]["what"]
    assert found["faults"][0]["conversations"] == ["c4", "c5", "c6", "c7"]
    assert (run / ".stages" / "capture.done.json").exists()

    assert cli.invoke(app, ["states", "check", str(path), "--repair"]).exit_code == 0
    assert not (run / ".stages" / "capture.done.json").exists()
    again = cli.invoke(app, ["states", "check", str(path), "--json"])
    assert json.loads(again.stdout)["mend"] == "drafthead capture RECIPE"
    assert sorted(p.name for p in path.glob("unit-00000[12]*")) == []
    with StateWriter(path, META, shard_bytes=1500) as writer:
        assert [writer.has(unit) for unit in range(3)] == [True, False, False]
        for unit in (1, 2):
            writer.submit(unit, [make_sample(unit * 4 + i, 6 + i) for i in range(4)])
    assert same(content(path), content(whole))
    assert check_store(path, QUIET) == []
    repair(path, [])


@pytest.mark.parametrize("store", [".", "inner/.."])
def test_a_run_is_told_of_a_repair_from_inside_its_store(whole, tmp_path, monkeypatch, store):
    path = tmp_path / "states"
    shutil.copytree(whole, path)
    (path / "inner").mkdir()
    (path / "unit-000001.json").unlink()
    done = tmp_path / ".stages" / "capture.done.json"
    done.parent.mkdir()
    done.write_text("{}")
    monkeypatch.chdir(path)
    with RunLock(tmp_path), refused(tmp_path):
        check_command(store, fix=True, console=QUIET)
    assert (
        check_command(store, fix=False, console=QUIET)["mend"]
        == f"drafthead states check {store} --repair"
    )
    check_command(store, fix=True, console=QUIET)
    assert not done.exists()


def test_the_command_to_type_next_can_be_typed(whole, tmp_path):
    path = tmp_path / "my runs [old]" / "states"
    shutil.copytree(whole, path)
    assert f"{path}: all 3 units" in CliRunner().invoke(app, ["states", "check", str(path)]).stderr
    next(path.glob("unit-000001-*.safetensors")).unlink()
    said = CliRunner().invoke(app, ["states", "check", str(path)]).stderr
    assert shlex.split(said.split("`")[-2])[3:] == [str(path), "--repair"]


def test_states_that_are_not_finite_are_found(tmp_path):
    meta = StoreMeta((1, 2), 4, 16, "fp32", 1, {})
    sample = make_sample(1)
    sample.states[2, 1, 3] = float("nan")
    with StateWriter(tmp_path, meta) as writer:
        writer.submit(0, [sample])
    assert "not finite" in check_store(tmp_path, QUIET)[0].what


def test_a_shard_that_the_disk_no_longer_gives_back_is_one_more_fault(whole, monkeypatch):
    real = check.sha256_file

    def read(path):
        if path.name == "unit-000001-00.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(check, "sha256_file", read)
    (fault,) = check_store(whole, QUIET)
    assert fault.unit == 1
    assert "unit-000001-00.safetensors: not a readable" in fault.what
    assert "Input/output error" in fault.what


def test_nothing_is_thrown_out_while_a_run_is_at_work(whole, tmp_path):
    path = tmp_path / "states"
    shutil.copytree(whole, path)
    (path / "unit-000001.json").unlink()  # as of a unit whose shards are being written
    shards = sorted(path.glob("unit-000001-*"))
    with RunLock(tmp_path), refused(tmp_path):
        check_command(path, fix=True, console=QUIET)
    assert sorted(path.glob("unit-000001-*")) == shards
    assert check_command(path, fix=True, console=QUIET)["repaired"]


def test_a_broken_shard_names_the_commands_for_its_store(whole, tmp_path):
    (tmp_path / "a b").mkdir()
    path = copy_of(whole, tmp_path / "a b")
    shard = next(iter(sorted(path.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    _, refusal = attempt(content, path)
    assert f"`drafthead states check '{path}' --repair`" in refusal
    assert "`drafthead capture RECIPE`" in refusal
