"""Small, safe file operations: whole files or nothing, and one run in a folder at a time."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError

from drafthead.errors import DraftheadError

_LARGE = 1e15
"""Nothing that is counted or measured here is larger, and what is computed of it stays finite."""
Count = Annotated[int, Field(strict=True, ge=0, le=_LARGE)]
Natural = Annotated[int, Field(strict=True, ge=1, le=_LARGE)]
Amount = Annotated[float, Field(strict=True, ge=0, le=_LARGE)]
Number = Annotated[float, Field(strict=True, ge=-_LARGE, le=_LARGE)]
"""As the three above: not NaN, and an integer too. All for the shapes of :func:`read_json`."""

# Hashes of smaller files are not written down: they take no time.
_WORTH_KEEPING = 1 << 20
# The coarsest time stamps of common file systems (FAT's).
_TIME_STAMP_NS = 2_000_000_000

_FIXES = {
    errno.ENOSPC: "the disk is full; free some space or move the run, then run again",
    errno.EDQUOT: "your disk quota is used up; free some space, then run again",
    errno.EACCES: "no permission; choose a file or folder that you may read and write",
    errno.EPERM: "not permitted; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EEXIST: "is there already and is no folder; choose another path",
    errno.EISDIR: "is a folder, a file is needed",
    errno.ENAMETOOLONG: "this name is too long for the file system; choose a shorter one",
    errno.EIO: "the disk cannot be read or written (input/output error); look at the disk",
}


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the path and the fix.

    Raises:
        DraftheadError: disk full, quota, no permission, read-only file system, a wrong path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FIXES:
            raise DraftheadError(f"{error.filename or path}: {_FIXES[error.errno]}") from error
        raise
    except SafetensorError as error:  # has the number of an OSError in its words only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and int(number[1]) in _FIXES:
            raise DraftheadError(f"{path}: {_FIXES[int(number[1])]}") from error
        raise


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes ``final`` when the block ends without an
    error, so that after any crash ``final`` is either the old or the new one, never a part, and
    after a power cut too. The block brings what it wrote to disk.

    Raises:
        DraftheadError: as :func:`disk_errors`.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, final)
            _sync_folder(final.parent)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = str(final)  # the name that the user knows
            temporary.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sweep(folder: Path) -> None:
    """Delete what killed processes left of :func:`atomic_file` and :func:`atomic_dir`, in a folder
    and up to two folders below it. Only while nobody writes there.
    """
    for below in ("", "*/", "*/*/"):  # a link to a folder is followed, which `**` would not
        for left in list(folder.glob(f"{below}.*.tmp")):
            _delete(left)
        for old in list(folder.glob(f"{below}.*.old")):
            final = old.with_name(old.name[1:-4])
            if final.exists():
                _delete(old)
            else:  # killed just before the new one took its place
                old.rename(final)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Delete a folder, if there is one, or all that is in it if it is a link. What another process
    has open may leave empty folders (NFS).

    Raises:
        DraftheadError: a file cannot be deleted.
    """
    with disk_errors(folder):
        for parent, folders, files in os.walk(folder, topdown=False):
            for path in (Path(parent, name) for name in folders + files):
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
                else:
                    _remove_empty(path)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path | str, obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically. NaN is refused: no reader could trust it."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path | str, what: str, shape: Any = None, fix: str = "make it anew") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should hold, for the error.
        shape: type that it must fit, such as a TypedDict; it may hold more. None is any.
        fix: what to do if it does not.

    Raises:
        DraftheadError: missing, unreadable, not JSON, or of another shape.
    """
    path = Path(path)
    try:
        # Unlike `json` it refuses halves of characters, which no file could be written with, and
        # brackets without end.
        value = from_json(path.read_bytes())
    except FileNotFoundError:
        raise DraftheadError(f"{path}: not found; it should hold {what}") from None
    except OSError as error:
        raise DraftheadError(f"{path}: cannot be read as {what}: {error}") from error
    except ValueError as error:
        raise DraftheadError(f"{path}: broken JSON in {what}: {error}") from error
    if shape is not None:
        shaped(value, path, what, shape, fix)
    return value


_adapter = functools.cache(TypeAdapter)  # making one takes milliseconds


def shaped(found: Any, where: Path | str, what: str, shape: Any, fix: str = "make it anew") -> Any:
    """What was read, as pydantic makes it a ``shape``: checked at every depth.

    Args:
        found: JSON-able.
        where: the file, for the error.
        what, shape, fix: as for :func:`read_json`.

    Raises:
        DraftheadError: names the first field that is not there, or holds something else.
    """
    try:
        return _adapter(shape).validate_python(found)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"]))
        if wrong["type"] == "missing":
            fault = f"no `{field}` in it"
        else:
            fault = f"{f'`{field}`: ' if field else ''}{wrong['msg']}, "
            fault += f"found {shortened(wrong['input'])}"
        raise DraftheadError(
            f"{where}: not {what}: {fault}; it was altered, or written by another version: {fix}"
        ) from None


@contextlib.contextmanager
def atomic_dir(final: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``final`` when the block ends without an error, its
    files brought to disk.

    An older ``final`` is replaced, or what it leads to if it is a link; leftovers of killed
    processes are swept away first.
    """
    final = Path(final)
    final = final.resolve() if final.is_symlink() else final
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with disk_errors(final):
        for left in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
            pid = left.name.split(".")[-2]
            if left == temporary or not (pid.isdigit() and psutil.pid_exists(int(pid))):
                _delete(left)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            # safetensors makes files that only their owner may read; who serves is often another.
            usual = temporary.stat().st_mode & 0o666
            for path in temporary.rglob("*"):
                if path.is_symlink():
                    continue
                if path.is_dir():
                    _sync_folder(path)
                    continue
                path.chmod(usual)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(temporary)
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            _sync_folder(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class _Hashes:
    """SHA-256 of files by path, each good as long as the file's size and times stay."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self._lock = threading.Lock()
        self._entries: dict[str, list] = {}  # path -> [*_state(path), hash]

    def keep_in(self, file: Path) -> None:
        """Read what earlier processes left in ``file``, and add new hashes to it."""
        self.file = file
        self._entries = self._read() | self._entries

    def get(self, path: str) -> str:
        started, state = time.time_ns(), _state(path)
        entry = self._entries.get(path)
        if entry and entry[:-1] == state:
            return entry[-1]
        digest = sha256_file(path)
        # A file written a moment ago may be written again within the same time stamp.
        if state == _state(path) and started - max(state[1:]) > _TIME_STAMP_NS:
            with self._lock:
                self._entries[path] = [*state, digest]
                if self.file is not None and state[0] >= _WORTH_KEEPING:
                    # A run that cannot be written to is hashed anew each time.
                    with contextlib.suppress(OSError, DraftheadError):
                        write_json(self.file, self._read() | {path: self._entries[path]})
        return digest

    def _read(self) -> dict[str, list]:
        assert self.file is not None
        try:
            entries = dict(json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            return {}  # not there, or damaged: the files are hashed again
        return {p: e for p, e in entries.items() if isinstance(e, list) and len(e) == 4}


_hashes = _Hashes()


def keep_hashes(folder: Path) -> None:
    """Let :func:`file_hash` remember large files' hashes in ``folder`` from now on: hashing a
    target of 60 GB takes a minute, and a run has several processes."""
    _hashes.keep_in(folder.absolute() / ".hashes.json")  # wherever this process goes later


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hex, read only if its size or times have changed since the last call.
    What must notice a decaying disk calls :func:`sha256_file`."""
    return _hashes.get(os.path.abspath(path))


def _state(path: str) -> list[int]:
    """Size, and times of the last change of the content and of the inode, in nanoseconds."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible_files(folder: Path) -> dict[str, Path]:
    """The files of a folder and of those below by their relative names, in order; hidden ones, and
    what lies in hidden folders, are left out."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        str(name): path
        for name, path in files.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }


def fingerprint(obj: Any) -> str:
    """A short stable name (16 hex digits) of a JSON-able object, in whatever order its keys."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shortened(value: Any, width: int = 80) -> str:
    """A value as an error shows it: at most ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def log_tail(path: Path, begin: int) -> str:
    """The last lines written to a log since the offset ``begin``, to append to an error."""
    with path.open("rb") as file:
        file.seek(begin)
        tail = file.read()[-16384:].decode(errors="replace").splitlines()[-15:]
    return f"the end of {path}:\n" + "\n".join(f"  {line}" for line in tail)


class RunLock:
    """Holds a run's folder for one process; the kernel lets go of it when the process dies."""

    def __init__(self, folder: Path | str):
        self.path = Path(folder) / ".lock"
        self._file: Any = None

    def __enter__(self) -> "RunLock":
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise DraftheadError(
                f"{self.path.parent}: another drafthead run (process {holder}) is at work in this "
                "folder; wait for it, or give this run another name"
            ) from None
        except OSError as error:
            self._file.close()
            raise DraftheadError(
                f"{self.path}: cannot be locked ({error}); put the run on a file system with locks"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
