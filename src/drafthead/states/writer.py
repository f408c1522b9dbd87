"""Writes a state store in the background, a unit of work at a time."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from drafthead.errors import DraftheadError
from drafthead.fsio import disk_errors
from drafthead.states.format import Sample, StoreMeta, encode, write_shard
from drafthead.states.index import Shard, Unit, save_unit, shard_name, unit_path

T = TypeVar("T")


class StateWriter:
    """Appends finished units to the store at ``path``; encoding, checksums and disk writes happen
    in threads.

        with StateWriter(path, meta) as writer:
            if not writer.has(12):
                writer.submit(12, samples)

    ``submit`` returns at once unless ``pending`` units already wait: then it waits for one of
    them, which bounds memory. A unit counts once its index is on disk; killed before that, it
    leaves nothing that a reader sees. Several writers may share a store, each with its own units.

    Raises:
        DraftheadError: the store at ``path`` holds states of something else; from ``submit`` and
            on leaving the block: the disk is full or refuses (the first such error).
    """

    def __init__(
        self, path: Path | str, meta: StoreMeta, shard_bytes: int = 1 << 30, pending: int = 2
    ):
        self.path, self.meta, self.shard_bytes = Path(path), meta, shard_bytes
        open_store(self.path, meta)
        self._slots = threading.BoundedSemaphore(pending)
        self._threads = ThreadPoolExecutor(pending, thread_name_prefix="states")
        self._futures: list[Future] = []

    def has(self, unit: int) -> bool:
        """Whether ``unit`` is finished."""
        return unit_path(self.path, unit).exists()

    def submit(
        self, unit: int, samples: Iterable[Sample], checks: dict[str, Any] | None = None
    ) -> None:
        """Write ``samples`` as ``unit``, replacing what it held before. They are drawn, and
        ``checks`` is read after the last of them, in a thread of the writer's."""
        self.check()
        checks = {} if checks is None else checks  # an empty one is filled while it is written
        self._slots.acquire()
        future = self._threads.submit(
            write_unit, self.path, self.meta, unit, samples, checks, self.shard_bytes
        )
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)

    def flush(self) -> None:
        """Wait until all that was submitted is on disk. A fault of the program's own is raised at
        once, whatever else is being written."""
        for future in as_completed(self._futures):
            if not isinstance(future.exception(), DraftheadError | None):
                break
        self.check()

    def check(self) -> None:
        """Raise the error of a unit that has failed so far, if there is one not yet raised."""
        for future in [future for future in self._futures if future.done()]:
            self._futures.remove(future)
            future.result()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.check()


def open_store(path: Path, meta: StoreMeta) -> None:
    """Make the store's folder and ``meta.json``, or check that they are of the same inputs."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    if not (path / "meta.json").exists():
        meta.save(path)
        return
    check_same(StoreMeta.load(path), meta, path, "give this run another name")


def check_same(earlier: StoreMeta, meta: StoreMeta, where: Path | str, fix: str) -> None:
    """Check that the store at ``where`` has the same inputs.

    Raises:
        DraftheadError: it is not.
    """
    if earlier != meta:
        old, new = (vars(m) | m.inputs for m in (earlier, meta))
        keys = [k for k in sorted(old | new) if k != "inputs" and old.get(k) != new.get(k)]
        raise DraftheadError(
            f"{where}: holds states of another run: {', '.join(keys)} differ(s) from the recipe; "
            f"{fix}, or delete that folder"
        )


def write_unit(
    store: Path,
    meta: StoreMeta,
    number: int,
    samples: Iterable[Sample],
    checks: dict[str, Any],
    shard_bytes: int,
) -> Unit:
    """Write one unit: its shards, each of at most ``shard_bytes`` or one sample, then its index.

    Raises:
        DraftheadError: the disk refuses, or a sample's shapes do not fit the store.
    """
    unit_path(store, number).unlink(missing_ok=True)
    encoded = (_encoded(sample, meta) for sample in samples)
    shards: list[Shard] = []
    for group in grouped(encoded, lambda s: meta.bytes_of(len(s.ids), len(s.states)), shard_bytes):
        shards.append(_write_group(store, meta, number, len(shards), group))
    beyond = len(shards)
    while (left := store / shard_name(number, beyond)).exists():  # made before, and there were more
        left.unlink()
        beyond += 1
    unit = Unit(number, shards, checks)
    save_unit(store, meta, unit)
    return unit


def grouped(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """What goes into one shard each: as many as fit into ``limit`` bytes, one at least."""
    group: list[T] = []
    total = 0
    for item in items:
        bytes_ = size(item)
        if group and total + bytes_ > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += bytes_
    if group:
        yield group


def _encoded(sample: Sample, meta: StoreMeta) -> Sample:
    check_sample(sample, meta)
    if sample.scale is not None:
        return sample
    return replace(sample, **encode(sample.states, meta.encoding))


def check_sample(sample: Sample, meta: StoreMeta) -> None:
    tokens, (states, *rest) = sample.ids.shape[0], sample.states.shape
    if sample.scale is None:
        fits = rest == [len(meta.layers), meta.hidden_size]
    else:
        fits = meta.stored == {n: (t.dtype, tuple(t.shape[1:])) for n, t in sample.stored.items()}
    if (
        not fits
        or sample.loss_mask.shape[0] != tokens
        or not tokens - 1 <= states <= tokens
        or not 0 <= sample.prompt_len <= tokens
    ):
        raise DraftheadError(
            f"sample {sample.conversation}: states {list(sample.states.shape)}, ids {tokens}, "
            f"prompt {sample.prompt_len} do not fit together; expected states "
            f"[{tokens} or {tokens - 1}, {len(meta.layers)}, {meta.hidden_size}]"
        )


def _write_group(
    store: Path, meta: StoreMeta, number: int, part: int, group: list[Sample]
) -> Shard:
    tensors = {
        "ids": [sample.ids.int() for sample in group],
        "loss_mask": [sample.loss_mask.bool() for sample in group],
    } | {name: [sample.stored[name] for sample in group] for name in meta.stored}
    name = shard_name(number, part)
    size, digest = write_shard(store / name, f"{meta.fingerprint}/{name}", tensors)
    return Shard(
        file=name,
        bytes=size,
        sha256=digest,
        conversation=[sample.conversation for sample in group],
        split=[sample.split for sample in group],
        prompt=[sample.prompt_len for sample in group],
        tokens=[sample.ids.shape[0] for sample in group],
        states=[sample.states.shape[0] for sample in group],
    )
