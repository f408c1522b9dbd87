"""One engine of serve/step_cost.py in a process of its own; see `lib/child.py`."""

import json
import statistics
import sys
import time
from itertools import pairwise

from benchmarks.lib.child import replies
from benchmarks.lib.lfm2_shapes import start_engine


def main() -> None:
    """Start an engine, then do what each line of standard input asks for."""
    out, spec = replies(), json.loads(sys.argv[1])
    tiny = spec["tiny"]
    begun = time.monotonic()
    llm = start_engine(
        spec["work"],
        spec["target"],
        spec["k"],
        tiny,
        cache_bytes=1 << 30,
        share=0.1,
        head=spec["head"],
        kv=spec["kv"],
    )

    def inside(method: str, *args: str):
        text = llm.collective_rpc(method, args=args)[0]
        return json.loads(text) if text else None

    started = time.monotonic() - begun
    for seed in range(3):
        answer(llm, seed, spec["tokens"])
    out.write(json.dumps({"started_s": round(started, 1), **inside("facts")}) + "\n")
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        if task == "time":
            result = answer(llm, arguments[0], spec["tokens"])
        elif task == "host":
            inside("host_start")
            steps = answer(llm, 1000, spec["tokens"])["steps"]
            spent = inside("host_stop")
            result = {
                name: {"per_step": round(n / steps, 2), "ms_per_step": round(ms / steps, 4)}
                for name, (n, ms) in spent.items()
            }
        else:
            inside("trace_start")
            answer(llm, 1001, 24 if tiny else 120)
            inside("trace_stop", arguments[0])
            result = {}
        out.write(json.dumps(result) + "\n")


def answer(llm, seed: int, tokens: int) -> dict:
    """One request; the milliseconds between what its steps deliver.

    Prompt and the first two steps are left out: they fill the pipeline.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    ids = [1 + (seed * 97 + i * 31) % 500 for i in range(64)]
    llm.llm_engine.add_request(f"r{seed}-{time.monotonic_ns()}", {"prompt_token_ids": ids}, params)
    moments, counts = [], []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            moments.append(time.perf_counter())
            counts.append(len(output.outputs[0].token_ids))
    intervals = [1e3 * (b - a) for a, b in pairwise(moments[2:])]
    return {
        "steps": len(counts),
        "mean_ms": statistics.fmean(intervals),
        "median_ms": statistics.median(intervals),
        "tokens_a_step": statistics.fmean(counts[3:]),
        "tokens_per_s": 1e3 * sum(counts[3:]) / sum(intervals),
    }


if __name__ == "__main__":
    main()
