"""Eight-bit products: against their definition, and their gradients against exact ones."""

import pytest
import torch
from torch import nn

from drafthead.errors import DraftheadError
from drafthead.train import fp8
from drafthead.train.losses import fused_loss, plain_loss
from tests.heads import small_head
from tests.train.test_losses import problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [fp8.VALUES, fp8.GRADIENTS])
def test_quantized_values_are_within_the_formats_precision(kind, device):
    x = torch.randn(20, 48, device=device) * torch.logspace(-3, 3, 48, device=device)
    found = fp8.quantize(x, kind)
    back = found.values.float() * found.scale
    step = torch.finfo(kind).eps / 2 * x.abs() + found.scale * torch.finfo(kind).smallest_normal
    assert ((back - x).abs() <= step).all()
    assert fp8.quantize(torch.zeros(3, 16, device=device)).values.float().abs().max() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [fp8.VALUES, fp8.GRADIENTS])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_product_is_its_definition(kind, out, exact, device):
    torch.manual_seed(0)
    a = fp8.quantize(3 * torch.randn(7, 64, device=device), kind)
    b = fp8.quantize(torch.randn(32, 64, device=device))
    found, expected = fp8.product(a, b, out, exact), fp8.plain_product(a, b, out)
    tolerance = 1e-2 if out == torch.bfloat16 or device == "cuda" else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    turned = fp8.transposed(b)
    assert torch.equal(turned.values.float(), b.values.float().t())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_linear_and_its_gradients_are_nearly_exact(rows, device):
    torch.manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    layer = nn.Linear(64, 32, device=device, dtype=kind)
    x, direction = (torch.randn(rows, n, device=device, dtype=kind) for n in (64, 32))
    x.requires_grad_()
    exact = layer(x)
    expected = torch.autograd.grad((exact * direction).sum(), [x, *layer.parameters()])
    layer.__class__ = fp8.Linear
    found = layer(x)
    gradients = torch.autograd.grad((found * direction).sum(), [x, *layer.parameters()])
    assert found.shape == exact.shape
    assert 0.99 < alike(found, exact) < 1
    for ours, theirs in zip(gradients, expected):
        assert ours.shape == theirs.shape
        assert alike(ours, theirs) > 0.99
    with torch.no_grad():
        assert torch.equal(layer(x), exact)  # as it will be served


def test_loss_with_eight_bit_products():
    arguments = problem(torch.float32, tokens=40, width=32, vocab=48)
    plain, _ = plain_loss(*arguments, "kl")
    expected = torch.autograd.grad(plain, arguments[:2])
    loss, _ = fused_loss(*arguments, "kl", 50, eight_bit=True)
    gradients = torch.autograd.grad(loss, arguments[:2])
    assert float(loss) == pytest.approx(float(plain), rel=2e-2)
    for ours, theirs in zip(gradients, expected):
        assert 0.99 < alike(ours, theirs) < 1


def test_convert_keeps_parameters_and_leaves_the_lm_head():
    head = small_head()
    before = dict(head.named_parameters())
    fp8.convert(head)
    assert all(p is before[name] for name, p in head.named_parameters())
    assert type(head.layers[0].mlp.down_proj) is fp8.Linear
    assert type(head.lm_head) is nn.Linear


def test_a_device_without_eight_bit_products_is_refused():
    with pytest.raises(DraftheadError, match="found cpu; use bf16"):
        fp8.require(torch.device("cpu"), small_head())


def test_odd_widths_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(DraftheadError, match=r"multiples of 16.*lm_head.weight is \[\d+, "):
        fp8.require(torch.device("cuda"), small_head(draft_vocab_size=27))
