"""Padded rows against the rows themselves; that CUDA graphs repeat them is shown on a GPU."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from drafthead.drafters.eagle3 import graphed
from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.graphed import COUNTED, GraphedStep, Places, Sizes
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.drafters.eagle3.step import Objective, TrainStep
from drafthead.ops.attention import Documents
from drafthead.ops.graphs import Graphs
from drafthead.ops.losses import Teacher
from drafthead.ops.vocabulary import draft_ids
from tests.train.test_ttt import problem

STEPS = 3


def rows(last: int = 100):
    """Rows of different numbers of documents and tokens, one as full as a row can be; of each
    document the `last` tokens are supervised."""
    head, embedding, samples, _ = problem()
    later = lambda s: s.loss_mask & (torch.arange(len(s.ids)) >= len(s.ids) - last)
    samples = [replace(s, loss_mask=later(s)) for s in samples]
    to_draft = draft_ids(head.target_ids(), head.config.vocab_size)
    tokens = sum(len(s.ids) for s in samples) - 2 * len(samples)
    choices = [samples, samples[:1], samples[1:], samples[::-1], samples[2:]]
    packed = [pack_row(c, STEPS, to_draft, tokens, embedding) for c in choices]
    return head, tokens, [row.batch("cpu") for row in packed]


def both(head, tokens, loss, compiled=False):
    """`backward` of rows as they are, and padded."""
    c = head.config
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(c.draft_vocab_size, c.target_hidden_size, generator=g).double()
    teacher = Teacher(torch.ones(c.target_hidden_size).double(), 1e-5, weights)
    step = TrainStep(head, teacher, Objective(loss, STEPS, 0.8, chunk_rows=10), compiled)
    return step.backward, GraphedStep(step, tokens, Graphs(torch.device("cpu"))).backward


@pytest.mark.parametrize("capture", [0, math.inf], ids=["own sizes", "a full row's size"])
@pytest.mark.parametrize("loss", ["kl", "ce+smoothl1", "acceptance"])
def test_padding_changes_no_gradient(loss, capture, monkeypatch):
    monkeypatch.setattr(graphed, "CAPTURE", capture)
    head, tokens, batches = rows()
    ways = both(head, tokens, loss)
    for batch in [*batches, *batches]:
        results = []
        for backward in ways:
            results.append((*backward(batch), *(p.grad.clone() for p in head.parameters())))
            for p in head.parameters():
                p.grad = None
        for plain, padded in zip(*results):
            torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("padded", [False, True])
def test_pieces_are_compiled_once_whatever_the_rows(padded, monkeypatch):
    """Compiling takes seconds, in which training would stand still."""
    monkeypatch.setattr(graphed, "CAPTURE", 0)
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module

    compiler = functools.partial(torch.compile, backend=aot_autograd(fw_compiler=backend))
    monkeypatch.setattr("drafthead.drafters.eagle3.ttt.torch.compile", compiler)
    torch._dynamo.reset()
    head, tokens, batches = rows(last=3)
    sizes = {(len(b.live), len(b.labels), b.tokens) for b in batches}
    assert len(sizes) > 2
    backward = both(head, tokens, "kl", compiled=True)[padded]
    for batch in batches:
        backward(batch)
    assert len(compiled) == 6  # begin, turn and finish, there and back


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


def test_one_size_has_one_place(monkeypatch):
    monkeypatch.setattr(graphed, "CAPTURE", 0)
    _, tokens, batches = rows()
    sizes = Sizes(tokens)
    places = Places(sizes.full)
    made: dict[tuple[int, ...], Batch] = {}
    for batch in [*batches, *batches]:
        size = sizes.choose(batch)
        place = made[size] if size in made else made.setdefault(size, places.make(batch, size))
        padded = places.put(batch, place)
        assert len(padded.live) == size[0] >= len(batch.live)
        assert len(padded.labels) == size[1] >= len(batch.labels)
        assert padded.has_row.sum() == batch.rows
        for counted, x in [(getattr(place, n), getattr(padded, n)) for n in COUNTED]:
            assert counted.data_ptr() == x.data_ptr()
            assert x.is_contiguous()
        docs = padded.documents
        for lengths, cumulative in ((docs.q_lengths, docs.cu_q), (docs.k_lengths, docs.cu_k)):
            filled = [*lengths, *[0] * (size[2] - len(lengths))]
            assert cumulative.tolist() == [0, *itertools.accumulate(filled)]
        assert all(q <= k for q, k in zip(docs.q_lengths, docs.k_lengths))
        assert (docs.cu_q[-1], docs.cu_k[-1]) == (size[0], len(padded.positions))
    assert len(made) > 1


def row(live: int, supervised: int, documents: int) -> Batch:
    """Of these sizes, and nothing else."""
    empty = torch.empty(0)
    lengths = (1,) * documents
    return Batch(
        names=(),
        embeds=empty,
        positions=empty,
        aux=empty,
        live=torch.empty(live),
        live_of=empty,
        documents=Documents(lengths, lengths, empty, empty),
        last=empty,
        labels=torch.empty(supervised),
        student=empty,
        student_of=empty,
        has_row=empty,
        rows=0,
    )


def test_a_size_is_added_once_it_would_have_paid_for_its_graph():
    sizes = Sizes(160)
    half, full = (80, 80, 32), (160, 160, 32)
    waits = [sizes.choose(row(75, 80, 9)) for _ in range(2 * graphed.CAPTURE)]
    assert waits[:-1] == [full] * (2 * graphed.CAPTURE - 1)  # each loses half a row
    assert waits[-1] == half
    assert sizes.choose(row(1, 1, 30)) == half  # the nearest that holds it
    assert sizes.choose(row(81, 1, 1)) == full
    assert sizes.choose(row(80, 80, 31)) == (160, 160, 64)  # which no graph yet has room for
    assert sizes.chosen == [full, half, (160, 160, 64)]


def test_few_sizes_lose_little():
    """Rows as a small model's: some sizes often, many seldom."""
    g = np.random.default_rng(0)
    live = np.clip(g.normal(1100, 120, 4000), 1, 2048).astype(int)
    sizes, spent = Sizes(2048), 0.0
    for n in live:
        size = sizes.choose(row(int(n), int(0.95 * n), 9))
        spent += (size[0] + size[1]) / 4096
    exact = float((1.95 * live / 4096).sum())
    assert len(sizes.chosen) <= 6
    assert spent + graphed.CAPTURE * len(sizes.chosen) < 1.3 * exact
