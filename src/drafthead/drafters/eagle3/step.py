"""One packed row through head and loss: gradients and the numbers that logs want."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.ttt import TrainingTimeTest
from drafthead.head.model import Eagle3Head
from drafthead.ops.losses import LossKind, Teacher, fused_loss, hidden_regression
from drafthead.recipe import Loss


@dataclass(frozen=True)
class Objective:
    """The objective to minimise: sum over steps t of decay ** t times the mean loss of step t's
    rows."""

    loss: Loss = "kl"
    steps: int = 3
    decay: float = 0.8
    regression_weight: float = 1.0
    """Weight of SmoothL1 beside cross-entropy (`ce+smoothl1` only)."""
    chunk_rows: int = 2048
    """Rows whose logits exist at once, 131 MB at 32,000 in bf16, and twice that for the teacher's
    in fp32 at one step: large enough for full speed."""


class TrainStep:
    """Adds one row's gradients to the head's parameters.

    teacher: the target's norm and LM-head rows, in the head's dtype. Head, teacher and batches
    live on one device.
    """

    def __init__(
        self,
        head: Eagle3Head,
        teacher: Teacher,
        objective: Objective,
        compiled: bool = False,
    ):
        self.head, self.teacher, self.objective = head, teacher, objective
        self.states = TrainingTimeTest(head, objective.steps, compiled)
        device = teacher.head.device
        self.step_weights = objective.decay ** torch.arange(objective.steps, device=device).float()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss summed over the row's tokens, and for each step how many predictions were
        right and how many there were: int64 [T]."""
        objective = self.objective
        normed = self.states(batch)
        weights = self.step_weights[:, None] * batch.has_row
        last = batch.last.to(normed.dtype)
        kind: LossKind = "ce" if objective.loss == "ce+smoothl1" else objective.loss
        loss, correct = fused_loss(
            normed,
            self.head.lm_head.weight,
            last,
            self.teacher,
            batch.labels,
            weights,
            kind,
            objective.chunk_rows,
        )
        if kind == "ce":
            target = self.teacher.normed(last)
            loss = loss + objective.regression_weight * hidden_regression(normed, target, weights)
        return loss, correct, batch.has_row.sum(-1)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate gradients of the summed loss; returns what `loss` does, detached."""
        loss, correct, counted = self.loss(batch)
        loss.backward()
        return loss.detach(), correct, counted
