"""Prompt chunks of one token are scheduled without placeholder drafts where they do harm.

The scheduler widens a waiting request with one token to compute to ``1 + num_speculative_tokens``
rows whose drafts are placeholders, so that the step keeps the shape of a decode-only CUDA graph.
That is right only if the row runs as a decode: a prefill keeps the convolution's state after its
*last* row, so the placeholders stay in it although the sampler rejects them, and the answer is
wrong from its second token on. The row runs as a prefill

- if the request has no state yet (a prompt of one token), with either model runner, and
- in the older runner also if another short prompt chunk precedes it in the batch (a prompt that
  ends one token after a cached prefix).
"""

from .patch import Replacement


def _without_placeholders(stock):
    def _update_after_schedule(self, scheduler_output):
        # Runs at the end of schedule(), before the counts of computed tokens are advanced.
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if self.has_mamba_layers and drafts:
            admitted = {new.req_id for new in scheduler_output.scheduled_new_reqs}
            admitted |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
            for request_id in admitted & drafts.keys():
                stateless = self.requests[request_id].num_computed_tokens == 0
                if stateless or not self.use_v2_model_runner:
                    rows = len(drafts.pop(request_id))
                    scheduler_output.num_scheduled_tokens[request_id] -= rows
                    scheduler_output.total_num_scheduled_tokens -= rows
        return stock(self, scheduler_output)

    return _update_after_schedule


REPLACEMENTS = (
    Replacement(
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule",
        "self scheduler_output",
        _without_placeholders,
    ),
)
