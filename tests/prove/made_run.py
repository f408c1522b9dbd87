"""A finished run with figures made from a seed, for what reads runs: report, card, table."""

import json
from dataclasses import asdict

import numpy as np

from drafthead.fsio import write_json
from drafthead.head.acceptance import Acceptance
from drafthead.machine import Gpu, Machine
from drafthead.prove.paired_timing import Block, Point, summarize
from drafthead.prove.prompts import Prompt
from drafthead.prove.proof import hash_folder, write_proof
from drafthead.prove.sampling_test import TwoSample
from drafthead.prove.served import fastest, top_level
from drafthead.prove.steady_state import requests
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.targets import load_target
from tests.prove import crafted
from tests.prove.closed_loop import serve

ACCEPTANCE = [0.71, 0.48, 0.31, 0.2, 0.12]
_VERSIONS = {"python": "3.12.4", "vllm": "0.32.0", "torch": "2.11.0", "drafthead": "0.1.0"}
_GPU = Gpu("NVIDIA H100 80GB HBM3", 80 << 30)
MACHINE = Machine("Linux", "a processor", 16, 128 << 30, (_GPU,), True, "570.1", _VERSIONS)


def cell(k, concurrency, gain=1.0, temperature=0.0, seed=0, tokens=128):
    """A point of the grid whose drafted engine is as fast as acceptance and cost make it."""
    rng = np.random.default_rng(seed + 10 * k + concurrency)
    plain = 0.003 * (1 + 0.05 * concurrency)
    length = 1 + sum(ACCEPTANCE[:k])
    step = (plain * 1.15 + 0.00035 * k) / gain
    prompts = range(1 if concurrency == 1 else 2 * concurrency)
    _, limits = requests(prompts, concurrency, tokens)
    blocks = []
    for i in range(24):
        noise = rng.lognormal(0, 0.04, 2).tolist()
        base = serve(limits, concurrency, first_s=0.03, step_s=plain * noise[0])
        fast = serve(limits, concurrency, first_s=0.03, step_s=step * noise[1], length=length)
        drafts = sum(len(c.outputs) - 1 for c in fast.completions)
        per = [round(drafts * p) for p in ACCEPTANCE[:k]]
        counters = Acceptance(drafts, k * drafts, per)
        sources = [("code", "chat")[i % 2]] * len(prompts)
        blocks.append(Block(sources, concurrency, limits, base, fast, counters))
    point = Point(k, concurrency, temperature, tokens)
    found = summarize(point, blocks)
    more = {"tensor_parallel_size": 1, "engines_at_once": 2, "over": "engine"}
    return found | more | {"compared_speedup": found["speedup"]}


def make(
    folder, gain=1.0, lossless=True, ks=(3, 1, 5), tokens=(128,), publish=None, proved=(1, 3, 5)
):
    """Write the run and return recipe and run."""
    target = crafted.target(folder / "SmolLM2-135M-Instruct")
    recipe = parse_recipe(
        {
            "name": "made",
            "target": {"path": str(target)},
            "prompts": {"sources": [{"path": "prompts.jsonl"}]},
            "publish": publish or {},
        },
        "test",
    )
    run = RunDir(folder / "runs" / "made")
    crafted.head(run.head, target)
    cells = [cell(k, c, gain, tokens=n) for k in ks for n in tokens for c in (1, 4, 16)]
    best = fastest(cells, proved) or cells[0]
    cells = [best, *(cell for cell in cells if cell is not best)]
    curve = [0.72, 0.49, 0.33, 0.21, 0.13, 0.08, 0.05][: max(ks)]
    bench = {
        **top_level(best),
        "predicted_acceptance_by_position": curve[: best["num_speculative_tokens"]],
        "predicted_accepted_length": 1 + sum(curve[: best["num_speculative_tokens"]]),
        "beside": {
            "heads/other": {"grid": [cell(ks[0], 1, 0.8 * gain)]},
            "ngram": {"grid": [cell(ks[0], 1, 0.62 * gain)]},
        },
        "method": "made",
        "grid": cells,
        "head": {"sha256": hash_folder(run.head)},
        "commands": {str(k): f"vllm serve measured --k {k}" for k in ks},
        "command": "drafthead bench recipe.yaml",
        "machine": MACHINE.as_dict(),
        "date": "2026-11-24T06:00:00+00:00",
    }
    write_json(run.bench_json, bench)
    differences = 0 if lossless else 2
    one = {
        "num_speculative_tokens": 1,
        "workload": "held-out",
        "concurrency": 64,
        "lossless": lossless,
        "prompts": 64,
        "identical": 63 - differences,
        "ties": 1,
        "differences": differences,
        "tokens": 8123,
        "noise": {
            "answers": 64,
            "concurrency": [21, 42],
            "parted": [2, 1],
            "parted_at_once": 3,
            "positions": 8100,
            "flips": 12,
            "largest": 0.0625,
        },
        "wide": 0,
        "bounds": {"answers": 64, "partings": 14, "widest": 0.0625, "limit": 0.125},
        "p_value": 0.97,
        "p_wide": 1.0,
        "detectable_share": 0.15,
        "detectable_wide_share": 0.2,
        "examined": [],
    }
    sampled = TwoSample(p_value=0.43, detectable_shift=0.05, contexts=8, samples=500, positions=8)
    names = ("lossless", "prompts", "identical", "ties", "differences", "tokens")
    verify = {
        **{name: one[name] for name in names},
        "runs": [one],
        "sampled": asdict(sampled) | {"words": sampled.words},
        "command": "drafthead verify recipe.yaml",
        "machine": MACHINE.as_dict(),
    }
    write_json(run.verify_json, verify)
    served = {k: {"command": f"vllm serve proved --k {k}"} for k in proved}
    write_proof(
        run, str(target), load_target(target), verify, served, [Prompt([1, 2], "c", "chat")]
    )
    heldout = [
        {"k": k, "accepted_length": 1 + sum(curve[:k]), "acceptance_by_position": curve[:k]}
        for k in range(1, len(curve) + 1)
    ]
    summary = {"steps": 400, "tokens": 901_000, "train_seconds": 240.0}
    summary |= {"waiting": 0.013, "heldout": heldout}
    write_json(run.train / "best.json", summary)
    sizes = [64, 256, 1024, 4096, 8192, 16384, 32000, 49152]
    write_json(
        run.vocab / "coverage.json",
        {
            "size": 8192,
            "coverage": 0.991,
            "heldout_coverage": 0.987,
            "always_in": [0, 1, 4],
            "curve": [{"size": s, "coverage": min(1.0, 0.42 + 0.145 * np.log10(s))} for s in sizes],
        },
    )
    log = [{"step": i, "loss": 2.4 * i**-0.25 + 0.4} for i in range(1, 400)]
    for i in range(39, 399, 40):
        log[i]["accepted_length"] = 2.3 - 1.1 * (i + 1) ** -0.4
    (run.train / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    done = {
        "generate": {
            "conversations": 2100,
            "heldout": 64,
            "answer_tokens": 260_123,
            "seconds": 310,
        },
        "capture": {
            "tokens": 301_000,
            "bytes": 1_390_000_000,
            "format": "bf16",
            "greedy_agreement": 0.9991,
            "seconds": 2,
        },
        "train": {"seconds": 240},
    }
    for name, summary in done.items():
        run.finish(name, {}, summary)
    return recipe, run
