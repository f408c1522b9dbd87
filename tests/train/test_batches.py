"""Rows: nothing lost, nothing padded; batches in order, made ahead."""

from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.ops.vocabulary import draft_ids
from drafthead.train.batches import OPEN_ROWS, made_ahead, pack, prefetch
from tests.train.samples import sample

TO_DRAFT = draft_ids(torch.arange(0, 50, 2), 50)


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


def test_draft_ids_maps_back():
    assert TO_DRAFT[[0, 1, 2, 48]].tolist() == [0, -1, 1, 24]


def batch(length: int, name: str = "a") -> Batch:
    row = pack_row([sample(length, 3, name)], 1, TO_DRAFT, 99, torch.zeros(50, 4))
    return row.batch("cpu")


def test_rows_made_ahead_come_in_order_and_hand_on_errors():
    batches = [batch(6 + i, str(i)) for i in range(8)]
    found = list(made_ahead(lambda n: batches[n], range(8), None, depth=2))
    assert [b.names for b in found] == [b.names for b in batches]

    def broken(number):
        if number == 2:
            raise ValueError("number two")
        return batches[number]

    with pytest.raises(ValueError, match="number two"):
        list(made_ahead(broken, range(8), None))


@pytest.mark.parametrize(("size", "ahead"), [(1 << 20, 16), (16 << 20, 8), (128 << 20, 3)])
def test_small_rows_are_made_further_ahead(size, ahead, monkeypatch):
    monkeypatch.setattr(Batch, "bytes", size)
    monkeypatch.setattr("drafthead.train.batches.ThreadPoolExecutor", _AtOnce)
    made = []
    stream = made_ahead(lambda n: made.append(n) or batch(6), range(99), None)
    for _ in range(5):
        next(stream)
    assert made == list(range(5 + ahead))
    stream.close()


class _AtOnce:
    """Does what it is given when it is given it."""

    def __init__(self, *_, **__):
        pass

    def submit(self, call, *args):
        future = Future()
        future.set_result(call(*args))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_making_ahead_ends_when_its_consumer_does():
    stream = made_ahead(lambda n: batch(6), range(10**9), None)
    next(stream)
    stream.close()  # joins the thread, or hangs here


def test_on_a_cpu_no_row_is_made_before_its_turn():
    made = []
    stream = prefetch(lambda n: made.append(n) or batch(6), range(9), torch.device("cpu"))
    next(stream)
    assert made == [0]
    assert len(list(stream)) == 8
