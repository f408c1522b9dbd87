"""Sampling with speculation on the CPU: each draft's row of logits gets its request's temperature.

The CPU's twin of ``expand_kernel`` converts its output to int64 before it is filled: with a float
output (temperature, top-p) it fills a copy, and the caller goes on with memory that nobody wrote.
Sampled answers then come from a distribution of any temperature.
"""

import torch
from vllm.platforms import current_platform

from .patch import Replacement, original


def needed() -> bool:
    """Whether a float's output is not filled."""
    from vllm.utils import cpu_triton_utils

    current_platform.import_kernels()
    output = torch.full((2,), float("nan"))
    ends = torch.tensor([2], dtype=torch.int32)
    original(cpu_triton_utils, "_expand_kernel_impl")(output, torch.tensor([0.7]), ends, 0, 1)
    return not torch.equal(output, torch.tensor([0.7, 0.7]))


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
) -> None:
    """Repeat each request's value for its tokens.

    Args:
        output: any type [tokens]; filled.
        values: the same type [requests].
        cu_num_tokens: int [requests], tokens of the requests up to and with each.
        replace_from: a value to replace,
        replace_to: and by what.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values).to(output.dtype)
    output.copy_(replaced.repeat_interleave(counts))


def _any_type(stock):
    def expand_kernel(
        output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None
    ):
        expand(output, input_val, cu_num_tokens, replace_from, replace_to)

    return expand_kernel


REPLACEMENTS = (
    Replacement(
        "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        "output input_val cu_num_tokens replace_from replace_to MAX_NUM_TOKENS",
        _any_type,
    ),
)
