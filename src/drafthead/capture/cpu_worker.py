"""The capturing worker on a CPU. A module of its own: vLLM's CPU worker, once imported, puts
stand-ins in the place of ``torch.cuda.Event``, and no GPU kernel can be compiled from then on."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from drafthead.capture.worker import Capture


class CaptureCPUWorker(Capture, CPUWorker):
    """vLLM's CPU worker that also captures."""

    def execute_model(self, scheduler_output: Any) -> Any:
        # vLLM's attention on a CPU multiplies the unused rest of a block by zero, and NaN times
        # zero is NaN: one prompt's NaN would be in every later sequence that gets its blocks.
        runner = self.model_runner
        if not runner.kv_cache_config.needs_kv_cache_zeroing:  # else vLLM does it
            groups = runner.kv_cache_config.kv_cache_groups
            sizes = [group.kv_cache_spec.block_size for group in groups]
            runner._zero_block_ids(_new_blocks(scheduler_output, sizes))
        return super().execute_model(scheduler_output)


def _new_blocks(step: Any, sizes: Sequence[int]) -> list[int]:
    """Ids of the KV cache blocks that a step hands out, those found in the prefix cache left out.

    Args:
        step: vLLM's ``SchedulerOutput``.
        sizes: tokens of a block of each group of layers.
    """
    handed_out = [(new.block_ids, new.num_computed_tokens) for new in step.scheduled_new_reqs]
    cached = step.scheduled_cached_reqs
    for request, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:
            handed_out.append((blocks, computed if request in cached.resumed_req_ids else 0))
    return [
        block
        for blocks, computed in handed_out
        for ids, size in zip(blocks, sizes, strict=True)
        for block in ids[computed // size :]
    ]
