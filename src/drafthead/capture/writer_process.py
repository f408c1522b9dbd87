"""The process that takes an engine's states out of the ring and stores them.

It does all the host's work on states, at no cost to the engine's interpreter: it sorts them by
sequence, checks, hashes and writes them, or copies them into pages that training reads. The
engine's side, `WriterProcess`, sends only row numbers and notes. The process ends with the engine,
however the engine ends; units finished by then stay.
"""

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from drafthead.capture.assemble import SEGMENT_ROWS, SequenceAssembler
from drafthead.capture.checks import CHECKED, Checker, unusable
from drafthead.capture.shared_memory import PagePool, RingBuffer, SharedRows
from drafthead.errors import DraftheadError
from drafthead.machine import usable_cores
from drafthead.process import TICK_S, Standstill
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.states.format import Encoding
from drafthead.states.writer import grouped
from drafthead.targets import load_target

# Less than who waits for the engine waits, so that this, which is nearer to the cause, is told.
_STUCK_S = 1200.0


class WriterProcess:
    """The engine's side, for one thread of it. Only the methods that say so wait.

    Args:
        capacity: rows of the ring, at least two of the largest runs that are asked for.
        layers, hidden: L and Ht of the states.
        encoding: what they are kept as.
    """

    def __init__(self, capacity: int, layers: int, hidden: int, encoding: Encoding):
        self.capacity, self.layers, self.hidden, self.encoding = capacity, layers, hidden, encoding
        self.waits = 0
        """How often the ring had no room."""
        memory = SharedRows.create(capacity, layers, hidden, encoding)
        self._pipe, theirs = multiprocessing.Pipe()
        order = [theirs.fileno(), memory, capacity, layers, hidden, encoding]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), memory),
            env=_environment(),
        )
        theirs.close()
        self.rows = SharedRows(memory, capacity, layers, hidden, encoding)
        os.close(memory)
        self._ring = RingBuffer(capacity)
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (event or None, message)
        self._trouble: str | None = None
        self._died: str | None = None
        self._done = False
        name = "the process that writes the states"
        self._standstill = Standstill(name, self._process.pid, None, _STUCK_S)
        threading.Thread(target=self._send, name="states", daemon=True).start()

    def open(self, sink: dict, meta: dict, target: str, options: dict) -> str | None:
        """Set where units go from now on (see ``CaptureWorker.drafthead_open``), and wait until the
        process has opened it. Returns what went wrong, or None."""
        return self._ask("open", sink, meta, target, options)

    def room(self, n: int) -> tuple[int, int] | None:
        """A free run of ``n`` rows of the ring as (start, stop). Waits while there is none. None if
        the process has died."""
        self._receive(wait=False)
        run = self._ring.take(n)
        self.waits += run is None
        while run is None and self._died is None:
            self._receive(wait=True)
            run = self._ring.take(n)
        return run if self._died is None else None

    def send_rows(
        self, start: int, stop: int, notes: bytes, filled: "torch.cuda.Event | None"
    ) -> None:
        """A run from ``room`` is full once ``filled`` has happened. ``notes``: int64 [n, 4], see
        ``SequenceAssembler.note``."""
        self._outbox.put((filled, ("rows", start, stop, notes)))

    def send_unit(self, place: Any, sequences: dict[int, list[int]], wanted: list[dict]) -> None:
        """End a unit: it is all rows since the last one. See ``CaptureWorker.drafthead_unit``."""
        self._outbox.put((None, ("unit", place, sequences, wanted)))

    def trouble(self) -> str | None:
        """What has gone wrong since the last call and is known by now, or None."""
        self._receive(wait=False)
        trouble, self._trouble = self._died or self._trouble, None
        return trouble

    def flush(self) -> str | None:
        """Wait until all units are stored. Returns what went wrong, or None."""
        return self._ask("flush")

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)

    def _ask(self, *message: Any) -> str | None:
        self._outbox.put((None, message))
        self._done = False
        while not self._done and self._died is None:
            self._receive(wait=True)
        return self.trouble()

    def _receive(self, wait: bool) -> None:
        """Read the messages of the process; with ``wait`` at least one."""
        try:
            self._standstill.alive()
            while wait or self._pipe.poll():
                while not self._pipe.poll(TICK_S):
                    self._standstill.tick()
                what, text = self._pipe.recv()
                wait = False
                if what == "free":
                    self._ring.give()
                elif what == "trouble":
                    self._trouble = self._trouble or text
                else:
                    self._done = True
        except DraftheadError as error:
            self._died = str(error)
            self._process.kill()
        except (EOFError, OSError):
            code = self._process.wait()
            killed = ", killed: out of memory?" if code == -signal.SIGKILL else ""
            self._died = (
                f"the process that writes the states died (exit code {code}{killed}); what it "
                "said is in the engine's log. Finished units stay: run again"
            )

    def _send(self) -> None:
        """The sending thread. It waits for the GPU's copies into the ring, and for a process that
        is slow to read its pipe, so that the engine does not."""
        try:
            while (next_one := self._outbox.get()) is not None:
                filled, message = next_one
                if filled is not None:
                    filled.synchronize()
                self._pipe.send(message)
        except BrokenPipeError:
            pass
        finally:  # no message reaches it any more, so nothing may go on waiting for it
            self._process.kill()


