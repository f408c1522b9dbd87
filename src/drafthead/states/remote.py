"""Finished files of a run kept at a URL that fsspec knows (s3://, gs://, hdfs://, file://, …).

A file appears there whole or not at all: object stores put whole objects; where there is a rename,
it is under another name until it is whole. A unit's index goes last, as in a local store.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_file, disk_errors, sha256_file
from drafthead.progress import progress
from drafthead.states.format import StoreMeta
from drafthead.states.index import load_unit, unit_numbers, unit_path

# These put whole objects, and renaming would copy them.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "oci", "oss", "hf"}
_HALF = re.compile(r"\..+\.[0-9a-f]{32}")


class Location:
    """A folder at a URL.

    Raises:
        DraftheadError: a scheme that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise DraftheadError(f"{url}: cannot be used as a location: {error}") from None
        schemes = self._fs.protocol
        self._whole = bool(
            _OBJECT_STORES & ({schemes} if isinstance(schemes, str) else set(schemes))
        )

    def exists(self, name: str) -> bool:
        with self._said(name):
            return bool(self._fs.exists(self._at(name)))

    def names(self, folder: str) -> set[str]:
        """The files in a folder, without its name; none if there is no such folder."""
        self._fs.invalidate_cache()
        with self._said(folder):
            try:
                paths = self._fs.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return set()
        return {PurePosixPath(path).name for path in paths}

    def sweep(self, folder: str) -> None:
        """Delete what killed workers left half copied in a folder. Only while none writes there."""
        for name in filter(_HALF.fullmatch, self.names(folder)):
            self.remove(f"{folder}/{name}")

    def remove(self, name: str) -> None:
        with self._said(name):
            self._fs.rm(self._at(name))

    def put(self, local: Path, name: str) -> None:
        """Copy a file there, replacing an existing one."""
        final = self._at(name)
        with self._said(name), disk_errors(final):
            if self._whole:
                self._fs.put_file(str(local), final)
                return
            folder, _, last = final.rpartition("/")
            self._fs.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
            self._fs.put_file(str(local), temporary)
            self._fs.mv(temporary, final)

    def get(self, name: str, local: Path) -> None:
        """Copy a file here, whole or not at all."""
        with self._said(name), atomic_file(local) as temporary:
            try:
                self._fs.get_file(self._at(name), str(temporary))
            except FileNotFoundError:
                raise DraftheadError(f"{self.url}/{name}: not found") from None

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Turn a location's errors, which are of any kind, into one that names the file."""
        try:
            yield
        except DraftheadError:
            raise
        except Exception as error:
            raise DraftheadError(
                f"{self.url}/{name}: {error}; can this machine read and write there?"
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def publish_unit(store: Path, meta: StoreMeta, number: int, to: Location, folder: str) -> None:
    """Copy a finished unit of a local store to ``folder`` there: shards, then its index, in the
    place of one from before, which does not count while they are replaced."""
    path = unit_path(store, number)
    index = f"{folder}/{path.name}"
    if to.exists(index):
        to.remove(index)
    for shard in load_unit(store, meta, number).shards:
        to.put(store / shard.file, f"{folder}/{shard.file}")
    to.put(path, index)


def fetch_store(location: Location, folder: str, store: Path, console: Console) -> dict[str, Any]:
    """Download the units that a local copy of a store lacks; existing ones are kept.

    Returns:
        Counts of units brought and of bytes.

    Raises:
        DraftheadError: no store there, or a unit is not what it was written as.
    """
    location.get(f"{folder}/meta.json", store / "meta.json")
    meta = StoreMeta.load(store)
    published = location.names(folder)
    units = {n for n in range(meta.units) if unit_path(store, n).name in published}
    missing, size = sorted(units - set(unit_numbers(store))), 0
    aside = store / ".incoming"
    try:
        with progress(console, "fetching states", len(missing), unit="units") as bar:
            for number in bar.each(missing):
                index = unit_path(store, number)
                location.get(f"{folder}/{index.name}", aside / index.name)
                with _broken_there(f"{location.url}/{folder}/{index.name}"):
                    shards = load_unit(aside, meta, number).shards
                for shard in shards:
                    location.get(f"{folder}/{shard.file}", store / shard.file)
                    with _broken_there(f"{location.url}/{folder}/{index.name}"):
                        if sha256_file(store / shard.file) != shard.sha256:
                            raise DraftheadError(f"{shard.file}: its checksum is not the index's")
                    size += shard.bytes
                os.replace(aside / index.name, index)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"units": len(missing), "bytes": size}


@contextlib.contextmanager
def _broken_there(index: str) -> Iterator[None]:
    """Report a broken remote unit as remote: a new copy of it would be as broken."""
    try:
        yield
    except DraftheadError as error:
        raise DraftheadError(
            f"{index}: the remote unit is broken ({error}); delete that file, and the same command "
            "makes the unit again"
        ) from None
