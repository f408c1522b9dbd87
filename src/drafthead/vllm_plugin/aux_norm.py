"""The norms before a head's ``fc`` are one kernel.

Before it drafts, vLLM combines the auxiliary states of all rows of the step, outside the CUDA graph
and outside compiled code. Where Inductor compiles the model, an ``RMSNorm`` called there runs as
its definition, eight PyTorch kernels one after the other: eight launches for ``norm_before_fc``,
twenty-five for ``fc_norm`` (one norm for each of three layers, and a concatenation), in every step.
Here either is one launch, rounded where vLLM rounds.
"""

from collections.abc import Sequence

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

from .patch import Replacement

_JOINED = "_drafthead_weight"


def needed() -> bool | None:
    """Not without Triton, as on most CPUs: there vLLM's own runs."""
    return None if HAS_TRITON else False


def _normed_at_once(stock):
    def combine_hidden_states(self, hidden_states):
        model = self.model
        if not model.use_aux_hidden_state:
            return stock(self, hidden_states)
        if model.norm_before_fc:
            hidden_states = norm_parts(hidden_states, [model.input_norm])
        if model.fc_norm is not None:
            hidden_states = norm_parts(hidden_states, model.fc_norm)
        return model.fc(hidden_states)

    return combine_hidden_states


def norm_parts(x: torch.Tensor, norms: Sequence[torch.nn.Module]) -> torch.Tensor:
    """RMSNorm of each of the equal parts of ``x`` [rows, width], by the norm of its place.

    It is ``torch.cat([norm(part) for norm, part in zip(norms, x.chunk(len(norms), -1))], -1)``,
    except that the squares are added in another order: a normed value may round to the neighbour.

    Args:
        x: of the dtype of the norms' weights.
        norms: vLLM's ``RMSNorm``, of one ``variance_epsilon``. Their weights become views of one
            tensor.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[1] // len(norms)
    block = triton.next_power_of_2(width)
    _norm_kernel[(x.shape[0], len(norms))](
        out,
        x,
        _weight(norms),
        norms[0].variance_epsilon,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


def _weight(norms: Sequence[torch.nn.Module]) -> torch.Tensor:
    """The weights [width of all] in one piece; the first call, after loading, joins them."""
    if len(norms) == 1:
        return norms[0].weight.data
    joined = getattr(norms, _JOINED, None)
    if joined is None:
        joined = torch.cat([norm.weight.data for norm in norms])
        # Views, so that weights loaded anew into them are the ones used.
        for norm, part in zip(norms, joined.chunk(len(norms))):
            norm.weight.data = part
        setattr(norms, _JOINED, joined)
    return joined


@triton.jit
def _norm_kernel(
    out_ptr,  # [rows, parts, WIDTH], written
    x_ptr,  # [rows, parts, WIDTH]
    weight_ptr,  # [parts, WIDTH]
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1)
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + part) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + at + columns, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + part * WIDTH + columns, inside, other=0.0)
    # Rounded to the weights' type before they multiply, as in vllm.ir.ops.rms_norm.
    normed = (x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)).to(weight.dtype)
    scaled = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + at + columns, scaled.to(weight.dtype), inside)


REPLACEMENTS = (
    Replacement(
        "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.combine_hidden_states",
        "self hidden_states",
        _normed_at_once,
        text="00ad6c4898f6b5d7",
    ),
)
