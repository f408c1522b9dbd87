"""A record of the grid is fitted anew from what it kept."""

import grid
import pytest

from drafthead.prove.costmodel import analyse, median_error
from tests.prove import made_run


def test_a_record_says_today_what_was_said_of_it():
    cells = [made_run.cell(k, c) for c in (1, 4) for k in (1, 3, 5)]
    wanted = median_error(analyse(cells, {}))
    sampled = [made_run.cell(3, 4, gain=2, temperature=0.7)]
    old = [{name: value for name, value in cell.items() if name != "pairs"} for cell in cells]
    record = {"cases": {"one": {"cells": cells + sampled}, "without pairs": {"cells": old}}}
    for kept, name in ((record, "one"), ({"grid": cells + sampled}, "bench")):
        ((found, judged),) = grid.refit(kept).items()
        assert found == name
        error = judged["cost_model_error"]["decoding"]["median_error"]
        assert error == pytest.approx(wanted, rel=1e-3)


def test_another_rule_is_applied_to_what_was_kept(monkeypatch):
    cells = [made_run.cell(k, 16) for k in (1, 3, 5)]
    (before,) = grid.refit({"grid": cells})["bench"]["cost_model"]
    monkeypatch.setattr(
        "drafthead.prove.pairing.waiting",
        lambda steps: {"requests": 1.0, "square": 1.0, "product": 1e-4},
    )
    (after,) = grid.refit({"grid": cells})["bench"]["cost_model"]
    assert after["per_waiting_s"] == pytest.approx(1e-4)
    assert before["per_waiting_s"] != pytest.approx(1e-4)
