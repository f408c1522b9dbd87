"""The short convolution on the CPU honours accepted counts.

``ShortConv.forward_native`` gives a verify step to a kernel that takes one token a request and
always reads the state from column 0. This forward does what ``forward_cuda`` does, in PyTorch.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadata

from .patch import Replacement, original

_PROBE = "drafthead.probe"


def needed() -> bool:
    """Whether a verify step gives the same, however many tokens the last one kept."""
    outputs = []
    for accepted in (1, 2):
        slots, columns, dim = 3, 3, 32
        state = torch.arange(slots * columns * dim, dtype=torch.float32).view(slots, dim, columns)
        layer = SimpleNamespace(
            prefix=_PROBE,
            kv_cache=[state if is_conv_state_dim_first() else state.transpose(1, 2).contiguous()],
            # With a row more behind it: the kernel that has the fault reads past the end.
            conv=SimpleNamespace(weight=torch.ones(dim + 1, 1, 3)[:dim], bias=None),
            in_proj=lambda x: (torch.cat([torch.ones_like(x)] * 2 + [x], dim=-1), None),
            out_proj=lambda x: (x, None),
        )
        metadata = ShortConvAttentionMetadata(
            num_prefills=0,
            num_prefill_tokens=0,
            num_decodes=1,
            num_decode_tokens=2,
            num_reqs=1,
            has_initial_states_p=None,
            query_start_loc_p=None,
            num_accepted_tokens=torch.tensor([accepted], dtype=torch.int32),
            query_start_loc_d=torch.tensor([0, 2], dtype=torch.int32),
            state_indices_tensor_p=None,
            state_indices_tensor_d=torch.tensor([[1, 2]], dtype=torch.int32),
            seq_lens=torch.tensor([9], dtype=torch.int32),
        )
        out = torch.zeros(2, dim)
        with override_forward_context(SimpleNamespace(attn_metadata={_PROBE: metadata})):
            original(ShortConv, "forward_native")(layer, torch.ones(2, dim), out)
        outputs.append(out)
    return torch.equal(*outputs)


def causal_conv1d_verify(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: torch.Tensor,
    num_accepted: torch.Tensor,
    query_start: torch.Tensor,
) -> torch.Tensor:
    """Causal depthwise convolution of verify rows, and the state that any acceptance can use.

    With W taps, a request's state holds the W - 1 inputs before its first row from column
    ``num_accepted - 1`` on. Afterwards it holds the last W - 2 of them followed by the step's
    inputs, so that column ``accepted - 1`` is again where the next step starts.

    Args:
        x: inputs [tokens, dim], requests one after the other.
        conv_state: [slots, dim, columns], columns >= W - 2 + the longest request; written to.
        weight: [dim, W].
        bias: [dim] or None.
        slots: [requests], the slot of each.
        num_accepted: [requests], tokens that the last step kept, at least 1.
        query_start: [requests + 1], the first row of each request in ``x``.

    Returns:
        [tokens, dim].
    """
    taps = weight.shape[1]
    starts = query_start[:-1].long()
    lengths = query_start[1:].long() - starts
    steps = torch.arange(int(lengths.max()))
    rows = (starts[:, None] + steps).clamp_(max=x.shape[0] - 1)  # [requests, longest]
    slots = slots.long()
    columns = num_accepted.long()[:, None] - 1 + torch.arange(taps - 1)
    state = conv_state[slots]
    history = state.gather(2, columns[:, None, :].expand(-1, state.shape[1], -1))
    window = torch.cat([history, x.to(conv_state.dtype)[rows].transpose(1, 2)], dim=-1)
    mixed = F.conv1d(window.to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    # Columns past a shorter request's own rows are never read: it accepts at most its rows.
    conv_state[slots, :, : window.shape[2] - 1] = window[:, :, 1:]
    out = torch.empty_like(x)
    own = steps < lengths[:, None]
    out[rows[own]] = mixed.transpose(1, 2)[own].to(x.dtype)
    return out


def _speculative(stock):
    def forward_native(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        metadata = None if metadata is None else metadata.get(self.prefix)
        if metadata is None or metadata.num_accepted_tokens is None:
            stock(self, hidden_states, output)
            return
        state = self.kv_cache[0]
        state = state if is_conv_state_dim_first() else state.transpose(-1, -2)
        weight = self.conv.weight.view(self.conv.weight.size(0), self.conv.weight.size(2))
        decoded, prefilled = metadata.num_decode_tokens, metadata.num_prefill_tokens
        gate_in, gate_out, x = self.in_proj(hidden_states)[0].chunk(3, dim=-1)
        x = (gate_in * x)[: decoded + prefilled]
        mixed = torch.empty_like(x)
        if metadata.num_decodes:
            mixed[:decoded] = causal_conv1d_verify(
                x[:decoded],
                state,
                weight,
                self.conv.bias,
                metadata.state_indices_tensor_d[:, 0],
                metadata.num_accepted_tokens,
                metadata.query_start_loc_d,
            )
        if metadata.num_prefills:
            mixed[decoded:] = causal_conv1d_fn_cpu(
                x[decoded:].transpose(0, 1),
                weight,
                self.conv.bias,
                state,
                metadata.query_start_loc_p,
                metadata.state_indices_tensor_p,
                metadata.has_initial_states_p,
                activation=None,
            ).transpose(0, 1)
        output[: decoded + prefilled] = self.out_proj(gate_out[: decoded + prefilled] * mixed)[0]

    return forward_native


REPLACEMENTS = (
    Replacement(
        "vllm.model_executor.layers.mamba.short_conv:ShortConv.forward_native",
        "self hidden_states output",
        _speculative,
    ),
)
