"""Records begin with a flat summary of the figures that they stand for."""

import json
from pathlib import Path

import pytest

from benchmarks.lib.record import begin, flat, save

RECORDS = sorted(Path("benchmarks/results").glob("*.json"))


def test_a_summary_has_the_numbers_by_their_joined_names(tmp_path):
    figures = {"k3-stock": {"speedup": 1.2, "ci95": [1.1, 1.3], "words": "faster"}, "identical": 48}
    assert flat(figures) == {
        "k3_stock_speedup": 1.2,
        "k3_stock_ci95_low": 1.1,
        "k3_stock_ci95_high": 1.3,
        "identical": 48,
    }
    save(tmp_path / "grid.json", begin("grid"), figures)
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["summary"] == flat(figures)
    assert record["benchmark"] == "grid"
    assert record["command"].startswith("python")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_kept_record_is_small_and_has_a_flat_summary(path):
    assert path.stat().st_size < 2_000_000
    summary = json.loads(path.read_text())["summary"]
    assert summary
    assert all(isinstance(value, int | float) for value in summary.values())
