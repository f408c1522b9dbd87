"""How long training stood still for want of data."""

import pytest
import torch

from drafthead.train import meter
from drafthead.train.meter import Meter
from drafthead.train.parallel import World


def test_waiting_is_its_share_of_the_time_since_the_last_look(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    counted = Meter(World(0, 1, torch.device("cpu")), steps=2, rate=1e12)

    def step(waits: float, works: float) -> None:
        with counted.waiting():
            now[0] += waits
        now[0] += works

    step(1.0, 2.0)
    step(0.5, 6.5)
    assert counted.read()[0]["waiting"] == pytest.approx(0.15)
    step(0.0, 4.0)
    assert counted.read()[0]["waiting"] == 0
    step(3.0, 0.0)
    now[0] += 50.0  # an evaluation
    counted.leave_out(50.0)
    step(0.0, 1.0)
    assert counted.read()[0]["waiting"] == pytest.approx(0.75)
    assert counted.waited == pytest.approx(4.5)
