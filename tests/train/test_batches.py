"""Packing: nothing lost, nothing padded, and every index where its definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafthead.train.batches import OPEN_ROWS, assemble, draft_ids, pack, prefetch
from tests.train.samples import sample

TO_DRAFT = draft_ids(torch.arange(0, 50, 2), 50)
EMBEDDING = torch.arange(200.0).view(50, 4)


@given(st.lists(st.integers(-2, 130), max_size=60), st.integers(1, 100))
def test_pack_puts_every_document_into_one_row_that_holds_it(lengths, tokens):
    rows = pack(np.array(lengths, dtype=np.int64), range(len(lengths)), tokens)
    assert sorted(i for row in rows for i in row) == [
        i for i, length in enumerate(lengths) if length >= 1
    ]
    for row in rows:
        assert sum(min(lengths[i], tokens) for i in row) <= tokens


def test_pack_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 400, 2000)
    rows = pack(lengths, range(2000), 4096)
    full = [sum(lengths[i] for i in row) / 4096 for row in rows[:-OPEN_ROWS]]
    assert np.mean(full) > 0.97


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_row_is_what_its_definition_says(data):
    steps = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(6, 40))
    samples = []
    for number in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(2, 20))
        mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        states = data.draw(st.sampled_from([length, length - 1]))
        samples.append(sample(length, 1, str(number), number, states, mask))
    batch = assemble(samples, steps, TO_DRAFT, tokens, EMBEDDING)

    expected = []  # (document, token index) of the supervised tokens
    for d, s in enumerate(samples):
        for p in range(2, min(len(s.ids) - 1, len(s.last), tokens + 1) + 1):
            if s.loss_mask[p]:
                expected.append((d, p))
    if batch is None:
        assert not expected
        return
    used = [d for d in range(len(samples)) if any(e[0] == d for e in expected)]
    assert batch.names == tuple(str(d) for d in used)
    document = torch.repeat_interleave(torch.tensor(used), torch.tensor(batch.documents.k_lengths))
    for at, (d, i) in enumerate(zip(document.tolist(), batch.positions.tolist())):
        assert torch.equal(batch.embeds[at], EMBEDDING[int(samples[d].ids[i + 1])])
        assert torch.equal(batch.aux[at], samples[d].aux[i])
    assert torch.equal(batch.live_of[batch.live], torch.arange(len(batch.live)))
    assert (batch.live_of >= 0).sum() == len(batch.live)
    for (rows, keys), length in zip(batch.documents.spans(), batch.documents.k_lengths):
        width = rows.stop - rows.start
        assert batch.live[rows].tolist() == list(range(keys.stop - width, keys.stop))
        assert keys.stop - keys.start == length
    assert len(expected) == len(batch.labels)
    for m, (d, p) in enumerate(expected):
        assert torch.equal(batch.last[m], samples[d].last[p - 1])
        assert batch.labels[m] == TO_DRAFT[samples[d].ids[p].long()]
        for t in range(steps):
            assert bool(batch.has_row[t, m]) == (p - 2 - t >= 0)
            if batch.has_row[t, m]:
                row = batch.student[t, m]
                at = batch.live[row]
                assert (document[at], batch.positions[at]) == (d, p - 2 - t)
                assert batch.student_of[t, row] == m
    for t in range(steps):
        assert (batch.student_of[t] >= 0).sum() == batch.has_row[t].sum()


def test_nothing_supervised_is_no_batch():
    assert assemble([sample(5, 5)], 2, TO_DRAFT, 10, EMBEDDING) is None


def test_draft_ids_maps_back():
    assert TO_DRAFT[[0, 1, 2, 48]].tolist() == [0, -1, 1, 24]


def test_prefetch_gives_every_batch_in_order_and_hands_on_errors():
    batches = [assemble([sample(6 + i, 3, str(i))], 1, TO_DRAFT, 99, EMBEDDING) for i in range(8)]
    device = torch.device("cpu")
    found = list(prefetch(lambda n: batches[n], range(8), device, depth=2))
    assert [b.names for b in found] == [b.names for b in batches]

    def broken(number):
        if number == 2:
            raise ValueError("number two")
        return batches[number]

    with pytest.raises(ValueError, match="number two"):
        list(prefetch(broken, range(8), device))


def test_prefetch_ends_when_its_consumer_does():
    batch = assemble([sample(6, 3)], 1, TO_DRAFT, 99, EMBEDDING)
    stream = prefetch(lambda n: batch, range(10**9), torch.device("cpu"))
    next(stream)
    stream.close()  # joins the thread, or hangs here
