"""Reads a state store: random access by sample, memory-mapped, checked before it is believed."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from drafthead.errors import DraftheadError
from drafthead.fsio import sha256_file
from drafthead.states.format import Sample, StoreMeta, shard_tensors
from drafthead.states.index import Shard, load_unit, missing_units, unit_numbers


class StateReader:
    """The samples of a state store, as a sequence.

        reader = StateReader("runs/demo/states")
        reader.meta.aux_layers, reader.meta.hidden_size     # (2, 15, 27), 576
        len(reader), reader.tokens.sum()                    # samples, tokens
        sample = reader[7]                                  # ids, loss_mask, aux, last, …
        for sample in reader.stream(reader.order(seed=0, split="train")): ...

    Opening reads the index only. Columns of the index, each with one entry a sample:
    ``tokens`` int64 [N] (T), ``states`` int64 [N] (T'), ``prompt`` int64 [N], ``conversation``
    and ``split`` object [N]. Samples come in the order of the units and of the prompts in them,
    the same whoever wrote the store.

    ``reader[i]`` gives a ``Sample`` whose tensors are private or memory-mapped read-only pages:
    do not write to them. Thread-safe. A shard's checksum is verified when it is first touched
    (``verify=False`` leaves that out: only after `drafthead states check`). A store that lacks
    units is refused, unless ``partial``. ``aux_layers``: hand out only these of the captured
    auxiliary layers; the attribute of that name says which are handed out.

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
        self.path = Path(path)
        if not self.path.is_dir():
            raise DraftheadError(
                f"{self.path}: no such state store; `drafthead capture RECIPE` makes one"
            )
        self.meta = StoreMeta.load(self.path)
        self.aux_layers, self._columns = _selected(self.path, self.meta, aux_layers)
        numbers = unit_numbers(self.path)
        missing, first = missing_units(self.meta, numbers)
        if missing > 0 and not partial:
            raise DraftheadError(
                f"{self.path}: {missing} of {self.meta.units} units are missing (the first is "
                f"{first}); `drafthead capture RECIPE` goes on where it stopped"
            )
        self.units = [load_unit(self.path, self.meta, number) for number in numbers]
        self.shards = [shard for unit in self.units for shard in unit.shards]
        for shard in self.shards:
            check_size(self.path, shard)
        self._verify = verify
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()

        def column(name: str, dtype: Any) -> np.ndarray:
            return np.array([v for s in self.shards for v in getattr(s, name)], dtype=dtype)

        self.tokens = column("tokens", np.int64)
        self.states = column("states", np.int64)
        self.prompt = column("prompt", np.int64)
        self.conversation = column("conversation", object)
        self.split = column("split", object)
        counts = [len(shard.tokens) for shard in self.shards]
        self._shard = np.repeat(np.arange(len(counts)), counts)
        self._token_start = _starts(self.tokens, counts)
        self._state_start = _starts(self.states, counts)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        index = int(index) % len(self)
        handle = self._handle(int(self._shard[index]))
        start, stop = self._token_start[index], self._token_start[index] + self.tokens[index]
        first, end = self._state_start[index], self._state_start[index] + self.states[index]
        states = handle.get_slice("states")[int(first) : int(end)]
        scale = None
        if self.meta.encoding == "fp8":
            scale = handle.get_slice("scale")[int(first) : int(end)]
        if self._columns is not None:
            states = states[:, self._columns]
            scale = None if scale is None else scale[:, self._columns]
        return Sample(
            ids=handle.get_slice("ids")[int(start) : int(stop)],
            loss_mask=handle.get_slice("loss_mask")[int(start) : int(stop)],
            states=states,
            num_aux=len(self.aux_layers),
            prompt_len=int(self.prompt[index]),
            conversation=self.conversation[index],
            split=self.split[index],
            scale=scale,
        )

    def indices(self, split: str) -> np.ndarray:
        """int64 [n]: the samples of ``train`` or ``heldout``, in store order."""
        return np.flatnonzero(self.split == split)

    def order(self, seed: int, split: str | None = None, pool: int = 8) -> np.ndarray:
        """int64 [n]: the samples shuffled across shards, the same for the same seed.

        Shards are shuffled, then the samples of each ``pool`` of them together, so that a store
        larger than memory is read nearly in sequence, ``pool`` shards at a time.
        """
        rng = np.random.default_rng(seed)
        wanted = np.ones(len(self), bool) if split is None else self.split == split
        shards = rng.permutation(len(self.shards))
        rank = np.empty(len(self.shards), np.int64)
        rank[shards] = np.arange(len(self.shards)) // pool
        keys = (rng.permutation(len(self)), rank[self._shard])
        mixed = np.lexsort(keys)
        return mixed[wanted[mixed]]

    def stream(self, order: Iterable[int], ahead: int = 16, threads: int = 2) -> Iterator[Sample]:
        """The samples of ``order``, read by threads up to ``ahead`` of the consumer."""
        with ThreadPoolExecutor(threads, thread_name_prefix="reader") as pool:
            waiting: deque = deque()
            try:
                for index in order:
                    waiting.append(pool.submit(self.__getitem__, int(index)))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _handle(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                shard = self.shards[number]
                self._open[number] = open_shard(self.path, self.meta, shard, verify=self._verify)
            return self._open[number]


def _selected(
    path: Path, meta: StoreMeta, wanted: Iterable[int] | None
) -> tuple[tuple[int, ...], list[int] | None]:
    """The auxiliary layers to hand out, ascending, and their places in a shard with that of the
    last layer; None for the places if all are wanted."""
    if wanted is None:
        return tuple(meta.aux_layers), None
    chosen = tuple(sorted(set(wanted)))
    unknown = [layer for layer in chosen if layer not in meta.aux_layers]
    if unknown or not chosen:
        raise DraftheadError(
            f"head.aux_layers: {unknown or 'empty'}: {path} holds the layers "
            f"{list(meta.aux_layers)}; set capture.aux_layers to capture others"
        )
    return chosen, [*(meta.layers.index(layer) for layer in chosen), len(meta.layers) - 1]


def _starts(lengths: np.ndarray, counts: list[int]) -> np.ndarray:
    """Offset of each sample within its shard."""
    groups = np.split(lengths, np.cumsum(counts)[:-1]) if counts else []
    return np.concatenate([np.cumsum(g) - g for g in groups]) if groups else lengths


def check_size(store: Path, shard: Shard) -> None:
    path = store / shard.file
    try:
        found = path.stat().st_size
    except OSError:
        raise DraftheadError(f"{path}: the shard is missing; {MEND}") from None
    if found != shard.bytes:
        raise DraftheadError(
            f"{path}: {found:,} bytes where the index says {shard.bytes:,} (truncated?); {MEND}"
        )


def open_shard(store: Path, meta: StoreMeta, shard: Shard, *, verify: bool) -> Any:
    """A memory-mapped handle of a shard that is what the index says it is.

    Raises:
        DraftheadError: missing, of another size, altered, swapped or not a safetensors file.
    """
    path = store / shard.file
    check_size(store, shard)
    if verify and sha256_file(path) != shard.sha256:
        raise DraftheadError(f"{path}: altered: its checksum is not the index's; {MEND}")
    try:
        handle = safe_open(path, framework="pt")
        found = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        shapes = {key: (part.get_dtype(), part.get_shape()) for key, part in found.items()}
        name = (handle.metadata() or {}).get("drafthead")
    except (SafetensorError, OSError, ValueError) as error:
        raise DraftheadError(f"{path}: not a readable safetensors file: {error}; {MEND}") from None
    if name != f"{meta.fingerprint}/{shard.file}":
        raise DraftheadError(f"{path}: is another shard ({name}), swapped or renamed; {MEND}")
    expected = shard_tensors(meta, sum(shard.tokens), sum(shard.states))
    if shapes != expected:
        raise DraftheadError(f"{path}: holds {shapes}, the index says {expected}; {MEND}")
    return handle


MEND = "`drafthead states check DIR --repair`, then `drafthead capture`, redoes what is broken"
