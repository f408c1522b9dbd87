"""Padded rows against the rows themselves; that CUDA graphs repeat them is shown on a GPU."""

import pytest
import torch

from drafthead.train.batches import assemble, draft_ids
from drafthead.train.graphed import COUNTED, GraphedStep, Places
from drafthead.train.graphs import Graphs
from drafthead.train.losses import Teacher
from drafthead.train.step import Objective, TrainStep
from tests.train.test_ttt import problem

STEPS = 3


def rows():
    """Rows of different numbers of documents and tokens, one as full as a row can be."""
    head, embedding, samples, _ = problem()
    to_draft = draft_ids(head.target_ids(), head.config.vocab_size)
    tokens = sum(len(s.ids) for s in samples) - 2 * len(samples)
    choices = [samples, samples[:1], samples[1:], samples[::-1], samples[2:]]
    return head, tokens, [assemble(c, STEPS, to_draft, tokens, embedding) for c in choices]


def both(head, tokens, loss):
    """`backward` of rows as they are, and padded."""
    c = head.config
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(c.draft_vocab_size, c.target_hidden_size, generator=g).double()
    teacher = Teacher(torch.ones(c.target_hidden_size).double(), 1e-5, weights)
    step = TrainStep(head, teacher, Objective(loss, STEPS, 0.8, chunk_rows=10))
    return step.backward, GraphedStep(step, tokens, Graphs(torch.device("cpu"))).backward


@pytest.mark.parametrize("loss", ["kl", "ce+smoothl1", "acceptance"])
def test_padding_changes_no_gradient(loss):
    head, tokens, batches = rows()
    ways = both(head, tokens, loss)
    for batch in [*batches, *batches]:
        results = []
        for backward in ways:
            found, correct = backward(batch)
            results.append((found, correct, *(p.grad.clone() for p in head.parameters())))
            for p in head.parameters():
                p.grad = None
        for plain, padded in zip(*results):
            torch.testing.assert_close(padded, plain)


def test_gradients_add_up_until_they_are_taken():
    head, tokens, batches = rows()
    sums = []
    for backward in both(head, tokens, "kl"):
        for batch in batches[:2]:
            backward(batch)
        sums.append([p.grad.clone() for p in head.parameters()])
        for p in head.parameters():
            p.grad = None
    for plain, padded in zip(*sums):
        torch.testing.assert_close(padded, plain)


def test_one_size_has_one_place():
    _, tokens, batches = rows()
    places = Places(tokens)
    seen: dict[tuple[int, ...], list[int]] = {}
    for batch in [*batches, *batches]:
        sizes, padded = places.put(batch)
        assert len(padded.live) == sizes[0] >= len(batch.live)
        assert len(padded.labels) == sizes[1] >= len(batch.labels)
        assert padded.has_row.sum() == batch.rows
        tensors = (getattr(padded, name) for name in COUNTED)
        addresses = [x.data_ptr() for x in tensors]
        assert seen.setdefault(sizes, addresses) == addresses
    assert len(seen) > 1
