"""Shards pass by the page cache, and their memory is used again."""

import errno
import hashlib
import os

import pytest
import torch

from drafthead.states import buffer_pool, direct_io
from drafthead.states.direct_io import write_direct

SIZES = [0, 1, 4095, 4096, 3 * 4096, 3 * 4096 + 17, 40_000]


def refuses(real):
    """As a file system that takes O_DIRECT and then wants another alignment."""

    def write(fd, view):
        if direct_io._set_direct(fd, False):
            direct_io._set_direct(fd, True)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, view)

    return write


def in_bits(real):
    """As a disk that takes a part of what it is given, of odd length."""
    return lambda fd, view: real(fd, view[: 4096 if len(view) > 8192 else max(1, len(view) // 3)])


@pytest.mark.parametrize("disk", [None, refuses, in_bits])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_arrive_as_they_are(tmp_path, monkeypatch, size, disk):
    monkeypatch.setattr(direct_io, "STAGED", 2 * 4096)
    if disk:
        monkeypatch.setattr(os, "write", disk(os.write))
    data = torch.randint(
        256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pieces = data.split([size // 3, 0, size - size // 3])
    found = write_direct(tmp_path / "file", pieces)
    monkeypatch.undo()
    expected = data.numpy().tobytes()
    assert (tmp_path / "file").read_bytes() == expected
    assert found == (size, hashlib.sha256(expected).hexdigest())


def test_what_the_disk_says_is_passed_on(tmp_path, monkeypatch):
    def broken(_fd, _view):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_direct(tmp_path / "file", [torch.ones(9, dtype=torch.uint8)])


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
