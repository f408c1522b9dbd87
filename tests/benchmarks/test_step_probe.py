"""How a trace becomes milliseconds a step."""

import json

import pytest

from benchmarks.lib.step_probe import busy, summarize
from benchmarks.serve.step_cost import report, spread, summary


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


def rounds(*ms: float) -> list[dict]:
    return [{"ms": m, "tokens_a_step": 2.0, "tokens_per_s": 1 / m} for m in ms]


def test_steps_are_held_against_the_target_alone_in_their_round():
    timings = {"plain": {1: rounds(1, 2, 4)}, "dspark-k7": {1: rounds(2, 4, 8)}}
    timings |= {"plain-other": {1: rounds(3, 6, 12)}, "dspark-k7-other": {1: rounds(3, 6, 12)}}
    timings |= {"eagle3-k3-baseline": {1: rounds(4, 8, 16)}, "eagle3-k3": {1: []}}
    timings |= {"dspark-k7-by-load": {1: rounds(1, 2, 4), 4: []}}
    about = {name: {"vllm": "0.33.0" if "other" in name else "0.32.0"} for name in timings}
    about["plain"]["distinct_experts"] = {"1": 4.0, "4": 13.0, "8": 21.0}
    about["plain"]["profiles"] = {"1": {"device_busy_ms_per_step": 1.6}}
    rows = report(timings, about)
    assert rows["dspark-k7"]["loads"]["1"]["plain_steps"]["median"] == 2
    assert rows["dspark-k7-other"]["loads"]["1"]["plain_steps"]["median"] == 1
    assert rows["eagle3-k3"]["loads"] == {}
    figures = summary(rows, timings)
    assert figures["distinct_experts_k7"] == 21
    assert figures["dspark_k7_plain_steps_1"] == 2
    assert figures["best_over_alone_1"] == 0.5
    assert figures["best_over_10807bf_1"] == 2
    assert figures["wall_over_busy_plain"] == 1.25
    assert figures["min_over_alone_any_load"] == 1
    assert figures["step_ratio_0.33_over_0.32"] == 2.25  # of 3 and 1.5
