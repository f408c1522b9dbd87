"""A child process that answers one JSON line for each JSON line that it is asked."""

import json
import select
import subprocess
import sys
import time
from pathlib import Path

from drafthead.process import Process


class Child(Process):
    """The parent's side. The first line that the child sends, unasked, says that it is ready.

    Args:
        name: for messages.
        module: run with ``spec``, as JSON, for its only argument; it answers on
            `replies.replies()`.
        log: where all else that it prints goes.
        env: set in the child beside the parent's.
    """

    def __init__(self, name: str, module: str, spec: dict, log: Path, env: dict[str, str]):
        self.begun = time.monotonic()
        command = [sys.executable, "-m", module, json.dumps(spec)]
        pipe = subprocess.PIPE
        super().__init__(name, command, log, env, stdin=pipe, stdout=pipe)

    def read(self, limit: float) -> dict:
        """The child's next line.

        Raises:
            RuntimeError: it ended, or sent nothing for ``limit`` seconds.
        """
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, limit))
        line = self.process.stdout.readline() if ready else ""
        if not line:
            tail = self.log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{self.name}: {'ended' if ready else 'too slow'}; {tail}")
        return json.loads(line)

    def ask(self, task: object, limit: float = 60) -> dict:
        """Send a task, JSON-able; its answer."""
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.read(limit)
