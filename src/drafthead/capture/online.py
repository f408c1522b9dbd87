"""Training on states that never touch a disk: a running engine computes them on request.

The answers are at hand, so every length is known beforehand, and with it the order and the batches
of training: they are those of a store. An engine in a process of its own, on the same GPU or on
another, prefills what training says it will ask for next and leaves the states in shared memory.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from drafthead.capture.checks import NOT_FINITE, check_share
from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import to_keep
from drafthead.capture.plan import make_plan
from drafthead.capture.shared_memory import PAGE, PagePool, pages_needed
from drafthead.data.answers import Answer, part_path, read_part
from drafthead.errors import DraftheadError
from drafthead.fsio import keep_hashes
from drafthead.process import Child, child_main
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import Sample, Samples, StateReader
from drafthead.states.writer import grouped


def open_states(recipe: Recipe, run: RunDir) -> Samples:
    """The states of a run: its store's, or with ``capture.mode: online`` a running engine's."""
    if recipe.capture.mode == "online":
        return OnlineReader(recipe, run, aux_layers=recipe.head.aux_layers)
    return StateReader(run.states, aux_layers=recipe.head.aux_layers)


@dataclass(eq=False)
class _Request:
    """One sample on its way."""

    index: int
    pages: list[int]
    arrived: bool = False


class OnlineReader(Samples):
    """``Samples`` of a run's answers. Thread-safe.

    At most ``capture.online_bytes`` of states are under way or waiting; what training has not said
    it expects is computed when it is asked for, and if need be takes the place of what waits.

    Raises:
        DraftheadError: no answers; from ``reader[i]``: the engine died, or its states failed a
            check.
    """

    def __init__(self, recipe: Recipe, run: RunDir, aux_layers: Iterable[int] | None = None):
        plan = make_plan(recipe)
        meta = plan.meta
        parts = [read_part(part_path(run.answers, unit)) for unit in range(meta.units)]
        groups = [
            len(group)
            for part in parts
            for group in grouped(
                part,
                lambda answer: meta.bytes_of(len(answer.ids), len(answer.ids) - 1),
                recipe.capture.shard_bytes,
            )
        ]
        super().__init__(run.answers, meta, groups, aux_layers)
        self._answers = [answer for part in parts for answer in part]
        self.tokens = np.array([len(answer.ids) for answer in self._answers], np.int64)
        self.states = self.tokens - 1
        self.prompt = np.array([len(answer.prompt_ids) for answer in self._answers], np.int64)
        self.conversation = np.array([answer.conversation for answer in self._answers], object)
        self.split = np.array([answer.split for answer in self._answers], object)
        largest = pages_needed(int(self.states.max(initial=1)) * meta.bytes_per_token)
        count = max(recipe.capture.online_bytes // PAGE, largest)
        self._memory = PagePool.create(count)
        self._free = list(range(count))
        self._ahead: deque[int] = deque()
        self._requests: dict[int, _Request] = {}  # by number, in the order they were sent
        self._unclaimed: dict[int, deque[int]] = {}  # index -> numbers of requests, oldest first
        self._sent = self._arrived = 0
        self._failed: DraftheadError | None = None
        self._labels, self._max_unusable = plan.labels, recipe.capture.max_unusable
        self._unusable: set[str] = set()  # conversations
        self._change = threading.Condition()
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        order = {
            "recipe": recipe.model_dump(mode="json"),
            "run": str(run.top),
            "pages": self._memory.path,
        }
        self._child = Child(
            "online states",
            "drafthead.capture.online",
            order,
            run.root / "logs" / f"online-{rank}.log",
            _devices(recipe, rank),
        )
        threading.Thread(target=self._listen, name="online", daemon=True).start()

    def expect(self, order: Iterable[int]) -> None:
        """Computed next, before what was expected so far, which may lose half of the room."""
        places = [self.place(index) for index in order]
        with self._change:
            room = min(sum(map(self._need, places)), self._memory.count // 2)
            while len(self._free) < room and self._drop_last():
                pass
            self._ahead.extendleft(reversed(places))
            self._pump()

    def __getitem__(self, index: int) -> Sample:
        index = self.place(index)
        answer = self._answers[index]
        with self._change:
            request = self._claim(index)
            while not request.arrived:
                self._wait()
        stored = self._copy(request)
        # The pages of a sample with unusable states are zero (`_Pages`); no state is.
        usable = any(bool(tensor[-1].any()) for tensor in stored.values())
        with self._change:
            self._free += request.pages
            self._pump()
            self._change.notify_all()
            if not usable:
                self._unusable.add(answer.conversation)
                unusable, share = {NOT_FINITE: sorted(self._unusable)}, self._max_unusable
                check_share(unusable, len(self), share, self._labels, more_to_come=False)
        return Sample(
            ids=torch.from_numpy(answer.ids.astype(np.int32)),
            loss_mask=torch.from_numpy(answer.loss_mask & usable),
            num_aux=len(self.aux_layers),
            prompt_len=len(answer.prompt_ids),
            conversation=answer.conversation,
            split=answer.split,
            **self.chosen(stored),
        )

    def notes(self) -> list[str]:
        labels = [self._labels.get(name, name) for name in sorted(self._unusable)]
        examples = "; ".join(labels[:3]) + "; …" * (len(labels) > 3)
        note = f"left out {len(labels)} conversations: their states are not usable ({examples})"
        return [note] if labels else []

    def close(self) -> None:
        """End the engine."""
        self._child.close()
        self._memory.close()

    def _copy(self, request: _Request) -> dict[str, torch.Tensor]:
        rows, stored = int(self.states[request.index]), self.meta.stored
        raw = self._memory.take(request.pages, rows * self.meta.bytes_per_token)
        parts = raw.split([rows * prod(shape) * dtype.itemsize for dtype, shape in stored.values()])
        return {
            name: part.view(dtype).view(rows, *shape)
            for part, (name, (dtype, shape)) in zip(parts, stored.items(), strict=True)
        }

    # Below, `_change` is held.

    def _claim(self, index: int) -> _Request:
        """The oldest request for a sample that nobody has claimed; a new one if there is none."""
        if not self._unclaimed.get(index):
            if index in self._ahead:
                self._ahead.remove(index)
            need = self._need(index)
            while len(self._free) < need:
                if not self._drop_last():
                    self._wait()
            self._send(index)
        number = self._unclaimed[index].popleft()
        if self._requests[number].arrived:
            return self._requests.pop(number)
        return self._requests[number]

    def _drop_last(self) -> bool:
        """Throw away the states that were to be needed last of those that wait unclaimed."""
        for number, request in reversed(self._requests.items()):
            if request.arrived:
                del self._requests[number]
                self._unclaimed[request.index].remove(number)
                self._free += request.pages
                self._ahead.appendleft(request.index)
                return True
        return False

    def _pump(self) -> None:
        """Ask for as much of what is expected as there is room for."""
        while self._ahead and len(self._free) >= self._need(self._ahead[0]):
            self._send(self._ahead.popleft())

    def _send(self, index: int) -> None:
        pages = [self._free.pop() for _ in range(self._need(index))]
        number, self._sent = self._sent, self._sent + 1
        self._requests[number] = _Request(index, pages)
        self._unclaimed.setdefault(index, deque()).append(number)
        self._child.send([number, index, pages])

    def _need(self, index: int) -> int:
        return pages_needed(int(self.states[index]) * self.meta.bytes_per_token)

    def _wait(self) -> None:
        if self._failed is not None:
            raise self._failed
        self._change.wait()

    def _listen(self) -> None:
        failed = DraftheadError("online states: the engine has ended")
        try:
            for message in self._child.messages(due=lambda: self._arrived < self._sent):
                with self._change:
                    self._arrived += len(message["ready"])
                    for number in message["ready"]:
                        request = self._requests[number]
                        request.arrived = True
                        if number not in self._unclaimed[request.index]:
                            del self._requests[number]  # whoever claimed it has it
                    self._change.notify_all()
        except (DraftheadError, ValueError) as error:  # ValueError: closed while it listened
            failed = error if isinstance(error, DraftheadError) else failed
        finally:  # whatever ended it: who waits must not wait for ever
            with self._change:
                self._failed = failed
                self._change.notify_all()


def _devices(recipe: Recipe, rank: int) -> dict[str, str]:
    """The GPUs of the engine that serves one training process of this machine."""
    devices, each = recipe.capture.online_devices, recipe.engine.tensor_parallel_size
    if devices is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shared = visible.split(",")[rank] if visible else str(rank)
        return {"CUDA_VISIBLE_DEVICES": shared} if "LOCAL_RANK" in os.environ else {}
    assigned = devices[rank * each : (rank + 1) * each]
    if len(assigned) < each:
        raise DraftheadError(
            f"capture.online_devices: {devices} has too few for training process {rank}: each "
            f"takes engine.tensor_parallel_size = {each}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, assigned))}


_incoming: queue.SimpleQueue = queue.SimpleQueue()


def _serve(order: dict, report: Callable[[dict], None]) -> None:
    """The child: prefill the requests batch by batch; while one batch is computed, the previous one
    is copied out."""
    run = RunDir(Path(order["run"]))
    keep_hashes(run.root)
    plan = make_plan(parse_recipe(order["recipe"], "recipe"))
    answers: list[Answer] = []
    for unit in range(plan.meta.units):
        answers += read_part(part_path(run.answers, unit))
    pages = PagePool.open(order["pages"])
    engine = CaptureEngine(plan.recipe, plan.target, plan.meta, pages)
    copying: list[int] = []
    while True:
        batch = _batch(plan.recipe.engine.max_num_seqs, wait=not copying)
        chosen = [answers[index] for _, index, _ in batch]
        keys = engine.prefill([answer.ids.tolist() for answer in chosen]) if batch else []
        if copying:
            engine.flush()
            report({"ready": copying})
        if batch:
            wanted = [to_keep(key, answer) for key, answer in zip(keys, chosen, strict=True)]
            engine.save([places for _, _, places in batch], wanted)
        copying = [number for number, _, _ in batch]


def _batch(most: int, wait: bool) -> list[tuple[int, int, list[int]]]:
    """The requests that have arrived, at most ``most``; none only if there is no time to wait."""
    requests = [_incoming.get()] if wait else []
    while len(requests) < most and not _incoming.empty():
        requests.append(_incoming.get())
    return requests


if __name__ == "__main__":
    child_main(_serve, _incoming.put)
