"""Reads a state store: random access by sample, memory-mapped, checked before it is believed."""

import shlex
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from drafthead.errors import DraftheadError
from drafthead.fsio import file_hash
from drafthead.machine import usable_cores
from drafthead.states.dataset import Samples
from drafthead.states.format import Sample, StoreMeta, shard_tensors
from drafthead.states.index import Shard, load_unit, missing_units, unit_numbers

AHEAD = 8
"""Shards verified before they are wanted: as many as samples are shuffled over."""


class StateReader(Samples):
    """The samples of a state store, as a sequence.

        reader = StateReader("runs/demo/states")
        reader.meta.aux_layers, reader.meta.hidden_size     # (2, 15, 27), 576
        len(reader), reader.tokens.sum()                    # samples, tokens
        sample = reader[7]                                  # ids, loss_mask, aux, last, …
        for sample in reader.stream(reader.order(seed=0, split="train")): ...

    Opening reads the index only: the columns of ``Samples``.

    ``reader[i]`` gives a ``Sample`` whose tensors are private or memory-mapped read-only pages:
    do not write to them. Thread-safe. A shard's checksum is verified before anything of it is
    handed out, by threads of its own and some shards ahead of what ``expect`` was told
    (``verify=False`` leaves that out: only after `drafthead states check`). A store that lacks
    units is refused, unless ``partial``.

    Raises:
        DraftheadError: no store there, or any part of it missing, altered, swapped or broken;
            the message names the file.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: bool = True,
        partial: bool = False,
        aux_layers: Iterable[int] | None = None,
    ):
        path = Path(path)
        if not path.is_dir():
            raise DraftheadError(f"{path}: no such state store; run `drafthead capture RECIPE`")
        meta = StoreMeta.load(path)
        numbers = unit_numbers(path)
        missing, first = missing_units(meta, numbers)
        if missing > 0 and not partial:
            raise DraftheadError(
                f"{path}: {missing} of {meta.units} units are missing (the first is "
                f"{first}); `drafthead capture RECIPE` goes on where it stopped"
            )
        self.units = [load_unit(path, meta, number) for number in numbers]
        self.shards = [shard for unit in self.units for shard in unit.shards]
        for shard in self.shards:
            check_size(path, shard)
        counts = [len(shard.tokens) for shard in self.shards]
        super().__init__(path, meta, counts, aux_layers)
        self._verify = verify
        self._pool = ThreadPoolExecutor(max(1, usable_cores() // 4), "shards")
        self._open: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._ahead: deque[int] = deque()  # shards in the order in which they will be wanted
        self._unused: set[int] = set()  # opened ahead, and not wanted yet
        self._lock = threading.Lock()

        def column(name: str, dtype: Any) -> np.ndarray:
            return np.array([v for s in self.shards for v in getattr(s, name)], dtype=dtype)

        self.tokens = column("tokens", np.int64)
        self.states = column("states", np.int64)
        self.prompt = column("prompt", np.int64)
        self.conversation = column("conversation", object)
        self.split = column("split", object)
        self._token_start = _starts(self.tokens, counts)
        self._state_start = _starts(self.states, counts)

    def __getitem__(self, index: int) -> Sample:
        index = self.place(index)
        shard = self._tensors(int(self._shard[index]))
        start, first = int(self._token_start[index]), int(self._state_start[index])
        stop, end = start + int(self.tokens[index]), first + int(self.states[index])
        return Sample(
            ids=shard["ids"][start:stop],
            loss_mask=shard["loss_mask"][start:stop],
            num_aux=len(self.aux_layers),
            prompt_len=int(self.prompt[index]),
            conversation=self.conversation[index],
            split=self.split[index],
            **self.chosen({name: shard[name][first:end] for name in self.meta.stored}),
        )

    def expect(self, order: Iterable[int]) -> None:
        with self._lock:
            shards = self._shard[np.fromiter(order, np.int64)].tolist()
            self._ahead = deque(dict.fromkeys([*shards, *self._ahead]))
            self._go_ahead()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tensors(self, number: int) -> dict[str, torch.Tensor]:
        """A shard's tensors, memory-mapped."""
        with self._lock:
            self._start(number)
            self._unused.discard(number)
            self._go_ahead()
            opening = self._open[number]
        return opening.result()

    def _go_ahead(self) -> None:
        """With the lock held: open what will be wanted next."""
        while self._ahead and len(self._unused) < AHEAD:
            number = self._ahead.popleft()
            if self._start(number):
                self._unused.add(number)

    def _start(self, number: int) -> bool:
        """With the lock held: begin to open a shard; False if that was begun before."""
        if number in self._open:
            return False
        self._open[number] = self._pool.submit(self._load, self.shards[number])
        return True

    def _load(self, shard: Shard) -> dict[str, torch.Tensor]:
        handle = open_shard(self.path, self.meta, shard, file_hash if self._verify else None)
        return {name: handle.get_tensor(name) for name in ("ids", "loss_mask", *self.meta.stored)}


def _starts(lengths: np.ndarray, counts: list[int]) -> np.ndarray:
    """Offset of each sample within its shard."""
    groups = np.split(lengths, np.cumsum(counts)[:-1]) if counts else []
    return np.concatenate([np.cumsum(g) - g for g in groups]) if groups else lengths


def check_size(store: Path, shard: Shard) -> None:
    path = store / shard.file
    try:
        size = path.stat().st_size
    except OSError:
        raise _broken(path, "the shard is missing") from None
    if size != shard.bytes:
        raise _broken(path, f"{size:,} bytes where the index says {shard.bytes:,} (truncated?)")


def open_shard(
    store: Path, meta: StoreMeta, shard: Shard, checksum: Callable[[Path], str] | None
) -> Any:
    """A memory-mapped handle of a shard that is what the index says it is; ``checksum`` computes
    the SHA-256 to compare, None compares none.

    Raises:
        DraftheadError: missing, of another size, altered, swapped or not a safetensors file.
    """
    path = store / shard.file
    check_size(store, shard)
    try:
        if checksum is not None and checksum(path) != shard.sha256:
            raise _broken(path, "altered: its checksum is not the index's")
        handle = safe_open(path, framework="pt")
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        shapes = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
        name = (handle.metadata() or {}).get("drafthead")
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, f"not a readable safetensors file: {error}") from None
    if name != f"{meta.fingerprint}/{shard.file}":
        raise _broken(path, f"is another shard ({name}), swapped or renamed")
    expected = shard_tensors(meta, sum(shard.tokens), sum(shard.states))
    if shapes != expected:
        raise _broken(path, f"holds {shapes}, the index says {expected}")
    return handle


def _broken(path: Path, fault: str) -> DraftheadError:
    """The error for a shard, with the commands that make its unit again."""
    folder = shlex.quote(str(path.parent))
    return DraftheadError(
        f"{path}: {fault}; `drafthead states check {folder} --repair`, then `drafthead capture "
        "RECIPE`, redoes what is broken"
    )
