"""The chunked loss against its plain twin, value and gradients."""

import weakref

import pytest
import torch

from drafthead.train import losses
from drafthead.train.losses import (
    Teacher,
    fused_loss,
    hidden_regression,
    plain_loss,
    row_gradients,
    row_loss,
)


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


@pytest.mark.parametrize("kind", ["kl", "ce", "acceptance"])
def test_closed_form_gradient_is_that_of_autograd(kind):
    normed, lm_head, last, teacher, labels, weights = problem(torch.float64)
    logits = (normed @ lm_head.t()).detach().requires_grad_()
    soft = teacher.logits(last)
    loss = row_loss(logits, soft, labels, kind) * weights
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    losses, gradient, predicted = row_gradients(
        logits.detach().clone(), soft, labels, weights, kind
    )
    torch.testing.assert_close(losses, loss.detach())
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(predicted, logits.argmax(-1))


def test_kl_is_zero_where_the_head_equals_the_teacher_and_rows_outside_weigh_nothing():
    logits = torch.randn(4, 9)
    labels = torch.tensor([3, -1, 0, 8])
    assert row_loss(logits, logits + 2.0, labels, "kl").abs().max() < 1e-6
    outside = row_loss(logits, torch.randn(4, 9), labels, "kl")
    assert outside[1] == 0
    assert (outside[[0, 2, 3]] > 0).all()


def test_kl_drops_what_the_target_puts_outside_the_draft_vocabulary():
    full = torch.randn(5, 20, dtype=torch.float64)
    inside = torch.arange(3, 15)
    logits = torch.randn(5, 12, dtype=torch.float64)
    p = full.softmax(-1)[:, inside]
    p = p / p.sum(-1, keepdim=True)
    by_hand = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
    ours = row_loss(logits, full[:, inside], torch.zeros(5, dtype=torch.long), "kl")
    torch.testing.assert_close(ours, by_hand)


def test_acceptance_is_what_speculative_sampling_accepts():
    """A draft x from q is accepted with probability min(1, p(x) / q(x)); counted over drafts."""
    g = torch.Generator().manual_seed(0)
    teacher, logits = (2 * torch.randn(1, 7, generator=g) for _ in range(2))
    p, q = teacher.softmax(-1)[0], logits.softmax(-1)[0]
    drafts = q.multinomial(200_000, replacement=True, generator=g)
    accepted = torch.rand(len(drafts), generator=g) < (p / q)[drafts]
    loss = row_loss(logits, teacher, torch.tensor([0]), "acceptance")
    assert float((-loss).exp()) == pytest.approx(float(accepted.float().mean()), abs=5e-3)


def test_acceptance_of_a_sure_teacher_is_cross_entropy():
    logits, labels = torch.randn(4, 9), torch.tensor([3, 1, 0, 8])
    sure = torch.full((4, 9), -200.0).scatter(1, labels[:, None], 0.0)
    ours = row_loss(logits, sure, labels, "acceptance")
    torch.testing.assert_close(ours, row_loss(logits, None, labels, "ce"))


def test_acceptance_stays_finite_where_head_and_teacher_have_nothing_in_common():
    logits = torch.tensor([[[500.0, -500.0]]])
    teacher = torch.tensor([[-500.0, 500.0]])
    label, weight = torch.tensor([0]), torch.ones(1, 1)
    loss, gradient, _ = row_gradients(logits, teacher, label, weight, "acceptance")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


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
