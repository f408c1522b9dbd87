"""How a trace becomes milliseconds a step."""

import json

import pytest

from benchmarks.lib.step_probe import busy, summarize
from benchmarks.serve.step_cost import report, spread


def _event(name: str, category: str, start: float, length: float) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length}


def test_trace_is_summed_over_the_steps_between_the_edges(tmp_path):
    events = []
    for step in range(20):
        at = 1000.0 * step
        events += [
            _event("step", "user_annotation", at, 900),
            _event("void marlin_moe_wna16::Marlin<1>", "kernel", at + 100, 200),
            _event("nvjet_sm90_tst", "kernel", at + 250, 100),  # overlaps by 50
            _event("_rejection_kernel", "kernel", at + 380, 20),  # after a gap of 30
            _event("Memcpy HtoD", "gpu_memcpy", at + 402, 8),
            _event("cudaGraphLaunch", "cuda_runtime", at + 10, 40),
            _event("aten::copy_", "cpu_op", at + 60, 5),
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = summarize(path, skip=6)
    assert found["steps"] == 11
    assert found["ms_per_step"] == 1.0
    assert found["device_busy_ms_per_step"] == pytest.approx(0.278)
    assert found["classes"] == {
        "experts and quantized matmuls": {"per_step": 1.0, "us_per_step": 200.0},
        "dense matmuls": {"per_step": 1.0, "us_per_step": 100.0},
        "sampling and argmax": {"per_step": 1.0, "us_per_step": 20.0},
        "copies and fills": {"per_step": 1.0, "us_per_step": 8.0},
    }
    assert found["calls"] == {"cudaGraphLaunch": {"per_step": 1.0, "us_per_step": 40.0}}


def test_too_short_a_trace_is_said_to_be_one(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [_event("step", "user_annotation", 0, 1)]}))
    assert summarize(path) == {"error": "only 1 steps in the trace"}


def test_busy_time_counts_overlaps_once():
    kernels = [
        _event("a", "kernel", 0, 10),
        _event("b", "kernel", 2, 3),
        _event("c", "kernel", 9, 6),
    ]
    assert busy(kernels) == 15


def test_spread():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "middle_half": [2.0, 4.0]}


def test_steps_are_held_against_those_of_their_round():
    def rounds(*ms):
        return [
            dict.fromkeys(("mean_ms", "median_ms", "tokens_per_s", "tokens_a_step"), m) for m in ms
        ]

    timings = {"plain": rounds(1, 2, 4), "k3": rounds(2, 4, 8), "k3-stock": rounds(3, 6, 12)}
    timings |= {"k5": rounds(5, 5, 5), "k5-stock": []}
    ks = {"plain": 0, "k3": 3, "k3-stock": 3, "k5": 5, "k5-stock": 5}
    rows = report(timings, {name: {} for name in timings}, ks)
    assert rows["k3"]["ratio_to_plain"] == {"median": 2.0, "middle_half": [2.0, 2.0]}
    assert rows["k3-stock"]["ratio_to"] == {"k3": {"median": 1.5, "middle_half": [1.5, 1.5]}}
    assert rows["k5"]["ratio_to"] == {}
    assert rows["k5-stock"] == {"k": 5, "rounds": 0}
