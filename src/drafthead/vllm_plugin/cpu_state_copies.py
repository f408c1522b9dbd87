"""Prefix caching with speculation on hybrid targets, on the CPU.

The state of a request moves to another block at block boundaries. With speculation two Triton
kernels do that, and the CPU has no twin of them: a ``TypeError`` ends the engine at the first
step. These are the twins, with the same decisions and the same copies.
"""

import ctypes

from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker import mamba_utils
from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

from .patch import Replacement


def needed() -> bool:
    """Whether the kernels cannot be started: one without a twin is the plain function that Triton
    would have compiled."""
    return not HAS_TRITON and not hasattr(
        mamba_utils.precopy_mamba_align_fused_kernel, "__getitem__"
    )


def run_fused_precopy(
    self: MambaSpecDecodeGPUContext,
    num_reqs: int,
    state_idx_gpu,
    src_col_gpu,
    token_bias_gpu,
    idx_mapping,
) -> None:
    """Before a step: move each request's state into the block that the step writes."""
    if num_reqs == 0 or not self.is_initialized:
        return
    rows = range(num_reqs) if idx_mapping is None else idx_mapping[:num_reqs].tolist()
    for row in rows:
        source, target = int(src_col_gpu[row]), int(state_idx_gpu[row])
        if source >= 0 and source != target:
            _move(self, row, source, target, int(token_bias_gpu[row]))


def run_fused_postprocess(
    self: MambaSpecDecodeGPUContext,
    num_reqs: int,
    num_accepted_tokens_gpu,
    mamba_state_idx_gpu,
    num_scheduled_tokens_gpu,
    num_computed_tokens_gpu,
    num_draft_tokens_gpu,
) -> None:
    """After a step: keep the state at a block boundary that the accepted tokens went past."""
    if num_reqs == 0 or not self.is_initialized:
        return
    self.num_accepted_tokens_out[:num_reqs].copy_(num_accepted_tokens_gpu[:num_reqs])
    for row in range(num_reqs):
        # Tokens that the state's first column stands for, and all that are computed now.
        first = int(num_computed_tokens_gpu[row] + num_scheduled_tokens_gpu[row])
        first -= int(num_draft_tokens_gpu[row])
        computed = first + int(num_accepted_tokens_gpu[row]) - 1
        boundary = computed // self.block_size * self.block_size
        if boundary < first:
            continue
        source, target = int(mamba_state_idx_gpu[row]), boundary // self.block_size - 1
        if source == target:
            self.num_accepted_tokens_out[row] = 1
        if source != target or boundary != first:
            _move(self, row, source, target, boundary - first)


def _move(
    context: MambaSpecDecodeGPUContext, row: int, source: int, target: int, bias: int
) -> None:
    """Copy all states of a request from block column ``source``, ``bias`` tokens on, to ``target``.

    A convolution's state starts ``bias`` tokens later in the same block; a recurrent state lies
    ``bias`` blocks further.
    """
    for state in range(context.num_states):
        group = int(context.state_group_indices[state])
        table = int(context.block_table_ptrs[group]) + 4 * row * context.block_table_stride_req
        width = int(context.state_conv_widths[state])
        column = source if width else source + bias
        base = int(context.state_base_addrs[state])
        stride = int(context.state_block_strides[state])
        src = base + ctypes.c_int32.from_address(table + 4 * column).value * stride
        dst = base + ctypes.c_int32.from_address(table + 4 * target).value * stride
        element, inner = int(context.state_elem_sizes[state]), int(context.state_inner_sizes[state])
        if not width:
            ctypes.memmove(dst, src, inner * element)
        elif is_conv_state_dim_first():
            step = int(context.state_dim_row_stride[state])
            for dim in range(int(context.state_dim_row_count[state])):
                start = src + dim * step + bias * element
                ctypes.memmove(dst + dim * step, start, (width - bias) * element)
        else:
            token = inner * element
            ctypes.memmove(dst, src + bias * token, (width - bias) * token)


_CONTEXT = "vllm.v1.worker.mamba_utils:MambaSpecDecodeGPUContext."
REPLACEMENTS = (
    Replacement(
        f"{_CONTEXT}run_fused_precopy",
        "self num_reqs state_idx_gpu src_col_gpu token_bias_gpu idx_mapping",
        lambda _: run_fused_precopy,
    ),
    Replacement(
        f"{_CONTEXT}run_fused_postprocess",
        "self num_reqs num_accepted_tokens_gpu mamba_state_idx_gpu num_scheduled_tokens_gpu "
        "num_computed_tokens_gpu num_draft_tokens_gpu",
        lambda _: run_fused_postprocess,
    ),
)
