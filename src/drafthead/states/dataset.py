"""What training draws from: samples by number, and columns that tell of them beforehand."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from drafthead.errors import DraftheadError
from drafthead.states.format import Sample, StoreMeta, gathered


class Samples:
    """Samples in the order of the units and of the prompts in them, the same whoever made them.

    Columns, each with one entry a sample: ``tokens`` int64 [N] (T), ``states`` int64 [N] (T'),
    ``prompt`` int64 [N], ``conversation`` and ``split`` object [N].

    Args:
        path: where they come from, for messages.
        meta: what the states are of.
        groups: how many samples each shard holds; they make the order of shuffling.
        aux_layers: hand out only these of the captured auxiliary layers; the attribute of that
            name says which are handed out.
    """

    tokens: np.ndarray
    states: np.ndarray
    prompt: np.ndarray
    conversation: np.ndarray
    split: np.ndarray

    def __init__(
        self, path: Path, meta: StoreMeta, groups: list[int], aux_layers: Iterable[int] | None
    ):
        self.path, self.meta = path, meta
        self.aux_layers, self.columns = _selected(path, meta, aux_layers)
        self._shards = len(groups)
        self._shard = np.repeat(np.arange(len(groups)), groups)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def expect(self, order: Iterable[int]) -> None:
        """Announce which samples will be read next, in order, so that they can be prepared."""

    def notes(self) -> list[str]:
        """What people should know once the samples were used."""
        return []

    def close(self) -> None:
        """Give back what the samples are made with."""

    def place(self, index: int) -> int:
        """The number of a sample, counted from the front.

        Raises:
            IndexError: there is none.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        return int(index) % len(self)

    def chosen(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a sample's stored states those of the layers to hand out."""
        if self.columns is None:
            return stored
        columns = [column for column in self.columns if column < stored["states"].shape[1]]
        return {
            name: tensor if name == "final" else gathered(tensor, (slice(None), columns))
            for name, tensor in stored.items()
        }

    def indices(self, split: str) -> np.ndarray:
        """int64 [n]: the samples of ``train`` or ``heldout``, in their order."""
        return np.flatnonzero(self.split == split)

    def order(self, seed: int, split: str | None = None, pool: int = 8) -> np.ndarray:
        """int64 [n]: the samples shuffled across shards, the same for the same seed.

        Shards are shuffled, then the samples of each ``pool`` of them together, so that a store
        larger than memory is read nearly in sequence, ``pool`` shards at a time.
        """
        rng = np.random.default_rng(seed)
        in_split = np.ones(len(self), bool) if split is None else self.split == split
        shards = rng.permutation(self._shards)
        rank = np.empty(self._shards, np.int64)
        rank[shards] = np.arange(self._shards) // pool
        keys = (rng.permutation(len(self)), rank[self._shard])
        mixed = np.lexsort(keys)
        return mixed[in_split[mixed]]

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


def chosen_layers(
    path: Path, captured: tuple[int, ...], layers: Iterable[int] | None
) -> tuple[int, ...]:
    """The auxiliary layers to hand out of those captured, ascending; None wants all.

    Raises:
        DraftheadError: none, or one that was not captured.
    """
    if layers is None:
        return tuple(captured)
    chosen = tuple(sorted(set(layers)))
    unknown = [layer for layer in chosen if layer not in captured]
    if unknown or not chosen:
        raise DraftheadError(
            f"head.aux_layers: {unknown or 'empty'}: {path} holds the layers "
            f"{list(captured)}; set capture.aux_layers to capture others"
        )
    return chosen


def _selected(
    path: Path, meta: StoreMeta, layers: Iterable[int] | None
) -> tuple[tuple[int, ...], list[int] | None]:
    """The auxiliary layers to hand out, ascending, and their places in a shard with that of the
    last layer; None for the places if all are wanted."""
    chosen = chosen_layers(path, meta.aux_layers, layers)
    if layers is None:
        return chosen, None
    return chosen, [*(meta.layers.index(layer) for layer in chosen), len(meta.layers) - 1]
