import os

import numpy as np
import pytest
import torch

from drafthead.capture.shared_memory import RingBuffer, SharedRows
from drafthead.states.format import encode


def test_ring_never_hands_out_what_is_in_use():
    ring, rng, held, waits = RingBuffer(64), np.random.default_rng(0), [], 0
    for _ in range(5000):
        n = int(rng.integers(1, 33))  # up to half
        while held and (len(held) > 3 or rng.random() < 0.3):
            held.pop(0)
            ring.give()
        while (run := ring.take(n)) is None:
            waits += 1
            held.pop(0)
            ring.give()
        start, stop = run
        assert stop - start == n
        assert 0 <= start < stop <= 64
        assert all(stop <= a or b <= start for a, b in held)
        held.append((start, stop))
    assert waits > 100


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "fp8", "fp8-aux"])
def test_two_mappings_are_of_the_same_rows_and_tensors_do_not_overlap(encoding):
    shape = (5, 3, 7, encoding)
    fd = SharedRows.create(*shape)
    one, other = SharedRows(fd, *shape), SharedRows(fd, *shape)
    os.close(fd)
    encoded = encode(torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)), encoding)
    for place, tensor in zip(one.tensors, encoded.values(), strict=True):
        place.copy_(tensor)
    for found, tensor in zip(other.tensors, encoded.values(), strict=True):
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
