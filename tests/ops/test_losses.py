"""The chunked loss against its plain twin, value and gradients."""

import weakref

import pytest
import torch

from drafthead.ops import losses
from drafthead.ops.losses import (
    Teacher,
    fused_loss,
    hidden_regression,
)
from tests.reference.plain_loss import plain_loss
from tests.refused import refused


def problem(dtype, steps=3, tokens=11, width=8, target_width=6, vocab=13):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[2] = -1
    weights = torch.tensor([0.8**t for t in range(steps)])[:, None].repeat(1, tokens)
    weights[2, 0] = 0
    teacher = Teacher(1 + 0.1 * randn(target_width), 1e-5, 2 * randn(vocab, target_width))
    normed = (3 * randn(steps, tokens, width)).requires_grad_()
    lm_head = randn(vocab, width).requires_grad_()
    return normed, lm_head, randn(tokens, target_width), teacher, labels, weights.to(dtype)


@pytest.mark.parametrize("kind", ["kl", "ce", "acceptance"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_rows", [1, 9, 10_000])
def test_fused_loss_is_the_plain_loss(kind, dtype, tolerance, chunk_rows):
    arguments = problem(dtype)
    plain, plain_correct = plain_loss(*arguments, kind)
    expected = torch.autograd.grad(2 * plain, arguments[:2])
    fused, correct = fused_loss(*arguments, kind, chunk_rows)
    gradients = torch.autograd.grad(2 * fused, arguments[:2])
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(correct, plain_correct)
    for ours, theirs in zip(gradients, expected):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_loss_that_there_is_not_is_refused():
    with refused("ce+smoothl1", field="loss"):
        fused_loss(*problem(torch.float32), "ce+smoothl1")


def test_hidden_regression_is_the_weighted_sum_of_smooth_l1():
    normed = torch.randn(2, 3, 4, dtype=torch.float32)
    target = torch.randn(3, 4)
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    difference = (normed - target).abs()
    by_hand = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean(-1)
    torch.testing.assert_close(
        hidden_regression(normed, target, weights), (by_hand * weights).sum()
    )


def test_a_chunk_is_freed_before_the_next(monkeypatch):
    """Logits and teacher of two chunks at once would be most of a step's peak memory."""
    plain, product, before = losses.gradient_rule(torch.zeros(())), losses.matmul_fp32, []

    def rule(logits, teacher, *rest):
        found = plain(logits, teacher, *rest)
        before[:] = [weakref.ref(teacher), weakref.ref(found[1])]
        return found

    def teacher_logits(x, weight):
        assert all(ref() is None for ref in before)
        return product(x, weight)

    monkeypatch.setattr(losses, "gradient_rule", lambda x: rule)
    monkeypatch.setattr(losses, "matmul_fp32", teacher_logits)
    fused_loss(*problem(torch.float32), "kl", 9)
    assert before


def test_no_gradient_no_buffers():
    arguments = problem(torch.float32)
    with torch.no_grad():
        loss, _ = fused_loss(*arguments, "kl")
    plain, _ = plain_loss(*arguments, "kl")
    torch.testing.assert_close(loss, plain.detach())
