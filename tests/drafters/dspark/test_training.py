"""DSpark in the training loop: it learns a rule, resumes after a kill, and shares work."""

import pytest
import torch

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.errors import DraftheadError
from drafthead.train.loop import fit
from tests.train.test_loop import ALONE, curve, quiet, run, weights
from tests.train.toy import make_task, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "states"
    write_store(path)
    return path


@pytest.mark.parametrize("loss", ["kl", "ce+tv"])
def test_learns_a_rule(store, tmp_path, loss):
    task = make_task(store, "dspark", loss=loss, epochs=24, learning_rate=1e-2, anchors=0.5)
    summary = fit(task, tmp_path, ALONE, quiet())
    assert summary["accepted_length"] > 2.3
    assert curve(tmp_path)[-1] < 0.5 * curve(tmp_path)[0]
    assert drafter_of(tmp_path / "best") is DRAFTERS["dspark"]
    assert [h["k"] for h in summary["heldout"]] == [1, 2, 3, 4, 5]


def test_a_killed_run_goes_on_as_if_it_had_not_been(store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(store, whole, kind="dspark")
    run(store, killed, die_at=5, kind="dspark")
    run(store, killed, kind="dspark")
    assert weights(killed).keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name
    two = tmp_path / "two"
    run(store, two, processes=2, kind="dspark")
    assert curve(two) == pytest.approx(curve(whole), rel=1e-3)


def test_the_published_eagle3_loss_is_refused(store, tmp_path):
    with pytest.raises(DraftheadError) as error:
        fit(make_task(store, "dspark", loss="ce+smoothl1"), tmp_path, ALONE, quiet())
    assert error.value.field == "train.loss"
