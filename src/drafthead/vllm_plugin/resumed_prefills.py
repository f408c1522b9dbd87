"""The older model runner computes again what a preempted request had written, as prompt.

A request that was preempted starts anew with its prompt and its answer so far. The runner asks of
a row whether it is still in its *prompt*: chunks of the answer count as decodes, and one no wider
than a verify step runs through the kernel for drafts. That leaves one state for each row in its
columns, and the next step reads the first, as after a rejection, so all but the chunk's first token
are lost. Here such a request counts as in its prompt until everything it had is computed, as in the
newer runner.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .patch import Replacement


@contextmanager
def lengths_to_prefill(runner: Any) -> Iterator[None]:
    """Let ``input_batch.num_prompt_tokens`` of resumed requests count what they had written."""
    known, batch = runner.__dict__.get("_drafthead_resumed"), runner.input_batch
    held = {}
    for request, length in list(known.items()) if known else ():
        row = batch.req_id_to_index.get(request)
        if row is None:
            continue
        if batch.num_computed_tokens_cpu[row] >= length:
            del known[request]
            continue
        held[request] = batch.num_prompt_tokens[row]
        batch.num_prompt_tokens[row] = length
    try:
        yield
    finally:
        for request, length in held.items():  # rows may have been swapped
            batch.num_prompt_tokens[batch.req_id_to_index[request]] = length


def _remember(stock):
    def _may_reorder_batch(self, scheduler_output):
        # Runs once a step, at the end of the update of requests and before any row is read.
        known = self.__dict__.setdefault("_drafthead_resumed", {})
        for request in (
            *scheduler_output.finished_req_ids,
            *(scheduler_output.preempted_req_ids or ()),
        ):
            known.pop(request, None)
        for request in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            known[request] = self.requests[request].num_tokens
        with lengths_to_prefill(self):
            return stock(self, scheduler_output)

    return _may_reorder_batch


def _told(stock):
    def _build_attention_metadata(self, *args, **kwargs):
        with lengths_to_prefill(self):
            return stock(self, *args, **kwargs)

    return _build_attention_metadata


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
REPLACEMENTS = (
    Replacement(f"{_RUNNER}_may_reorder_batch", "self scheduler_output", _remember),
    Replacement(f"{_RUNNER}_build_attention_metadata", "self *", _told),
)
