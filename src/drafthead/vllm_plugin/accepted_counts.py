"""The older model runner remembers accepted counts of requests that sit out a step.

A running request that gets no tokens in a step (a prompt took the whole budget) is taken out of
the persistent batch and put back later, with an accepted count of 1. Its conv state still lies at
``accepted - 1``, so every accepted draft of its last step is dropped from the convolution.

With asynchronous scheduling and prefix caching there is a second fault: counts arrive from the
device while rows of the batch are being swapped, and are then read by the rows they had before.
"""

from .patch import Replacement


def _keep_counts(stock):
    def _update_states(self, scheduler_output):
        if self.num_accepted_tokens_event is None:
            return stock(self, scheduler_output)
        kept = self.__dict__.setdefault("_drafthead_accepted", {})
        # A preempted request loses its state and starts again from a count of 1.
        gone = {
            *scheduler_output.finished_req_ids,
            *(scheduler_output.preempted_req_ids or ()),
            *scheduler_output.scheduled_cached_reqs.resumed_req_ids,
        }
        for request_id in gone:
            kept.pop(request_id, None)
        rows = self.input_batch.req_id_to_index
        keep = [r for r in rows if r not in scheduler_output.num_scheduled_tokens]
        if self.use_async_scheduling and self.cache_config.mamba_cache_mode == "align":
            # Here the runner reads the counts by last step's rows, after rows were swapped.
            keep = list(rows)
        if keep:
            # Before stock() moves any row, and after the last step's counts have arrived.
            self.num_accepted_tokens_event.synchronize()
            counts = self.input_batch.num_accepted_tokens_cpu
            kept.update({r: int(counts[rows[r]]) for r in keep if r not in gone})
        return stock(self, scheduler_output)

    return _update_states


def _restore_counts(stock):
    def _prepare_inputs(self, scheduler_output, *args, **kwargs):
        kept = self.__dict__.get("_drafthead_accepted")
        if not kept:
            return stock(self, scheduler_output, *args, **kwargs)
        rows = self.input_batch.req_id_to_index
        back = {rows[r]: kept.pop(r) for r in list(kept) if r in rows}
        for row, count in back.items():
            self.input_batch.num_accepted_tokens_cpu[row] = count
        result = stock(self, scheduler_output, *args, **kwargs)
        # Asynchronous scheduling fills the counts in there, with 1 for every row that was not in
        # the last step.
        for row, count in back.items():
            self.input_batch.num_accepted_tokens_cpu[row] = count
            self.num_accepted_tokens.np[row] = count
            self.num_accepted_tokens.gpu[row] = count
        return result

    return _prepare_inputs


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
REPLACEMENTS = (
    Replacement(f"{_RUNNER}_update_states", "self scheduler_output", _keep_counts),
    Replacement(f"{_RUNNER}_prepare_inputs", "self scheduler_output *", _restore_counts),
)
