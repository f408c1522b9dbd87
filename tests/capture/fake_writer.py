"""In place of the process that takes rows out of the ring, for tests: it does so here, as late as
it can."""

import os
from collections import deque

import numpy as np

from drafthead.capture.assemble import SequenceAssembler
from drafthead.capture.shared_memory import RingBuffer, SharedRows


class FakeWriter:
    """A ``WriterProcess`` for a ``StateRecorder``; ``take`` gives what was captured since the last
    call."""

    def __init__(self, capacity, layers, hidden, encoding):
        self.capacity, self.layers, self.hidden, self.encoding = capacity, layers, hidden, encoding
        memory = SharedRows.create(capacity, layers, hidden, encoding)
        self.rows = SharedRows(memory, capacity, layers, hidden, encoding)
        os.close(memory)
        self._ring, self._sent, self._captured = RingBuffer(capacity), deque(), SequenceAssembler()

    def room(self, n):
        while (run := self._ring.take(n)) is None:
            self._copy_one()
        return run

    def send_rows(self, start, stop, notes, filled):
        self._sent.append((start, stop, notes, filled))

    def take(self):
        while self._sent:
            self._copy_one()
        done, self._captured = self._captured, SequenceAssembler()
        return done

    def _copy_one(self):
        start, stop, notes, filled = self._sent.popleft()
        if filled is not None:
            filled.synchronize()
        self._captured.append(*(tensor[start:stop] for tensor in self.rows.tensors))
        self._captured.note(np.frombuffer(notes, np.int64).reshape(-1, 4))
        self._ring.give()
