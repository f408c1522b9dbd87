"""The older model runner does not replay a decode graph for prompt chunks of a verify step's width.

It takes every batch whose rows have ``1 + num_speculative_tokens`` tokens for a decode batch. If
those are chunks of a prompt, the conv layers' metadata describes prefill rows, which leaves the
buffers that the captured decode graph reads as they were: states are read and written in the
blocks of an earlier step. Here such a batch is dispatched as what its metadata says it is.
"""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from .patch import Replacement, original
from .resumed_prefills import lengths_to_prefill


def needed() -> bool | None:
    """Not if widths alone do not make a batch one of decodes. If they do, vLLM may still have fixed
    what asks."""
    return None if original(GPUModelRunner, "_is_uniform_decode")(4, 4, 8, 2) else False


def _by_prefill(stock):
    def _determine_batch_execution_and_padding(
        self, *args, num_reqs, force_uniform_decode=None, **kwargs
    ):
        if force_uniform_decode is None and self.speculative_config is not None:
            # The rule by which the metadata tells prefill rows from decode rows.
            batch = self.input_batch
            computed = batch.num_computed_tokens_cpu[:num_reqs]
            with lengths_to_prefill(self):
                if (computed < batch.num_prompt_tokens[:num_reqs]).any():
                    force_uniform_decode = False
        return stock(
            self, *args, num_reqs=num_reqs, force_uniform_decode=force_uniform_decode, **kwargs
        )

    return _determine_batch_execution_and_padding


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding",
        "self num_reqs force_uniform_decode *",
        _by_prefill,
    ),
)
