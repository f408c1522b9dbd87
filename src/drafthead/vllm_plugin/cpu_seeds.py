"""A request with a seed whose prompt is read in chunks does not end the engine on the CPU.

What is sampled at the end of a chunk is thrown away, and the runner sets the request's generator
back by what that took. A generator on the CPU has no such position. Here it goes on from where it
is: the answer has the same distribution, and depends on the seed and on the chunks.
"""

import torch

from .patch import Replacement


def needed() -> bool:
    """Whether a generator's position cannot be asked for."""
    try:
        torch.Generator().get_offset()
    except RuntimeError:
        return True
    return False


def _without_setting_back(stock):
    def _bookkeeping_sync(self, *rest):
        batch = self.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return stock(self, *rest)
        finally:
            batch.generators = generators

    return _bookkeeping_sync


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
        "self *",
        _without_setting_back,
    ),
)
