"""Memory of large tensors is used again."""

import torch

from drafthead.states import buffer_pool


def test_memory_comes_back_with_the_last_view_of_it(monkeypatch):
    monkeypatch.setattr(buffer_pool, "_free", {})
    first = buffer_pool.empty((3, 5), torch.bfloat16)
    assert first.data_ptr() % 4096 == 0
    place, view = first.data_ptr(), first.view(torch.uint8)[1:].numpy().data
    del first
    # What `view` still holds is not given out again; this other tensor is free again at once.
    assert buffer_pool.empty((3, 5), torch.bfloat16).data_ptr() != place
    del view
    held = [buffer_pool.empty((n,), torch.float8_e4m3fn) for n in (4096, 1, 4097)]
    assert [place in (t.data_ptr() for t in held), len(buffer_pool._free[4096])] == [True, 0]
    assert len({t.data_ptr() for t in held}) == 3
    assert buffer_pool.empty((0, 4), torch.float32).shape == (0, 4)
