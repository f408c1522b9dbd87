"""Acceptance of sampled requests, expected from held-out states: no engine draws anything.

Where the target's distribution is p and the head's q, speculative sampling keeps a draft drawn from
q with probability sum min(p, q) (Leviathan et al., arXiv 2211.17192), and the likeliest draft with
probability p(draft). Of text that was itself drawn from p it is sharper to ask for the draft of the
token that came: kept with probability min(1, q / p) of that token, or if it was the likeliest. p is
cut by top_k and top_p and q is not, as vLLM draws drafts.

The walk is `drafthead.train.evaluate`'s: steps begin where the one before ended, here each with its
probability. What is not modelled: over greedy answers, contexts of sampled ones, which are less
easily guessed; penalties, min_p and grammars.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drafthead.drafters.base import Drafter, TargetSide
from drafthead.states import Sample

METHODS = ("greedy", "probabilistic")
"""vLLM's `draft_sample_method`."""
_STRETCHES = (0, 128, 256, 512, 1024, 2048, 4096)
"""Where stretches of an answer begin, whose acceptance is told apart."""


@dataclass(frozen=True)
class Sampling:
    """How requests are drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [M, V] -> the distribution that tokens are drawn from, fp32 [M, V]."""
        if not self.temperature:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            kept = torch.zeros_like(probabilities, dtype=torch.bool)
            kept.scatter_(-1, order, before < self.top_p)
            probabilities = probabilities * kept
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities


def kept(
    p: Tensor, logits: Tensor, ids: Tensor, temperature: float, truth: Tensor | None
) -> dict[str, Tensor]:
    """The chance that a draft is kept, by `draft_sample_method`: fp32 [M] each.

    p [M, V]: the target's. logits [M, Vd]: the head's, before temperature. ids int64 [Vd]: the
    target id of each draft id. truth int64 [M]: the tokens that came if they were drawn from p.
    """
    best = ids[logits.argmax(-1)]
    if truth is None:
        likeliest = p.gather(-1, best[:, None]).squeeze(-1)
    else:
        likeliest = (best == truth).float()
    if not temperature:
        return dict.fromkeys(METHODS, likeliest)
    q = torch.zeros_like(p)
    q[:, ids] = (logits / temperature).softmax(-1)
    if truth is None:
        drawn = torch.minimum(p, q).sum(-1)
    else:
        p_truth, q_truth = (x.gather(-1, truth[:, None]).squeeze(-1) for x in (p, q))
        drawn = (q_truth / p_truth.clamp(min=1e-30)).clamp(max=1.0)
    return dict(zip(METHODS, (likeliest, drawn), strict=True))


def expected_walk(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and accepted drafts to be expected of one answer, by where in it a step begins.

    Args:
        rates: [n - 1, k]: the chance that draft j + 1 of a step that begins at answer token c is
            kept if those before it were; 0 beyond the end of the answer.

    Returns:
        Expected number of steps that begin at each token [n - 1], and of drafts that they have
        accepted at each position [n - 1, k].
    """
    rows, k = rates.shape
    begins = np.zeros(rows + k + 1)
    begins[0] = 1.0
    reached = np.cumprod(rates, axis=1)
    for row in range(rows):
        ends = -np.diff(reached[row], prepend=1.0, append=0.0)
        begins[row + 1 : row + k + 2] += begins[row] * ends
    steps = begins[:rows]
    return steps, steps[:, None] * reached


@torch.no_grad()
def expected_acceptance(
    drafter: Drafter,
    head: nn.Module,
    target: TargetSide,
    samples: Iterable[Sample],
    k: int,
    samplings: Sequence[Sampling],
    drawn_with: Sampling | None = None,
) -> list[dict[str, Any]]:
    """Expected acceptance for each way to sample and each way to draw drafts.

    Args:
        drafter: of the head's kind.
        head: the head, on the device of the states.
        target: with a teacher over the target's whole vocabulary.
        samples: held-out answers with their states.
        k: tokens drafted a step.
        samplings: how requests are drawn.
        drawn_with: how the answers were drawn; the tokens themselves tell more where a sampling is
            the same.

    Returns:
        JSON-able, for each: ``temperature, top_p, top_k, draft_sample_method, accepted_length,
        acceptance_by_position``, and ``by_answer_position``: of the steps that begin at each
        stretch of an answer, ``begin`` (a token's number), ``steps`` and ``accepted_length``.
    """
    assert target.teacher is not None
    ids = drafter.target_ids(head)
    ways = [(sampling, method) for sampling in samplings for method in METHODS]
    # By stretch of an answer: steps, then accepted drafts at each position.
    counts = {way: np.zeros((len(_STRETCHES), 1 + k)) for way in ways}
    for sample in samples:
        rows = torch.arange(sample.prompt_len - 1, len(sample.ids) - 2)
        if not len(rows) or not sample.loss_mask.any():
            continue
        # Of every answer token but the first, the states that it was predicted by.
        logits = target.teacher.logits(sample.last[sample.prompt_len : len(sample.ids) - 1])
        answer = sample.ids[sample.prompt_len + 1 :].long()
        rates = {way: np.zeros((len(rows), k)) for way in ways}
        p_of = {sampling: sampling.probabilities(logits) for sampling in samplings}
        for j, drafts in enumerate(
            drafter.true_path_logits(head, target, sample.aux, sample.ids, k, rows)
        ):
            positions = len(rows) - j  # beyond the end of the answer nothing is known
            if positions < 1:
                break
            for sampling, p in p_of.items():
                truth = answer[j:] if sampling == drawn_with else None
                each = kept(p[j:], drafts[:positions].float(), ids, sampling.temperature, truth)
                for method, chances in each.items():
                    rates[sampling, method][:positions, j] = chances.numpy(force=True)
        for way in ways:
            steps, accepted = expected_walk(rates[way])
            stretch = np.searchsorted(_STRETCHES, np.arange(len(rows)), side="right") - 1
            np.add.at(counts[way], stretch, np.column_stack([steps, accepted]))
    return [
        {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "draft_sample_method": method,
            "accepted_length": float(1 + every[1:].sum() / every[0]),
            "acceptance_by_position": (every[1:] / every[0]).tolist(),
            "by_answer_position": [
                {
                    "begin": begin,
                    "steps": float(row[0]),
                    "accepted_length": float(1 + row[1:].sum() / row[0]),
                }
                for begin, row in zip(_STRETCHES, counts[sampling, method])
                if row[0]
            ],
        }
        for sampling, method in ways
        for every in [counts[sampling, method].sum(axis=0)]
        if every[0]
    ]
