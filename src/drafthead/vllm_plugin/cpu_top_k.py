"""A step without drafts does not end the engine on the CPU.

The rejection sampler masks the logits of drafts. In such a step there are no rows to mask, and the
CPU's way of masking cannot take that.
"""

import torch

from .patch import Replacement, original


def needed() -> bool:
    """Whether no rows of logits are more than the mask can take."""
    from vllm.v1.sample.ops import topk_topp_sampler

    mask = original(topk_topp_sampler, "apply_top_k_only")
    try:
        mask(torch.empty(0, 8), torch.empty(0, dtype=torch.int32))
    except RuntimeError:
        return True
    return False


def _of_no_rows_too(stock):
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return stock(logits, k) if len(logits) else logits

    return apply_top_k_only


REPLACEMENTS = (
    Replacement(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only", "logits k", _of_no_rows_too
    ),
)
