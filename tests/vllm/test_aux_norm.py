"""The norms before a head's fc in one kernel, against vLLM's own operations."""

from types import SimpleNamespace

import pytest
import torch

from drafthead.vllm_plugin import aux_norm, patch

ROWS, PARTS, EPS = 5, 3, 1e-5

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts float32 off where it is made a bfloat16; float16 it rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()

with_triton = pytest.mark.skipif(not aux_norm.HAS_TRITON, reason="see test_greedy_verify.py")


def _norm(width: int, dtype: torch.dtype) -> torch.nn.Module:
    """What vLLM's RMSNorm does outside compiled code."""
    from vllm import ir

    class Norm(torch.nn.Module):
        variance_epsilon = EPS

        def __init__(self):
            super().__init__()
            weight = 0.5 + torch.rand(width, device=DEVICE)
            self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)

        def forward(self, x):
            return ir.ops.rms_norm.impls["native"].impl_fn(x, self.weight, EPS)

    return Norm()


def _head(kind: str, width: int, dtype: torch.dtype):
    """As much of an EAGLE-3 head as combines states; its fc leaves them as they are."""
    norms = torch.nn.ModuleList(_norm(width, dtype) for _ in range(PARTS))
    model = SimpleNamespace(
        use_aux_hidden_state=kind != "no aux",
        norm_before_fc="norm_before_fc" in kind,
        input_norm=_norm(PARTS * width, dtype) if "norm_before_fc" in kind else None,
        fc_norm=norms if "fc_norm" in kind else None,
        num_aux_hidden_states=PARTS,
        fc=lambda x: x,
    )
    return SimpleNamespace(model=model)


@with_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576])
@pytest.mark.parametrize(
    "kind", ["norm_before_fc", "fc_norm", "norm_before_fc, fc_norm", "none", "no aux"]
)
def test_is_what_vllm_computes(kind, width, dtype):
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

    stock = patch.original(Eagle3LlamaForCausalLM, "combine_hidden_states")
    torch.manual_seed(0)
    head = _head(kind, width, dtype)
    # Layers of different sizes, as their states are; a row of zeros, as of a padded step.
    x = torch.randn(ROWS, PARTS, width) * torch.tensor([0.1, 3.0, 50.0])[:, None]
    x[-1] = 0
    x = x.view(ROWS, -1).to(DEVICE, dtype)
    want = stock(head, x)
    patched = aux_norm._normed_at_once(stock)
    for _ in range(2):  # the first call joins the weights
        got = patched(head, x)
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        else:  # a rounding in each norm, to the neighbour, and of few values
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)
            assert (got != want).float().mean() < 0.02
    assert torch.equal(stock(head, x), want)


@with_triton
def test_weights_loaded_anew_are_used():
    head = _head("fc_norm", 64, torch.float32)
    norms = head.model.fc_norm
    x = torch.randn(ROWS, PARTS * 64, device=DEVICE)
    before = aux_norm.norm_parts(x, norms)
    norms[1].weight.data.mul_(2)
    after = aux_norm.norm_parts(x, norms)
    assert torch.equal(after[:, 64:128], 2 * before[:, 64:128])
    assert torch.equal(after[:, 128:], before[:, 128:])
