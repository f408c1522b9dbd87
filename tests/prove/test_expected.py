"""Expected acceptance of sampled requests against the walk, and against drawing itself."""

import numpy as np
import pytest
import torch

from drafthead.drafters.base import TargetSide
from drafthead.drafters.dspark.drafter import DSpark
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.ops.losses import Teacher
from drafthead.prove.expected import Sampling, expected_acceptance, expected_walk, kept
from drafthead.train.evaluate import evaluate, walk
from tests.drafters.dspark.heads import small_head as dspark_head
from tests.heads import sample, small_head, states


def test_a_walk_without_chance_is_the_walk():
    rng = np.random.default_rng(0)
    answer, chains = rng.integers(0, 2, 40), rng.integers(0, 2, (39, 4))
    truth = np.pad(answer, (0, 4), constant_values=-1)
    rates = np.array([truth[row + 1 : row + 5] == chains[row] for row in range(39)], dtype=float)
    steps, accepted = expected_walk(rates)
    walked = walk(chains, answer, np.ones(2, dtype=bool))
    assert steps.sum() == walked.drafts
    assert accepted.sum(axis=0).tolist() == walked.accepted
    assert 0 < walked.accepted[2] < walked.drafts


def test_a_walk_by_chance_is_the_mean_of_walks():
    rng = np.random.default_rng(1)
    rates = rng.random((6, 3))
    rates[5, 1:] = rates[4, 2:] = 0  # beyond the end
    steps, accepted = expected_walk(rates)
    seen, times = np.zeros(4), 20000
    for _ in range(times):
        row = 0
        while row < 6:
            n = np.argmin(np.append(rng.random(3) < rates[row], False))
            seen += [1, *(np.arange(3) < n)]
            row += n + 1
    assert seen / times == pytest.approx([steps.sum(), *accepted.sum(axis=0)], abs=0.05)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(0.7, 1, 3)])
def test_chances_are_those_of_speculative_sampling(sampling):
    """Drawn as the paper's algorithm 1 does, drafts are kept as often as they are said to be."""
    generator = torch.Generator().manual_seed(2)
    p = sampling.probabilities(torch.randn(1, 9, generator=generator))
    logits, ids = torch.randn(1, 5, generator=generator), torch.tensor([1, 2, 4, 6, 8])
    q = torch.zeros(9)
    q[ids] = (logits[0] / sampling.temperature).softmax(0)
    drafts = q.multinomial(40000, replacement=True, generator=generator)
    chance = (p[0] / q).clamp(max=1.0)[drafts]
    seen = (torch.rand(len(drafts), generator=generator) < chance).float().mean()
    expected = kept(p, logits, ids, sampling.temperature, None)
    assert expected["probabilistic"].item() == pytest.approx(seen.item(), abs=0.01)
    assert expected["greedy"].item() == p[0, ids[logits.argmax()]].item()
    # Over the tokens that the target draws the sharper form has the same mean.
    tokens = p[0].multinomial(40000, replacement=True, generator=generator)
    sharper = kept(p.expand(40000, -1), logits.expand(40000, -1), ids, sampling.temperature, tokens)
    for method, rates in sharper.items():
        assert rates.mean().item() == pytest.approx(expected[method].item(), abs=0.01)


def test_top_p_and_top_k_cut_the_target_only():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert Sampling(1.0, top_p=0.6).probabilities(logits).tolist() == [[0.625, 0.375, 0.0, 0.0]]
    assert Sampling(1.0, top_k=1).probabilities(logits).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert Sampling(0.0).probabilities(logits).tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("by_tokens", [True, False])
def test_greedy_requests_are_the_walk_whatever_draws_the_drafts(by_tokens):
    head = small_head()
    embedding, aux, ids = states(head, 30)
    at = Sampling(0.0)
    # The head's own first chain is the text's next tokens: some drafts are right.
    ids[10:13] = Eagle3().draft(head, TargetSide(embedding), aux, ids, 3, torch.tensor([8]))[0]
    # The states of a target that writes this text greedily.
    one, codes = sample(ids, 8, aux), torch.nn.functional.normalize(embedding)
    one.states[:-1, -1] = codes[ids[1:].long()]
    side = TargetSide(embedding, teacher=Teacher(torch.ones(32), 1e-6, codes))
    drawn_with = at if by_tokens else None
    found = expected_acceptance(Eagle3(), head, side, [one], 3, [at], drawn_with)
    walked = evaluate(Eagle3(), head, side, [one], 3)[0]
    assert sum(walked.accepted) > 0
    assert [f["draft_sample_method"] for f in found] == ["greedy", "probabilistic"]
    for one_way in found:
        assert one_way["acceptance_by_position"] == pytest.approx(walked.by_position)
        (stretch,) = one_way["by_answer_position"]
        assert stretch["accepted_length"] == pytest.approx(walked.accepted_length)


def test_acceptance_is_told_apart_by_the_position_in_an_answer():
    """A head that is right for the first 128 tokens and never after."""
    head = small_head(max_position_embeddings=512)
    embedding, aux, ids = states(head, 300)
    side = TargetSide(embedding, teacher=Teacher(torch.ones(32), 1e-6, embedding))
    for row in range(7, 7 + 130):
        ids[row + 2] = Eagle3().draft(head, side, aux, ids, 1, torch.tensor([row]))[0, 0]
    at = Sampling(0.0)
    found = expected_acceptance(Eagle3(), head, side, [sample(ids, 8, aux)], 1, [at], at)[0]
    first, second, *_ = found["by_answer_position"]
    assert (first["begin"], first["accepted_length"], second["begin"]) == (0, 2.0, 128)
    assert second["accepted_length"] < 1.2


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_told_true_tokens_a_head_has_the_logits_of_its_own_drafts(kind):
    """Where a chain was right so far, the likeliest token is the next of the chain."""
    drafter, head = (Eagle3(), small_head()) if kind == "eagle3" else (DSpark(), dspark_head())
    embedding, aux, ids = states(head, 20)
    side = TargetSide(embedding)
    rows = torch.tensor([5])
    chain = drafter.draft(head, side, aux, ids, 4, rows)[0]
    ids[7:11] = chain
    told = [logits[0] for logits in drafter.true_path_logits(head, side, aux, ids, 4, rows)]
    assert [head.target_ids()[x.argmax()].item() for x in told] == chain.tolist()
