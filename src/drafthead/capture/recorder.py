"""Record hidden states step by step as an engine computes them, without blocking it.

Each engine step computes states for rows of several sequences at once. On a GPU a step adds its
rows to a stage on the device: one small kernel. A full stage is encoded and copied on a stream of
its own into a ring of pinned memory, while steps fill the other stage. From there another process
takes the rows (`capture.writer_process`); only when the ring is full does the engine wait for it.
Notes say which row is which position of which sequence; the other process resolves them.
"""

from array import array
from collections.abc import Sequence

import torch

from drafthead.capture.writer_process import WriterProcess
from drafthead.states.format import encode

KEY = "drafthead"
"""`SamplingParams.extra_args[KEY]` names a sequence whose states are wanted."""


class StateRecorder:
    """Records the states of every step of one engine.

    Args:
        dtype: of the tensors that each step hands over.
        device: where they lie.
        process: takes the rows; its ring has room for two steps of the largest size.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, process: WriterProcess):
        self._process = process
        self._notes, self._rows = array("q"), 0
        self._cuda = device.type == "cuda"
        if self._cuda:
            process.rows.pin()
            shape = (process.capacity // 2, process.layers, process.hidden)
            self._stages = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
            self._copied: list[torch.cuda.Event | None] = [None, None]
            self._at, self._staged = 0, 0
            self._stream = torch.cuda.Stream(device)

    @property
    def device_bytes(self) -> int:
        """Bytes of GPU memory that the stages take; 0 on a CPU."""
        return sum(stage.nbytes for stage in self._stages) if self._cuda else 0

    def record(
        self, layers: Sequence[torch.Tensor], sequences: Sequence[tuple[int | None, int, int]]
    ) -> None:
        """Record one step.

        Args:
            layers: L tensors [>= n, Ht], where n is the sum of the sequences' rows.
            sequences: in the order of their rows (key or None, first position, number of rows).
        """
        row = self._rows
        for key, start, count in sequences:
            if key is not None:
                self._notes.extend((key, row, start, count))
            row += count
        n = row - self._rows
        self._rows = row
        rows = [layer[:n] for layer in layers]
        if not self._cuda:
            self._send(torch.stack(rows, dim=1))
            return
        if self._staged + n > len(self._stages[0]):
            self._send_stage()
        # The step's own tensors lie in CUDA graph memory that the next step overwrites.
        torch.stack(rows, dim=1, out=self._stages[self._at][self._staged : self._staged + n])
        self._staged += n

    def end_unit(self) -> None:
        """End a unit: later records belong to the next one. Rows may still be on their way."""
        if self._cuda:
            self._send_stage()
        self._rows = 0

    def close(self) -> None:
        """Stop recording and let go of the shared memory."""
        if self._cuda:
            self._stream.synchronize()
            self._process.rows.close()

    def _send_stage(self) -> None:
        """Start copying the stage to the ring, and switch to the other one."""
        n, stage = self._staged, self._stages[self._at]
        if n == 0:
            return
        steps = torch.cuda.current_stream()
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            self._copied[self._at] = self._send(stage[:n])
        self._at, self._staged = 1 - self._at, 0
        before = self._copied[self._at]
        if before is not None:
            steps.wait_event(before)  # makes the GPU wait for the copy, not the host

    def _send(self, states: torch.Tensor) -> "torch.cuda.Event | None":
        """Copy states [n, L, Ht] into the ring. Returns a CUDA event that fires when the copy is
        complete (None on a CPU)."""
        run = self._process.room(len(states))
        if run is None:  # the writer has died; the end of the unit reports that
            return None
        start, stop = run
        encoded = encode(states, self._process.encoding).values()
        for place, tensor in zip(self._process.rows.tensors, encoded, strict=True):
            place[start:stop].copy_(tensor, non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
            done.record()
        self._process.send_rows(start, stop, self._notes.tobytes(), done)
        self._notes = array("q")
        return done