def _environment() -> dict[str, str]:
    """This process's environment without its GPU, and with threads for a quarter of the cores, at
    most four, that sleep when idle: the engine needs the others. glibc's malloc keeps blocks of up
    to 32 MB, because torch's temporaries have the same sizes in every unit.
    """
    cores = max(1, min(4, usable_cores() // 4))
    settings = {
        "OMP_NUM_THREADS": str(cores),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }
    settings |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    bound = ("OMP_", "GOMP_", "KMP_")
    return {k: v for k, v in os.environ.items() if not k.startswith(bound)} | settings


def serve(
    rows: list[torch.Tensor], receive: Callable[[], tuple], send: Callable[[tuple], None]
) -> None:
    """The process's side: handle messages, for ever.

    Args:
        rows: the ring's.
        receive: waits for a message.
        send: to the engine.
    """
    captured = SequenceAssembler()
    sink: _Sink | None = None
    while True:
        what, *given = receive()
        try:
            if what == "rows":
                start, stop, notes = given
                captured.append(*(tensor[start:stop] for tensor in rows))
                captured.note(np.frombuffer(notes, np.int64).reshape(-1, 4))
                send(("free", None))
            elif what == "open":
                captured, sink = SequenceAssembler(), _open(*given)
            elif sink is None:
                raise AssertionError(f"{what} before open")
            elif what == "unit":
                place, sequences, wanted = given
                whole, captured = captured, SequenceAssembler()
                samples = _samples(whole, sequences, wanted, sink.meta)
                sink.submit(place, samples, len(wanted))
            else:
                sink.flush()
            if sink is not None:
                sink.check()
        except DraftheadError as error:
            send(("trouble", str(error)))
        if what in ("open", "flush"):
            send(("done", None))


class _Sink(Protocol):
    """Where units go. Any method may raise the error of an earlier unit."""

    meta: StoreMeta

    def submit(
        self, place: Any, samples: Iterator[tuple[str, Sample | None]], count: int
    ) -> None: ...
    def check(self) -> None: ...
    def flush(self) -> None: ...


class _Store:
    """A state store."""

    def __init__(self, path: Path, meta: StoreMeta, shard_bytes: int, checker: Checker):
        self.meta, self._checker = meta, checker
        self._writer = StateWriter(path, meta, shard_bytes)
        self.check, self.flush = self._writer.check, self._writer.flush

    def submit(self, unit: int, samples: Iterator[tuple[str, Sample | None]], count: int) -> None:
        checks: dict[str, Any] = {}
        self._writer.submit(unit, self._checker.watch(samples, count, self.meta, checks), checks)


class _Pages:
    """Checks samples and copies them into pages. After ``CHECKED`` greedy tokens the engine is
    believed, and only each state's values are looked at: the LM head is too much to read for every
    few samples.

    Args:
        pages: shared with the reader.
        meta: what the states are of.
        checker: of the engine's states.
    """

    def __init__(self, pages: PagePool, meta: StoreMeta, checker: Checker):
        self.pages, self.meta, self.checker = pages, meta, checker
        self._picked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._believed = not checker.greedy

    def submit(
        self,
        places: Sequence[Sequence[int]],
        samples: Iterable[tuple[str, Sample | None]],
        count: int,
    ) -> None:
        """Copy each of ``count`` samples into the pages at its place; zeros if it is unusable.

        Raises:
            DraftheadError: the states are not those of the served tokens.
        """
        for place, (_, sample) in zip(places, samples, strict=True):
            if sample is None or unusable(sample, self.meta):
                self.pages.clear(place)
                continue
            if not self._believed:
                self._picked.append(self.checker.pick(sample, count))
            self.pages.put(place, sample.stored.values())
        if sum(len(served) for _, served in self._picked) >= CHECKED:
            self.checker.agreement(self._picked)
            self._picked, self._believed = [], True

    def check(self) -> None:
        """Nothing to do: ``submit`` raises what is wrong."""

    def flush(self) -> None:
        """Nothing to do: ``submit`` has copied everything."""


def _open(sink: dict, meta: dict, target: str, options: dict) -> _Sink:
    about = StoreMeta.of(meta)
    trusted, overrides = options["trust_remote_code"], options["hf_overrides"]
    loaded = load_target(target, trust_remote_code=trusted, overrides=overrides)
    checker = Checker(loaded, options["greedy"], options["strict"])
    if "pages" in sink:
        return _Pages(PagePool.open(sink["pages"]), about, checker)
    return _Store(Path(sink["store"]), about, options["shard_bytes"], checker)


def _samples(
    captured: SequenceAssembler,
    sequences: dict[int, list[int]],
    wanted: list[dict],
    meta: StoreMeta,
) -> Iterator[tuple[str, Sample | None]]:
    """Each wanted conversation with its sample, or None if some of its states are missing."""
    resolved = captured.resolve(sequences) if wanted else {}
    rows = [resolved[item["key"]] for item in wanted]
    whole = [bool((positions >= 0).all()) for positions in rows]
    if not any(whole):
        yield from ((item["conversation"], None) for item in wanted)
        return
    kept = [positions if ok else positions[:0] for positions, ok in zip(rows, whole, strict=True)]
    taken: list[tuple[torch.Tensor, ...]] = []
    for group in grouped(kept, len, SEGMENT_ROWS):
        tensors = captured.take(np.concatenate(group))
        taken += zip(*(tensor.split([len(r) for r in group]) for tensor in tensors), strict=True)
    captured.segments.clear()
    for item, stored, ok in zip(wanted, taken, whole, strict=True):
        if not ok:
            yield item["conversation"], None
            continue
        ids = torch.tensor(sequences[item["key"]], dtype=torch.int32)
        mask = torch.ones(len(ids), dtype=torch.bool)
        mask[: item["prompt_len"]] = torch.tensor(item["prompt_mask"], dtype=torch.bool)
        sample = Sample(
            ids=ids,
            loss_mask=mask,
            num_aux=len(meta.aux_layers),
            prompt_len=item["prompt_len"],
            conversation=item["conversation"],
            split=item["split"],
            **dict(zip(meta.stored, stored, strict=True)),
        )
        yield sample.conversation, sample


def _listen(pipe: Connection, messages: queue.SimpleQueue) -> None:
    """The receiving thread: it notices the engine's end whatever else goes on. The ring bounds the
    queue: each message has rows there, except a few for each unit."""
    try:
        while True:
            messages.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """The process: ``argv[1]`` is ``WriterProcess``'s order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the engine
    pipe_fd, memory, *shape = json.loads(sys.argv[1])
    pipe, rows = Connection(pipe_fd), SharedRows(memory, *shape)
    os.close(memory)
    messages: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, messages), daemon=True).start()
    try:
        serve(rows.tensors, messages.get, pipe.send)
    except BrokenPipeError:
        os._exit(0)
    except Exception:  # end at once: the engine waits, and other units may still be being written
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
