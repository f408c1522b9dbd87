import numpy as np
import pytest
import torch

from drafthead.capture import assemble
from drafthead.capture.assemble import SequenceAssembler
from drafthead.capture.recorder import StateRecorder
from drafthead.states.format import encode
from tests.capture.fake_writer import FakeWriter

L, H = 3, 4


def true_states(ids):
    """[T, L, H]: a stand-in for a model: a state follows from the tokens up to it."""
    running = torch.cumsum(torch.tensor(ids, dtype=torch.float64), 0)
    return torch.stack([torch.full((L, H), float(v)) for v in running])


def recorder_and_writer(encoding="fp32"):
    writer = FakeWriter(16, L, H, encoding)
    return StateRecorder(torch.float32, torch.device("cpu"), writer), writer


def run(steps, ids):
    """Feed a recorder steps of (key, start, count); returns what it captured."""
    recorder, writer = recorder_and_writer()
    for step in steps:
        rows = torch.cat(
            [
                torch.zeros(n, L, H) if k is None else true_states(ids[k])[a : a + n]
                for k, a, n in step
            ]
        )
        padded = torch.cat([rows, torch.full((2, L, H), float("nan"))])
        recorder.record(list(padded.unbind(1)), step)
    recorder.end_unit()
    return writer.take()


def check(captured, ids):
    rows = captured.resolve(ids)
    for key, tokens in ids.items():
        assert torch.equal(*captured.take(rows[key]), true_states(tokens)[:-1].float())


@pytest.mark.parametrize("segment", [8192, 3])
def test_rows_of_mixed_steps_find_their_sequences(monkeypatch, segment):
    monkeypatch.setattr(assemble, "SEGMENT_ROWS", segment)
    ids = {7: [1, 2, 3, 4, 5], 9: [6, 7, 8]}
    steps = [
        [(9, 0, 1), (7, 0, 2)],  # a chunked prefill beside a whole one
        [(7, 2, 1), (None, 0, 4), (9, 1, 1)],  # a sequence nobody wants between them
        [(7, 3, 1), (9, 2, 1)],  # what comes after the last input is left out
    ]
    check(run(steps, ids), ids)


def test_a_preempted_sequence_counts_as_it_was_computed_last():
    captured = SequenceAssembler()
    captured.append(torch.tensor([1.0, 2.0, 30.0, 40.0]).reshape(4, 1, 1))
    captured.note(np.array([[0, 0, 0, 2]]))
    captured.note(np.array([[0, 2, 0, 2]]))
    rows = captured.resolve({0: [5, 5, 5]})
    assert captured.take(rows[0])[0].flatten().tolist() == [30.0, 40.0]


def test_cached_prefixes_are_those_of_a_sequence_that_begins_alike():
    ids = {0: [1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 9, 9], 2: [1, 2, 8, 8], 3: [1, 2, 8, 8, 7, 7]}
    steps = [
        [(0, 0, 5)],
        [(1, 4, 1)],  # four tokens from the cache, computed for 0
        [(2, 2, 1)],
        [(3, 3, 2)],  # two computed for 0, one for 2
    ]
    check(run(steps, ids), ids)


def test_a_position_that_nobody_computed_has_no_row():
    captured = run([[(0, 2, 2)]], {0: [1, 2, 3, 4, 5]})
    assert captured.resolve({0: [1, 2, 3, 4, 5]})[0].tolist() == [-1, -1, 0, 1]
    assert captured.resolve({5: [1, 2]})[5].tolist() == [-1]


@pytest.mark.parametrize("encoding", ["fp8", "fp8-aux"])
def test_fp8_is_encoded_row_by_row(encoding):
    recorder, writer = recorder_and_writer(encoding)
    rows = torch.randn(5, L, H, generator=torch.Generator().manual_seed(0))
    recorder.record(list(rows.unbind(1)), [(3, 0, 5)])
    captured = writer.take()
    found = captured.take(captured.resolve({3: [0] * 6})[3])
    for tensor, expected in zip(found, encode(rows, encoding).values(), strict=True):
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_a_unit_starts_anew():
    recorder, writer = recorder_and_writer()
    for key, tokens in enumerate(([1, 2, 3], [9, 9, 9])):
        recorder.record(list(true_states(tokens)[:2].unbind(1)), [(key, 0, 2)])
        recorder.end_unit()
        captured = writer.take()
        check(captured, {key: tokens})
        assert captured.rows == 2
