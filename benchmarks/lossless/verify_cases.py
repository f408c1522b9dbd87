"""Is a trained head lossless on this machine, in every precision? `drafthead verify`'s judge on
given targets and heads.

    python -m benchmarks.lossless.verify_cases --out OUT --prompts stories=stories.jsonl \
        --count 150 --case hybrid-fp32=TARGET,HEAD,float32 --case hybrid-nvfp4=TARGET,HEAD,bfloat16
    python -m benchmarks.lossless.verify_cases --out /tmp/v --tiny            # rehearsal on a CPU

Each case is judged by itself: its engines, one for each k, the target alone, and the target alone
in steps as small as with the head, start side by side and answer one after the other. Prompts as
they are, from cached blocks, and at mixed lengths. In float32 all matrix products are in IEEE
(Triton and cuBLAS would take TF32) and every answer must be identical: that tells a fault from
rounding. With VLLM_BATCH_INVARIANT=1 in the environment, where vLLM offers it (not for hybrids),
so must every answer in bf16. Nothing is timed: several may run side by side. OUT/NAME.json is
written as each case ends.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

from rich.console import Console

from benchmarks.lib.lossless_engines import IEEE
from benchmarks.lib.record import begin, pick, save
from benchmarks.serve.grid import LONGEST_PROMPT, read_prompts
from drafthead.errors import DraftheadError
from drafthead.prove.numeric_noise import noise_words
from drafthead.prove.prompts import Prompt
from drafthead.prove.verify import prove_lossless, verify_plans
from drafthead.recipe import parse_recipe
from drafthead.serve import existing_head
from drafthead.targets import load_target

CONSOLE = Console(stderr=True, width=140)


def judge(name: str, target: str, head: str, dtype: str, options: argparse.Namespace) -> dict:
    """What verify finds for one target and head."""
    recipe = parse_recipe(
        {
            "name": name,
            "target": {"path": target},
            "prompts": {"sources": [{"path": "unused"}]},
            "engine": {
                "dtype": dtype,
                "max_model_len": 2 * LONGEST_PROMPT + options.tokens,
                "max_num_seqs": options.concurrency,
                "kv_cache_memory_bytes": options.kv_cache_mib << 20,
                "gpu_memory_utilization": 0.5,
                "tensor_parallel_size": options.tensor_parallel,
            },
            "verify": {
                "max_new_tokens": options.tokens,
                "num_speculative_tokens": options.k,
                "prefix_cache": True,
                "mixed_lengths": True,
                "max_num_batched_tokens": options.step_tokens,
            },
        },
        "verify_cases.py",
    )
    asked = [
        Prompt(ids, str(i), source)
        for i, (ids, source) in enumerate(
            read_prompts(Path(target), options.prompts, options.count)
        )
    ]
    loaded = load_target(target)
    plans = verify_plans(recipe, existing_head(head), loaded)
    runs = prove_lossless(plans, asked, recipe, loaded, options.out / "logs" / name, CONSOLE).runs
    names = ("prompts", "identical", "ties", "differences", "tokens")
    return {
        "lossless": all(run["lossless"] for run in runs),
        **{name: sum(run[name] for run in runs) for name in names},
        "words": noise_words({"runs": runs}),
        "runs": runs,
    }


def tiny_case(options: argparse.Namespace) -> None:
    """The hybrid of tests/assets with a head of its shape that nobody trained."""
    from tests.vllm.models import write_head

    target = Path("tests") / "assets" / "tiny-hybrid"
    head = options.out / "head"
    if not head.exists():
        write_head(head, target, aux_layers=(2, 5, 11), repeats=True)
    file = options.out / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Tell of {n} cats."}) + "\n" for n in range(12)))
    options.case = [f"tiny={target},{head},bfloat16"]
    options.prompts, options.count = [f"cats={file}"], 12
    options.k, options.tokens, options.concurrency, options.step_tokens = [2], 24, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", default=[], help="NAME=TARGET,HEAD,DTYPE")
    parser.add_argument("--prompts", action="append", default=[], help="NAME=FILE, JSONL")
    parser.add_argument("--count", type=int, default=150, help="prompts of each set")
    parser.add_argument("--k", type=lambda text: [int(k) for k in text.split(",")])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer at most")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=512, help="of a step with the head")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--kv-cache-mib", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        tiny_case(options)
    failed = False
    for entry in options.case:
        name, _, parts = entry.partition("=")
        target, head, dtype = parts.split(",")
        begun = time.monotonic()
        record = {
            **begin("verify_cases"),
            "case": {"target": target, "head": head, "dtype": dtype},
            "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        }
        try:
            with mock.patch.dict(os.environ, IEEE if dtype == "float32" else {}):
                record |= judge(name, target, head, dtype, options)
        except DraftheadError as error:
            record |= {"lossless": False, "died": str(error)[-1500:]}
        record["seconds"] = round(time.monotonic() - begun, 1)
        failed |= not record["lossless"]
        names = ("lossless", "prompts", "identical", "ties", "differences", "seconds")
        save(options.out / f"{name}.json", record, pick(record, *names))
        shown = ("lossless", "identical", "ties", "differences", "seconds", "died")
        CONSOLE.print(name, {key: record[key] for key in shown if key in record})
        for line in record.get("words", []):
            CONSOLE.print(f"  {line}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
