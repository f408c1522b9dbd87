"""A process of its own for an engine: JSON lines in and out, its output in a log, its life the
parent's.

A process per engine gives all memory back for certain, keeps what vLLM does to its process away
from training, and keeps what it prints out of the way.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from drafthead.errors import DraftheadError
from drafthead.fsio import log_tail
from drafthead.plan import memory_fault


class Child:
    """The parent's side: runs ``python -m module`` and hands it an order.

    Args:
        what: what it is for, in messages.
        module: runs ``child_main``.
        order: JSON-able.
        log: where what it prints is appended; errors quote its end.
        environment: set in the child beside the parent's.
    """

    def __init__(
        self,
        what: str,
        module: str,
        order: dict[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.what, self.log = what, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._begin = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
                env=_environment() | dict(environment or {}),
            )
        self.send(order)

    def send(self, message: Any) -> None:
        """One line to the child; nothing if it is dead, which ``messages`` tells."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def messages(self) -> Iterator[dict]:
        """What the child reports, until it ends.

        Raises:
            DraftheadError: the child's own error, or it died.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise DraftheadError(message["error"])
            yield message
        if self._end() != 0:
            cause = memory_fault(self.log, self._begin)
            raise DraftheadError(
                f"{self.what}: the vLLM process died (exit code {self.process.returncode})"
                + (f": {cause}" if cause else "")
                + f"; {log_tail(self.log, self._begin)}"
            )

    def close(self) -> None:
        """End the child, and all that it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # it ends itself when this closes
        self.process.stdout.close()
        self._end()

    def _end(self) -> int:
        """Wait for the child and end what it left, be it that it was killed; its exit code."""
        with contextlib.suppress(ChildProcessError):  # another thread was here before
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            kill_group(self.process.pid)  # no other group's number as long as it is not reaped
        return self.process.wait()


def _environment() -> dict[str, str]:
    """This process's, without what torchrun tells a training process: an engine is not one."""
    torchrun = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kinds = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in torchrun and not name.startswith(kinds)
    }


def kill_group(group: int) -> None:
    """SIGKILL for all processes of a group but this one and Python's resource tracker, which ends
    by itself when all others have, and removes the shared memory that they left."""
    for _ in range(2):  # one may be started while the others are killed, but none after that
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                own = process.pid != os.getpid() and os.getpgid(process.pid) == group
                if own and not any("resource_tracker" in part for part in process.cmdline()):
                    process.kill()


def die_with_group() -> None:
    """SIGKILL for this process, after all others of its group (:func:`kill_group`)."""
    kill_group(os.getpgrp())
    os.kill(os.getpid(), signal.SIGKILL)


def child_main(
    work: Callable[[dict, Callable[[dict], None]], None],
    receive: Callable[[Any], None] = lambda _: None,
) -> None:
    """The child's side: ``work(order, report)``, and ``receive`` for each later line, in a thread.

    stdin closes when the parent ends, however it ends; then this ends too.
    """
    order: dict[str, Any] = json.loads(sys.stdin.readline())

    def listen() -> None:
        try:
            for line in sys.stdin:
                receive(json.loads(line))
        finally:  # the last line may be the half of one
            die_with_group()

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints to stdout; that goes to the log
    threading.Thread(target=listen, daemon=True).start()

    def report(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        work(order, report)
    except DraftheadError as error:
        report({"error": str(error)})
        sys.exit(error.exit_code)
