"""Triton kernels against their plain twins: on a GPU, or under Triton's interpreter, where
`test_kernels_interpreted.py` runs them."""

import os

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from drafthead.ops import attention, block_attention, kernels, losses  # noqa: E402
from drafthead.train import kernels as optimizer_kernels  # noqa: E402
from drafthead.train import muon, optimizer, split_fp32  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("kind", ["kl", "ce", "acceptance", "ce+tv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "shared"), [(50, None), (5000, None), (50, [2, 0, 0])])
def test_row_gradients(kind, dtype, width, shared):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 3, width, device=DEVICE)).to(dtype)
    teacher = 3 * torch.randn(3, width, device=DEVICE)
    labels = torch.tensor([1, -1, width - 1], device=DEVICE)
    weights = torch.tensor([[1.0, 1.0, 0.5], [0.8, 0.8, 0.0]], device=DEVICE)
    if shared:
        shared = torch.tensor(shared, device=DEVICE)
    expected = losses.row_gradients(logits.clone(), teacher, labels, weights, kind, shared)
    found = kernels.row_gradients(logits.clone(), teacher, labels, weights, kind, shared)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=1e-6)
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum(scale, dtype):
    torch.manual_seed(0)
    grad, mean = (torch.randn(50, 70, device=DEVICE) for _ in range(2))
    factor, results = torch.tensor(scale, device=DEVICE), []
    for rule in (muon.momentum, optimizer_kernels.momentum):
        found = mean.clone(), torch.full_like(mean, 7.0, dtype=dtype)
        rule(grad.to(dtype), *found, factor)
        results.append(found)
    for plain, kernel in zip(*results):
        torch.testing.assert_close(kernel, plain)
    assert torch.equal(results[0][0], mean) == (scale != scale)


@pytest.mark.parametrize("scale", [0.3, float("nan")])
def test_split_descend(scale):
    torch.manual_seed(0)
    master = torch.randn(50, 70, device=DEVICE)
    high, low = split_fp32.split(master)
    step = torch.randn(70, 50, device=DEVICE).bfloat16().mT
    numbers = torch.tensor([scale, 0.02, 0.001], device=DEVICE)
    expected = split_fp32.join(high, low).clone()
    start = expected.clone()
    muon.descend(expected, step, numbers, 1.7)
    optimizer_kernels.split_descend(high, low, step, numbers, 1.7)
    torch.testing.assert_close(split_fp32.join(high, low), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(expected, start) == (scale != scale)


@pytest.mark.parametrize("scale", [0.3, float("nan")])
def test_split_adamw(scale):
    torch.manual_seed(0)
    master = torch.randn(5000, device=DEVICE)
    high, low = split_fp32.split(master)
    grad = torch.randn(5000, device=DEVICE).bfloat16()
    mean, square = 0.1 * torch.randn_like(master), torch.rand_like(master)
    factor = torch.tensor(scale, device=DEVICE)
    numbers = 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.4
    plain = master.clone(), grad, mean.clone(), square.clone(), factor
    optimizer.update(*plain, *numbers)
    optimizer_kernels.split_adamw(high, low, grad, mean, square, factor, *numbers)
    torch.testing.assert_close(split_fp32.join(high, low), plain[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mean, plain[2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(square, plain[3], rtol=1e-6, atol=1e-7)
    assert torch.equal(high, split_fp32.split(split_fp32.join(high, low))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (2, 2)])
def test_merge(dtype, heads, groups):
    torch.manual_seed(0)
    n, d, steps = 11, 16, 3
    randn = lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)
    q, out, d_out, dq = (randn(n, heads, d) for _ in range(4))
    k, v = randn(steps, n, groups, d), randn(steps, n, groups, d)
    lse = torch.randn(heads, n, device=DEVICE)
    merged, total = attention.merge(out, lse, q, k, v)
    found, found_total = kernels.merge(out, lse, q, k, v)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, merged, **close)
    torch.testing.assert_close(found_total, total, **close)
    plain_dq, fused_dq = dq.clone(), dq.clone()
    expected = attention.merge_backward(d_out, merged, total, q, k, v, plain_dq)
    gradients = kernels.merge_backward(d_out, merged, total, q, k, v, fused_dq)
    torch.testing.assert_close(fused_dq, plain_dq, **close)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width", "size"), [(6, 2, 16, 5), (4, 4, 24, 8)])
def test_block_attention(heads, groups, width, size, causal):
    torch.manual_seed(0)
    # Documents of 100, 3 and 90 keys: tiles hold the end of one and the beginning of the next.
    start = [0] * 9 + [100] * 2 + [103] * 7
    end = [1, 2, 40, 41, 64, 65, 66, 99, 100, 101, 103, 104, 105, 140, 141, 150, 190, 193]
    blocks = block_attention.Blocks(
        *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (start, end)), size, causal
    )
    randn = lambda n, h: torch.randn(n, h, width, device=DEVICE).requires_grad_()
    queries = len(start) * size
    tensors = [randn(queries, heads), *(randn(193, groups) for _ in range(2))]
    tensors += [randn(queries, groups) for _ in range(2)]
    expected = block_attention.plain_block_attention(*tensors, blocks)
    d_out = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, d_out)
    plain = [x.detach() for x in tensors]
    out, lse = kernels.block_attention(*plain, blocks)
    close = {"rtol": 1e-4, "atol": 1e-4} if INTERPRETED else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected.detach(), **close)
    found = kernels.block_attention_backward(d_out, *plain, out, lse, blocks)
    for ours, theirs in zip(found, gradients):
        torch.testing.assert_close(ours, theirs, **close)
