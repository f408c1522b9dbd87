"""How a process finds the others that train with it."""

import torch
import torch.distributed as dist

from drafthead.train.parallel import World
from tests.refused import refused


def test_joining_ends_when_all_have_joined(monkeypatch):
    """The first process sweeps the folder before it joins; no other may look there earlier."""
    calls = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: calls.append("joined"))
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("waited"))
    world = World.join()
    assert (world.rank, world.size, world.device.type) == (1, 2, "cpu")
    assert calls == ["joined", "waited"]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert World.of_environment().device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with refused("process 2", 2, "--nproc-per-node"):
        World.of_environment()


def test_half_of_what_torchrun_says(monkeypatch):
    """As a shell or a scheduler may leave it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("WORLD_SIZE", 2, "RANK", "torchrun"):
        World.join()
    monkeypatch.setenv("RANK", "0")
    with refused("WORLD_SIZE", "MASTER_ADDR"):
        World.join()
