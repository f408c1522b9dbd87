"""Record a step as a CUDA graph and replay it with one launch.

A step of a small head is a thousand kernels of a few microseconds each, and starting them takes
the host longer than running them takes the device. A graph is started with one call, but always on
the same addresses and sizes.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Functions replayed as CUDA graphs, one after the other, in memory that all of them share.

    So what a function returns is overwritten by the next one's replay. Off a GPU functions are just
    called.
    """

    def __init__(self, device: torch.device):
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captured = 0
        self.seconds = 0.0
        """Spent on capturing, while the device stood still."""

    def wrap(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, called the first time, which lets it compile and allocate what stays, and
        replayed from then on. It must read and write the same tensors each time.

        Functions that differ in their tensors' sizes only need that call, too: a guard of what was
        compiled for others can fail, and no capture outlives a compilation.
        """
        if self.pool is None:
            return function
        graph: torch.cuda.CUDAGraph | None = None
        called, result = False, None

        def replayed() -> Any:
            nonlocal called, graph, result
            if not called:
                called = True
                return function()
            if graph is None:
                started, graph = time.monotonic(), torch.cuda.CUDAGraph()
                # The threads that read rows allocate meanwhile: no business of this capture.
                with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                    result = function()
                self.captured += 1
                self.seconds += time.monotonic() - started
            graph.replay()
            return result

        return replayed
