"""Which heads the quality benchmark trains, and who wins the duel."""

from dataclasses import replace

from benchmarks.lib import quality_variants as variants
from benchmarks.train import quality, quality_small


def record(length: float, curve=(), seconds: float = 1.0) -> dict:
    return {"heldout": [{"accepted_length": length}], "curve": curve, "train_seconds": seconds}


def test_parts_and_rates_with_three_seeds_each_differ_in_what_they_name():
    jobs = variants.three()
    assert [job.name for job in jobs[:3]] == [f"three/nothing/{seed}" for seed in range(3)]
    assert len({job.name for job in jobs}) == len(jobs)
    usual = jobs[0].train
    for job in jobs:
        _, name, seed = job.name.split("/")
        assert job.train["seed"] == int(seed)
        rest = replace(job, name=jobs[0].name, train=job.train | {"seed": 0})
        assert (rest == jobs[0]) == (name == "nothing"), name
    for job in jobs:
        name = job.name.split("/")[1]
        if name.startswith(("muon", "adamw")):
            optimizer, rate = name.split("-", 1)
            assert job.train["optimizer"] == optimizer
            assert job.train["learning_rate"] == float(rate)
    (slower,) = (job for job in jobs if job.name == "three/muon-1e-3/2")
    assert slower.train == usual | {"learning_rate": 1e-3, "seed": 2}


def test_the_heads_of_the_small_benchmark_differ_in_what_they_name():
    jobs = {job.name: job for job in quality_small.jobs(hidden=64, vocab=512)}
    assert len(jobs) == len(quality_small.jobs(hidden=64, vocab=512))
    bare = [replace(job, name="") for job in jobs.values()]
    assert all(job not in bare[:place] for place, job in enumerate(bare))
    assert jobs["adamw-1e-3-no-norms"].train == jobs["adamw-1e-3"].train
    assert jobs["muon-1e-3"].train == {
        "row_tokens": 256, "ttt_steps": 3, "optimizer": "muon", "learning_rate": 1e-3
    }  # fmt: skip


def test_the_verdict_is_the_time_to_where_the_other_ends():
    curve = [(10, 4.0, 1.5), (20, 8.0, 1.9), (30, 12.0, 2.1)]
    sides = {"duel/drafthead": record(2.1, curve, 12.0)}
    sides["duel/speculators"] = record(1.8, seconds=20.0)
    sides["duel/speculators-tuned"] = record(2.2, seconds=20.0)
    found = quality.verdict(sides)
    assert found["duel/speculators"]["seconds_to_its_final_length"] == 8.0
    assert found["duel/speculators"]["share_of_its_seconds"] == 0.4
    assert found["duel/speculators-tuned"]["seconds_to_its_final_length"] is None
