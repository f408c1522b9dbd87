"""Packing against its plain twin, and that against the definition of every index."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.ops.vocabulary import draft_ids
from drafthead.states.format import Encoding, encode
from tests.train.plain_packing import plain_row
from tests.train.samples import sample

TO_DRAFT = draft_ids(torch.arange(0, 50, 2), 50)
EMBEDDING = torch.arange(200.0).view(50, 4)


@st.composite
def documents(draw):
    """A few short ones, of which any tokens are supervised, or none."""
    samples = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, 20))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        states = draw(st.sampled_from([length, length - 1]))
        samples.append(sample(length, 1, str(number), number, states, mask))
    return samples


@settings(max_examples=40)
@given(documents(), st.integers(1, 4), st.integers(6, 40))
def test_every_row_is_what_its_definition_says(samples, steps, tokens):
    batch = plain_row(samples, steps, TO_DRAFT, tokens, EMBEDDING)

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


@settings(max_examples=100)
@given(
    documents(),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(["fp32", "bf16", "fp8", "fp8-aux"]),
    st.integers(1, 3),
    st.sampled_from([None, torch.bfloat16]),
)
def test_a_row_is_its_plain_twin(samples, steps, tokens, encoding: Encoding, num_aux, dtype):
    """num_aux 3: the last layer is an auxiliary one, too."""
    stored = [replace(s, **encode(s.states, encoding), num_aux=num_aux) for s in samples]
    plain = plain_row(stored, steps, TO_DRAFT, tokens, EMBEDDING)
    row = pack_row(stored, steps, TO_DRAFT, tokens, EMBEDDING)
    if plain is None:
        assert row is None
        return
    if dtype is not None:
        plain = plain.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    assert_same(row.batch("cpu", dtype), plain)


def assert_same(a: Batch, b: Batch) -> None:
    """The same bits everywhere."""
    for field in fields(Batch):
        found, expected = getattr(a, field.name), getattr(b, field.name)
        if field.name == "documents":
            assert (found.q_lengths, found.k_lengths) == (expected.q_lengths, expected.k_lengths)
            for x, y in ((found.cu_q, expected.cu_q), (found.cu_k, expected.cu_k)):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
        elif isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        else:
            assert found == expected


def test_nothing_supervised_is_no_row():
    assert pack_row([sample(5, 5)], 2, TO_DRAFT, 10, EMBEDDING) is None
    assert plain_row([sample(5, 5)], 2, TO_DRAFT, 10, EMBEDDING) is None


def test_rows_do_not_share_memory_that_is_in_use():
    rows = [pack_row([sample(9, 3, seed=n)], 2, TO_DRAFT, 10, EMBEDDING) for n in range(3)]
    kept = [row.batch("cpu").aux for row in rows]
    before = [aux.clone() for aux in kept]
    del rows
    for n in range(3, 6):
        pack_row([sample(9, 3, seed=n)], 2, TO_DRAFT, 10, EMBEDDING)
    assert all(torch.equal(a, b) for a, b in zip(kept, before))


def test_a_token_outside_the_vocabulary_is_an_error():
    broken = sample(9, 3)
    broken.ids[6] = 50
    with pytest.raises(IndexError, match="50"):
        pack_row([broken], 2, TO_DRAFT, 10, EMBEDDING)
