"""Child processes: each has its own log and ends with its parent.

An engine runs in a child process, so that its memory is given back for certain, and what vLLM does
to its process and prints stays away from training and from other engines.

`Process` runs any command. `Child` runs a module that calls `child_main`, and the two exchange
JSON lines: an order, then messages either way.
"""

import contextlib
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from drafthead.errors import DraftheadError
from drafthead.fsio import log_tail

TICK_S = 10.0
"""How long is waited between two looks at a process that is waited for."""
_STUCK_S = 1800.0
_BUSY = 0.01  # of one core: starting and compiling an engine takes far more

# What vLLM and PyTorch print when memory runs out, what it means, and the keys to change. The first
# that matches counts: an engine that has no memory left prints more errors after the cause.
_NO_MEMORY = (
    (
        "(Free memory on device|Available memory on node).* is less than",
        "less memory is free than the engine asks for",
        "lower engine.gpu_memory_utilization (on a CPU engine.kv_cache_memory_bytes), or end the "
        "processes that hold it",
    ),
    (
        "No available memory for the cache blocks",
        "the target's weights leave no memory for the KV cache",
        "raise engine.gpu_memory_utilization, or use more GPUs (serve.tensor_parallel_size)",
    ),
    (
        "To serve at least one request",
        "the KV cache has no room for one sequence of the longest length",
        "lower engine.max_model_len, or raise engine.gpu_memory_utilization or, where it is set, "
        "engine.kv_cache_memory_bytes",
    ),
    (
        "CUDA out of memory|OutOfMemoryError|not enough GPU memory",
        "the GPU's memory is full",
        "lower engine.max_num_seqs or engine.gpu_memory_utilization, or use more GPUs "
        "(serve.tensor_parallel_size)",
    ),
    (
        "DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|MemoryError",
        "this machine's memory is full",
        "lower engine.kv_cache_memory_bytes, or end what else runs here",
    ),
)


class Standstill:
    """Notices that a process which is waited for lives but does nothing: for ``limit`` seconds it
    has sent nothing, its log has not grown, and it and what it started took less than 1% of a core.

    Only ticks of waiting count, so that neither a parent that was stopped nor a machine that slept
    makes a process look stuck.

    Args:
        name: what the error calls it.
        pid: of the process.
        log: what it prints to; None if that is another process's.
        limit: seconds.
    """

    def __init__(self, name: str, pid: int, log: Path | None, limit: float):
        self.name, self.pid, self.log, self.limit = name, pid, log, limit
        self.alive()

    def alive(self) -> None:
        """It has sent something, or nothing is expected of it."""
        self._waited = 0.0
        self._before: tuple[float, int] | None = None

    def tick(self) -> None:
        """``TICK_S`` of waiting have passed.

        Raises:
            DraftheadError: it stands still.
        """
        used, size = _used_s(self.pid), self.log.stat().st_size if self.log else 0
        before, before_size = self._before or (-math.inf, 0)
        if size != before_size or abs(used - before) > _BUSY * self.limit:
            self._waited, self._before = 0.0, (used, size)
            return
        self._waited += TICK_S
        if self._waited >= self.limit:
            log = f" nor written to {self.log}" if self.log else ""
            raise DraftheadError(
                f"{self.name}: process {self.pid} is stuck: for {self.limit / 60:.0f} minutes it "
                f"has not answered{log}, and took no processor time. See whether disk and GPU "
                f"answer, and where it stands (py-spy dump --pid {self.pid}); then run again: what "
                "is finished stays"
            )


def _used_s(pid: int) -> float:
    """Processor time that a process and all that it started have taken, in seconds."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])  # those of its ended children too
    return total


class Process:
    """A command in its own process group, whose output is appended to a log.

    Args:
        name: what errors call it.
        command: to run.
        log: file for stderr, and for stdout unless a pipe is given; errors quote its end.
        environment: set in the process beside this one's.
        stdin, stdout: as for ``subprocess.Popen``; stdout None is the log.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
                text=True,
                start_new_session=True,
                env=_environment() | dict(environment or {}),
            )

    def memory_fault(self) -> str:
        """The cause and the fix, if the log says that memory ran out; else empty."""
        return memory_fault(self.log, self._log_start)

    def death(self, what: str) -> DraftheadError:
        """The error for a process that has ended: ``what`` happened, its exit code, the cause if
        known, and the end of the log."""
        code = self.process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        cause = self.memory_fault()
        if not cause and code == -signal.SIGKILL:
            cause = "out of memory? lower engine.kv_cache_memory_bytes or engine.max_num_seqs"
        return DraftheadError(
            f"{self.name}: {what} ({how})"
            + (f": {cause}" if cause else "")
            + f"\n{log_tail(self.log, self._log_start)}"
        )

    def close(self) -> None:
        """Kill the process and everything that it started."""
        self.process.kill()
        self.reap()

    def reap(self) -> int:
        """Wait for the process, kill any processes it left behind, and return its exit code."""
        with contextlib.suppress(ChildProcessError):  # another thread has reaped it
            # Unreaped it keeps its number, so the group is no other's.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            kill_group(self.process.pid)
        return self.process.wait()


