"""What only a GPU can show: the way of the states through stages, streams and pinned memory."""

import pytest
import torch

from drafthead.capture.tap import Tap
from drafthead.states.format import encode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("encoding", ["bf16", "fp8", "fp8-aux"])
def test_rows_reach_the_host_although_each_step_overwrites_the_last(encoding):
    device = torch.device("cuda")
    tap = Tap(3, 256, torch.bfloat16, encoding, device, max_rows=64)
    g = torch.Generator().manual_seed(0)
    outputs = [torch.zeros(64, 256, device=device, dtype=torch.bfloat16) for _ in range(3)]
    for unit in range(3):
        expected = torch.randn(40, 64, 3, 256, generator=g).bfloat16()
        for step in range(40):
            n = int(torch.randint(1, 65, (1,), generator=g))
            for layer, output in enumerate(outputs):  # as a replayed CUDA graph does
                output[:n].copy_(expected[step, :n, layer], non_blocking=False)
            tap.record(outputs, [(unit * 100 + step, 0, n)])
            expected[step, n:] = 0
        captured = tap.take()
        captured.wait()
        for step in range(40):
            n = int((expected[step].float().abs().sum((1, 2)) > 0).sum())
            rows = captured.resolve({unit * 100 + step: [0] * (n + 1)})
            found = captured.take(rows[unit * 100 + step])
            wanted = encode(expected[step, :n], encoding)
            for a, b in zip(found, wanted.values(), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
