"""The loss of a row against its definition, and its gradient against autograd."""

import pytest
import torch

from drafthead.ops.losses import row_gradients
from tests.reference.plain_loss import row_loss


@pytest.mark.parametrize("kind", ["kl", "ce", "acceptance", "ce+tv"])
def test_closed_form_gradient_is_that_of_autograd(kind):
    g = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(3, 11, 13, generator=g, dtype=torch.float64)
    soft = 4 * torch.randn(11, 13, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 13, (11,), generator=g)
    labels[2] = -1
    weights = torch.tensor([1.0, 0.8, 0.64], dtype=torch.float64)[:, None].repeat(1, 11)
    weights[2, 0] = 0
    logits.requires_grad_()
    loss = row_loss(logits, soft, labels, kind) * weights
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    losses, gradient, predicted, overlap = row_gradients(
        logits.detach().clone(), soft, labels, weights, kind
    )
    if kind != "ce":
        accepted = torch.minimum(soft.softmax(-1), logits.detach().softmax(-1)).sum(-1)
        torch.testing.assert_close(overlap, accepted)
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
    loss, gradient, *_ = row_gradients(logits, teacher, label, weight, "acceptance")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "acceptance", "ce+tv"])
def test_rows_that_share_a_teacher_row(kind):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 13, generator=g)
    teacher, labels = torch.randn(2, 13, generator=g), torch.tensor([4, 7])
    shared, weights = torch.tensor([0, 1, 1, 0, 1]), torch.rand(1, 5, generator=g)
    apart = row_gradients(logits.clone(), teacher[shared], labels[shared], weights, kind)
    together = row_gradients(logits.clone(), teacher, labels, weights, kind, shared)
    for expected, found in zip(apart, together):
        torch.testing.assert_close(found, expected)
