"""Reads a state store: random access by sample, memory-mapped, checked before it is believed."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from drafthead.errors import DraftheadError
from drafthead.fsio import sha256_file
from drafthead.states.format import Sample, StoreMeta, shard_tensors
from drafthead.states.index import Shard, load_unit, missing_units, unit_numbers
from drafthead.states.samples import Samples


class StateReader(Samples):
    """The samples of a state store, as a sequence.

        reader = StateReader("runs/demo/states")
        reader.meta.aux_layers, reader.meta.hidden_size     # (2, 15, 27), 576
        len(reader), reader.tokens.sum()                    # samples, tokens
        sample = reader[7]                                  # ids, loss_mask, aux, last, …
        for sample in reader.stream(reader.order(seed=0, split="train")): ...

    Opening reads the index only: the columns of ``Samples``.

    ``reader[i]`` gives a ``Sample`` whose tensors are private or memory-mapped read-only pages:
    do not write to them. Thread-safe. A shard's checksum is verified when it is first touched
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
            raise DraftheadError(
                f"{path}: no such state store; `drafthead capture RECIPE` makes one"
            )
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
        self._open: dict[int, Any] = {}
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
        handle = self._handle(int(self._shard[index]))
        start, stop = self._token_start[index], self._token_start[index] + self.tokens[index]
        first, end = self._state_start[index], self._state_start[index] + self.states[index]
        stored = {n: handle.get_slice(n)[int(first) : int(end)] for n in self.meta.stored}
        return Sample(
            ids=handle.get_slice("ids")[int(start) : int(stop)],
            loss_mask=handle.get_slice("loss_mask")[int(start) : int(stop)],
            num_aux=len(self.aux_layers),
            prompt_len=int(self.prompt[index]),
            conversation=self.conversation[index],
            split=self.split[index],
            **self.chosen(stored),
        )

    def _handle(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                shard = self.shards[number]
                self._open[number] = open_shard(self.path, self.meta, shard, verify=self._verify)
            return self._open[number]


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