class Child(Process):
    """The parent's side of ``python -m module``, where the module runs ``child_main``.

    Args:
        name: what errors call it.
        module: to run.
        order: JSON-able; the first message.
        log: as for ``Process``.
        environment: as for ``Process``.
    """

    def __init__(
        self,
        name: str,
        module: str,
        order: dict[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        command, pipe = [sys.executable, "-m", module], subprocess.PIPE
        super().__init__(name, command, log, environment, stdin=pipe, stdout=pipe)
        self._standstill = Standstill(name, self.process.pid, log, _STUCK_S)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=name, daemon=True).start()
        self.send(order)

    def _read(self) -> None:
        """The reading thread, so that ``receive`` can look at the child while it waits."""
        assert self.process.stdout is not None
        try:
            with self.process.stdout as lines:
                for line in lines:
                    self._lines.put(line)
        finally:  # an empty line is the end
            self._lines.put("")

    def send(self, message: Any) -> None:
        """Send one message. Nothing happens if the child is dead: ``receive`` raises that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def receive(self, failure: str = "died", due: Callable[[], bool] = lambda: True) -> dict | None:
        """Wait for the child's next message; None once it has ended well.

        Args:
            failure: what the error says of a child that ended otherwise.
            due: whether the child has something to do; else it may stand still.

        Raises:
            DraftheadError: the child's own error, it ended otherwise, or it is stuck.
        """
        self._standstill.alive()
        while True:
            try:
                line = self._lines.get(timeout=TICK_S)
                break
            except queue.Empty:
                if due():
                    self._standstill.tick()
                else:
                    self._standstill.alive()
        if line:
            message: dict = json.loads(line)
            if "error" in message:
                raise DraftheadError(message["error"])
            return message
        self._lines.put("")  # for whoever asks again
        if self.reap() != 0:
            raise self.death(f"the vLLM process {failure}")
        return None

    def messages(self, due: Callable[[], bool] = lambda: True) -> Iterator[dict]:
        """All messages until the child ends. Errors and ``due`` as for ``receive``."""
        while (message := self.receive(due=due)) is not None:
            yield message

    def close(self) -> None:
        super().close()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def child_main(
    work: Callable[[dict, Callable[[dict], None]], None],
    receive: Callable[[Any], None] = lambda _: None,
) -> None:
    """The child's side: run ``work(order, report)``; a thread calls ``receive`` for each later
    message.

    stdin closes when the parent ends, however it ends; then this process ends too.
    """
    order: dict[str, Any] = json.loads(sys.stdin.readline())

    def listen() -> None:
        try:
            for line in sys.stdin:
                receive(json.loads(line))
        finally:  # the last line may be cut short
            kill_group(os.getpgrp())
            os.kill(os.getpid(), signal.SIGKILL)

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints to stdout goes to the log
    threading.Thread(target=listen, daemon=True).start()

    def report(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        work(order, report)
    except DraftheadError as error:
        report({"error": str(error)})
        sys.exit(error.exit_code)


def kill_group(group: int) -> None:
    """SIGKILL every process of a group except this one and Python's resource tracker. The tracker
    ends by itself after all others have, and removes the shared memory that they left."""
    for _ in range(2):  # one may be started while the others are killed, but none after that
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                member = process.pid != os.getpid() and os.getpgid(process.pid) == group
                if member and not any("resource_tracker" in part for part in process.cmdline()):
                    process.kill()


def kill_with_parent(group: int) -> subprocess.Popen:
    """Start a process that kills ``group`` as soon as this process ends, however it ends. For
    commands that do not run ``child_main``."""
    command = [sys.executable, "-m", __name__, str(group)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _environment() -> dict[str, str]:
    """This process's, without what torchrun sets for a training process: an engine is not one."""
    torchrun = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kinds = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in torchrun and not name.startswith(kinds)
    }


def memory_fault(log: Path, begin: int) -> str:
    """The cause and the fix, if an engine ran out of memory; else empty.

    Args:
        log: file that the engine printed to.
        begin: offset at which this engine began to print.
    """
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    for pattern, cause, fix in _NO_MEMORY:
        if re.search(pattern, text):
            return f"{cause}; {fix}"
    return ""


if __name__ == "__main__":
    sys.stdin.read()  # returns when the parent, which holds the other end, has ended
    kill_group(int(sys.argv[1]))
