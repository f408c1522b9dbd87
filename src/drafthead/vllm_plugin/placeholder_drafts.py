"""One-token first chunks are scheduled without placeholder drafts.

The scheduler widens a waiting request of one token to ``1 + num_speculative_tokens`` rows whose
drafts are placeholders, so that the step keeps the shape of a decode-only CUDA graph. A request
without computed tokens has no conv state yet and therefore runs as a prefill, and a prefill keeps
the state after its *last* row: the placeholders stay in the convolution's state although the
sampler rejects them, and the answer is wrong from the second token on.
"""

from vllm.v1.core.sched.scheduler import Scheduler

from .patch import still_has, wrap

FAULT = "and (scheduled_running_reqs or num_computed_tokens > 0)"


def apply() -> None:
    if still_has(Scheduler.schedule, FAULT, "placeholder_drafts"):
        wrap(Scheduler, "_update_after_schedule", _without_placeholders)


def _without_placeholders(stock):
    def _update_after_schedule(self, scheduler_output):
        # Runs at the end of schedule(), before the counts of computed tokens are advanced.
        if self.has_mamba_layers:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            for request_id in list(drafts):
                if self.requests[request_id].num_computed_tokens == 0:
                    rows = len(drafts.pop(request_id))
                    scheduler_output.num_scheduled_tokens[request_id] -= rows
                    scheduler_output.total_num_scheduled_tokens -= rows
        return stock(self, scheduler_output)

    return _update_after_schedule
