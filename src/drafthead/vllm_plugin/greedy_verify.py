"""Greedy requests are verified with one argmax and one kernel.

The newer model runner's rejection sampler is made for distributions: for a batch that is greedy it
still fills statistics of blocks of the vocabulary, resamples, and inserts what it resampled, in six
launches with fifteen allocations between them. All that a greedy request needs is the target's
argmax at each of its rows: drafts count as long as they are that, and the next token is that.

Batches in which anything else is asked for (a temperature, a penalty, log-probabilities, a grammar,
a watermark, …) go to vLLM's own.
"""

from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from .patch import Replacement


def is_plain_greedy(rejection_sampler: Any, rows: Any) -> bool:
    """Whether the requests ``rows`` (indices of states) want their argmax and nothing else."""
    sampler = rejection_sampler.sampler
    states = sampler.sampling_states
    return not (
        rejection_sampler.enable_adaptive_verification
        or rejection_sampler.watermark_key is not None
        or getattr(rejection_sampler, "fly_window_size", 0)  # vLLM 0.33: accepts near misses
        or sampler.compute_nans
        or sampler.return_sampling_mask
        or states.temperature.np[rows].any()
        or sampler.needs_logits_processing[rows].any()
        or states.max_num_logprobs(rows) != NO_LOGPROBS
    )


def _greedy_at_once(stock):
    def __call__(self, logits, input_batch, draft_logits=None, invalid_drafts=None):
        rows = input_batch.idx_mapping_np
        if (
            draft_logits is not None
            or invalid_drafts is not None
            or not is_plain_greedy(self, rows)
        ):
            return stock(self, logits, input_batch, draft_logits, invalid_drafts)
        requests = input_batch.num_reqs
        best = logits.argmax(dim=-1)
        sampled = best.new_empty(requests, self.num_speculative_steps + 1)
        # Not two rows of one tensor: their alignment, and with it the kernel, would vary.
        num_sampled = best.new_empty(requests, dtype=torch.int32)
        num_rejected = best.new_empty(requests, dtype=torch.int32)
        _verify_kernel[(requests,)](
            sampled,
            sampled.stride(0),
            num_sampled,
            num_rejected,
            best,
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            input_batch.seq_lens,
            self.sampler.req_states.prefill_len.gpu,
            self.sampler.sampling_states.seeds.gpu,
            self.synthetic_conditional_rates,
            SYNTHETIC=self.synthetic_conditional_rates is not None,
            num_warps=1,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    return __call__


@triton.jit
def _verify_kernel(
    sampled_ptr,  # [requests, drafts + 1], written: accepted drafts, then the target's token
    sampled_stride,
    num_sampled_ptr,  # [requests], written
    num_rejected_ptr,  # [requests], written
    best_ptr,  # [logits], the target's argmax
    input_ids_ptr,  # [tokens]
    positions_ptr,  # [tokens]
    logits_indices_ptr,  # [logits], the token of each
    cu_num_logits_ptr,  # [requests + 1]
    idx_mapping_ptr,  # [requests], the state of each
    seq_lens_ptr,  # [requests]
    prefill_len_ptr,  # [states]
    seeds_ptr,  # [states]
    rates_ptr,  # [drafts], of synthetic acceptance
    SYNTHETIC: tl.constexpr,
):
    request = tl.program_id(0)
    state = tl.load(idx_mapping_ptr + request)
    prefill_len = tl.load(prefill_len_ptr + state)
    start = tl.load(cu_num_logits_ptr + request)
    num_logits = tl.load(cu_num_logits_ptr + request + 1) - start
    out = sampled_ptr + request * sampled_stride
    accepted = tl.zeros((), tl.int32)
    for i in range(num_logits - 1):
        if accepted == i:
            token = tl.load(logits_indices_ptr + start + i + 1)
            draft = tl.load(input_ids_ptr + token).to(tl.int64)
            if SYNTHETIC:
                position = tl.load(positions_ptr + tl.load(logits_indices_ptr + start + i))
                u = tl_rand32(tl.load(seeds_ptr + state), position, includes_zero=False)
                good = u < tl.load(rates_ptr + i)
            else:
                good = draft == tl.load(best_ptr + start + i)
            # In a step that begins in the prompt the drafts are placeholders.
            good &= (draft >= 0) & (tl.load(positions_ptr + token) - (i + 1) >= prefill_len)
            if good:
                tl.store(out + i, draft)
                accepted += 1
    tl.store(out + accepted, tl.load(best_ptr + start + accepted))
    # A prompt that does not end in this step has nothing to sample.
    unfinished = tl.load(seq_lens_ptr + request) < prefill_len
    tl.store(num_sampled_ptr + request, tl.where(unfinished, 0, accepted + 1))
    tl.store(num_rejected_ptr + request, tl.where(unfinished, 0, num_logits - accepted - 1))


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__",
        "self logits input_batch draft_logits invalid_drafts",
        _greedy_at_once,
        text="b9db0fd4e047bc4c",
    ),
)
