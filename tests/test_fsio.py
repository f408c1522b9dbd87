"""Whole files or nothing; one run in a folder at a time."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import NotRequired

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from drafthead import fsio
from drafthead.errors import DraftheadError
from tests.refused import refused


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    fsio.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("a.json"):
        fsio.write_json(path, {"a": 2})
    assert fsio.read_json(path, "a test") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_is_named_as_the_user_knows_it(tmp_path, monkeypatch):
    def denied(path, _mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(fsio, "open", denied, raising=False)
    with refused("r.yaml"):
        fsio.write_bytes(tmp_path / "r.yaml", b"")


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        fsio.write_json(tmp_path / "a.json", {"a": float("nan")})


def test_broken_json_names_file_and_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"a": }')
    with refused("a.json", "line 2"):
        fsio.read_json(path, "a test")
    with refused("b.json"):
        fsio.read_json(tmp_path / "b.json", "a test")


class Shape(TypedDict):
    a: NotRequired[fsio.Number | None]
    b: fsio.Natural


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "Input should be a valid dictionary, found []"),
        ('{"a": 1}', "no `b` in it"),
        ('{"b": "3"}', "`b`: Input should be a valid integer, found '3'"),
        ('{"b": true}', "`b`: Input should be a valid integer, found True"),
        ('{"b": 0}', "`b`: Input should be greater than or equal to 1, found 0"),
        ('{"b": 1, "a": NaN}', "`a`: "),
        ('{"b": 1, "c": "\\ud800"}', "hex escape"),
    ],
)
def test_json_of_another_shape_names_field_and_mend(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DraftheadError) as error:
        fsio.read_json(path, "a test", Shape, "mend it")
    assert words in str(error.value)
    if "ud800" not in content:
        assert str(error.value).startswith(f"{path}: not a test: ")
        assert str(error.value).endswith("another version: mend it")
    path.write_text('{"a": 1, "b": 2, "c": "\\ud83d\\ude00"}')
    assert fsio.read_json(path, "a test", Shape) == {"a": 1, "b": 2, "c": "😀"}


def test_atomic_dir_gives_files_the_usual_permissions(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("x")
    mine.chmod(0o600)
    with fsio.atomic_dir(tmp_path / "made") as folder:
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        (folder / "link").symlink_to(mine)
    plain = tmp_path / "plain"
    plain.touch()
    made = tmp_path / "made" / "a.safetensors"
    assert made.stat().st_mode == plain.stat().st_mode
    assert mine.stat().st_mode & 0o777 == 0o600


def test_atomic_dir_keeps_the_old_folder_on_error(tmp_path):
    final = tmp_path / "out"
    with fsio.atomic_dir(final) as folder:
        (folder / "x").write_text("1")
    with pytest.raises(RuntimeError), fsio.atomic_dir(final) as folder:
        (folder / "x").write_text("2")
        raise RuntimeError
    assert (final / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_second_run_in_a_folder_is_refused(tmp_path):
    with (
        fsio.RunLock(tmp_path),
        refused(f"process {os.getpid()}"),
        fsio.RunLock(tmp_path),
    ):
        pass
    with fsio.RunLock(tmp_path):
        pass


def test_fingerprint_ignores_the_order_of_keys():
    assert fsio.fingerprint({"a": 1, "b": 2}) == fsio.fingerprint({"b": 2, "a": 1})
    assert fsio.fingerprint({"a": 1}) != fsio.fingerprint({"a": 2})


def test_a_long_value_is_shortened_whatever_it_is_made_of():
    assert fsio.shortened("ab", 5) == "'ab'"
    assert fsio.shortened("x" * 100, 8) == "'xxxxxx…"
    assert fsio.shortened("x y " * 100, 8) == "'x y x …"
    assert len(fsio.shortened(["x" * 100])) == 80


def test_two_that_write_the_same_folder_at_once_each_write_a_whole_one(tmp_path):
    final = tmp_path / "out"
    with fsio.atomic_dir(final) as mine:
        (mine / "a").write_text("mine")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), fsio.atomic_dir(final) as theirs:
                (theirs / "a").write_text("theirs")
                os._exit(0 if (mine / "a").read_text() == "mine" else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        (mine / "b").write_text("mine")
    assert [(final / name).read_text() for name in "ab"] == ["mine", "mine"]
    with fsio.atomic_dir(final):  # what the dead one left goes
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def brought(monkeypatch):
    """What is brought to disk, and what then takes another's place, in order."""
    done, fsync = [], os.fsync

    def synced(fd):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def noted(real):
        return lambda source, target: done.append("renamed") or real(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    return done


def test_a_folder_takes_its_place_once_all_in_it_is_on_disk(tmp_path, brought):
    with fsio.atomic_dir(tmp_path / "out") as folder:
        (folder / "a").touch()
        (folder / "in").mkdir()
        (folder / "in" / "b").touch()
    assert {"a", "b", "in", folder.name} == set(brought[:4])
    assert brought[4:] == ["renamed", tmp_path.name]
    assert (tmp_path / "out" / "in" / "b").exists()


def test_a_files_name_is_on_disk_too(tmp_path, brought, monkeypatch):
    fsio.write_bytes(tmp_path / "a", b"1")
    assert brought[1:] == ["renamed", tmp_path.name]
    real = os.fsync

    def files_only(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", files_only)  # as some network file systems
    fsio.write_bytes(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"


def test_a_file_system_that_cannot_lock_is_no_other_run(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fsio.fcntl, "flock", flock)
    with refused(".lock", "Function not implemented"):
        fsio.RunLock(tmp_path).__enter__()


def test_what_the_disk_refuses_safetensors_is_said_as_all_else_is(tmp_path):
    path = tmp_path / "head"
    with refused("head"), fsio.disk_errors(path):
        save_file({"a": torch.zeros(1)}, path / "a.safetensors")  # as it says that a disk is full
    broken = tmp_path / "broken"
    broken.write_bytes(b"x")
    with pytest.raises(SafetensorError), fsio.disk_errors(path):
        load_file(broken)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_goes_on_leading_to_it(tmp_path, there):
    disk, link = tmp_path / "disk", tmp_path / "head"
    disk.mkdir()
    if there:
        (disk / "head").mkdir()
    link.symlink_to(disk / "head")
    for text in ("first", "second"):
        with fsio.atomic_dir(link) as temporary:
            (temporary / "file").write_text(text)
        assert (disk / "head" / "file").read_text() == text
    assert link.is_symlink()
    assert [p.name for p in disk.iterdir()] == ["head"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "head"]


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are read to be hashed; time stamps are trusted at once."""
    names, real = [], fsio.sha256_file
    monkeypatch.setattr(fsio, "_hashes", fsio._Hashes())
    monkeypatch.setattr(fsio, "_TIME_STAMP_NS", -fsio._TIME_STAMP_NS)
    monkeypatch.setattr(fsio, "sha256_file", lambda p: names.append(Path(p).name) or real(p))
    return names


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path, hashed):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert fsio.file_hash(path) == fsio.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["a"]
    path.write_bytes(b"four")  # another size
    assert fsio.file_hash(path) == hashlib.sha256(b"four").hexdigest()
    path.write_bytes(b"five")
    os.utime(path, ns=(0, 0))  # the same size, another time
    assert fsio.file_hash(path) == hashlib.sha256(b"five").hexdigest()
    os.utime(path, ns=(1, 1))
    (tmp_path / "b").write_bytes(b"nine")
    os.utime(tmp_path / "b", ns=(0, 0))
    os.replace(tmp_path / "b", path)  # the size and time of the content that was hashed
    assert fsio.file_hash(path) == hashlib.sha256(b"nine").hexdigest()


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(fsio, "_TIME_STAMP_NS", 3600 * 10**9)
    (tmp_path / "a").write_bytes(b"one")
    fsio.file_hash(tmp_path / "a")
    fsio.file_hash(tmp_path / "a")
    assert hashed == ["a", "a"]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"x": 1}', None])
def test_hashes_are_kept_for_the_next_process(tmp_path, hashed, monkeypatch, damaged):
    monkeypatch.setattr(fsio, "_WORTH_KEEPING", 2)
    run = tmp_path / "run"
    fsio.keep_hashes(run)
    for name in ("target", "a"):
        (tmp_path / name).write_text(name)
        fsio.file_hash(tmp_path / name)
    assert list(json.loads((run / ".hashes.json").read_text())) == [str(tmp_path / "target")]
    monkeypatch.setattr(fsio, "_hashes", fsio._Hashes())  # as in another process
    if damaged:
        (run / ".hashes.json").write_text(damaged)
    fsio.keep_hashes(run)
    assert fsio.file_hash(tmp_path / "target") == hashlib.sha256(b"target").hexdigest()
    assert hashed == ["target", "a", *(["target"] if damaged else [])]


def test_a_run_that_cannot_be_written_to_keeps_no_hashes(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(fsio, "_WORTH_KEEPING", 1)
    (tmp_path / "run").touch()
    fsio.keep_hashes(tmp_path / "run")
    assert fsio.file_hash(tmp_path / "run") == hashlib.sha256(b"").hexdigest()
    (tmp_path / "a").write_text("a")
    assert fsio.file_hash(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()


def test_hashes_are_kept_in_the_run_though_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(fsio, "_hashes", fsio._Hashes())
    monkeypatch.setattr(fsio, "_WORTH_KEEPING", 1)
    monkeypatch.setattr(fsio, "_TIME_STAMP_NS", -1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").write_text("target")
    monkeypatch.chdir(tmp_path)
    fsio.keep_hashes(Path("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    fsio.file_hash(tmp_path / "target")
    assert (tmp_path / "run" / ".hashes.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
