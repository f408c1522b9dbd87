"""CUDA graphs of short-conv layers for steps with fewer drafts than the most.

With ``num_speculative_tokens_per_batch_size`` vLLM captures a graph for each number of drafts. The
metadata builder of state layers asserts that every graph is for the largest number, so an engine
with such layers does not start. The conv kernel itself takes rows of any width up to that: it reads
where they begin, and how many tokens of each were accepted.
"""

from types import SimpleNamespace

import torch
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder

from .patch import Replacement, original


def needed() -> bool:
    """Whether a graph of two rows of one draft is refused where three are the most."""
    builder = SimpleNamespace(
        num_spec_tokens=3, decode_cudagraph_max_bs=8, build=lambda *_, **named: None
    )
    batch = SimpleNamespace(
        max_query_len=2, num_reqs=2, query_start_loc=torch.tensor([0, 2, 4], dtype=torch.int32)
    )
    capture = original(BaseMambaAttentionMetadataBuilder, "build_for_cudagraph_capture")
    try:
        capture(builder, batch)
    except AssertionError:
        return True
    return False


def _of_any_width(stock):
    def build_for_cudagraph_capture(self, common_attn_metadata):
        m = common_attn_metadata
        if (
            not isinstance(self, ShortConvAttentionMetadataBuilder)
            or m.max_query_len > self.num_spec_tokens
            or m.num_reqs > self.decode_cudagraph_max_bs
        ):
            return stock(self, m)
        return self.build(0, m, num_accepted_tokens=torch.diff(m.query_start_loc))

    return build_for_cudagraph_capture


REPLACEMENTS = (
    Replacement(
        "vllm.v1.attention.backends.mamba_attn:BaseMambaAttentionMetadataBuilder."
        "build_for_cudagraph_capture",
        "self common_attn_metadata",
        _of_any_width,
    ),
)
