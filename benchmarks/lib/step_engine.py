"""One engine of serve/step_cost.py in a process of its own; see `child.py`. It may run under
another version of vLLM or of drafthead than its parent, so it imports neither here."""

import json
import sys
import time

from benchmarks.lib.replies import replies

SETTLE = 4
"""Steps that all requests share before the first that is timed."""


def main() -> None:
    """Start an engine, then do what each line of standard input asks for."""
    out, spec = replies(), json.loads(sys.argv[1])
    begun = time.monotonic()
    from vllm import LLM

    llm = LLM(**spec["llm"])

    def inside(method: str, *args: str):
        text = llm.collective_rpc(method, args=args)[0]
        return json.loads(text) if text else None

    started = time.monotonic() - begun
    for at_once in (1, spec["warm"]):
        steps(llm, at_once, at_once, 8)
    out.write(json.dumps({"started_s": round(started, 1), **inside("facts")}) + "\n")
    for line in sys.stdin:
        task, at_once, *arguments = json.loads(line)
        if task == "time":
            result = steps(llm, *arguments, at_once, spec["steps"])
        elif task == "host":
            inside("host_start")
            count = steps(llm, 1000, at_once, spec["steps"])["engine_steps"]
            spent = inside("host_stop")
            result = {
                name: {"per_step": round(n / count, 2), "ms_per_step": round(ms / count, 4)}
                for name, (n, ms) in spent.items()
            }
        else:
            inside("trace_start")
            steps(llm, 1001, at_once, spec["traced_steps"])
            inside("trace_stop", arguments[0])
            result = {}
        out.write(json.dumps(result) + "\n")


def steps(llm, seed: int, at_once: int, count: int) -> dict:
    """``count`` engine steps in which ``at_once`` greedy requests decode; then they are aborted.

    Returns:
        ``ms`` a step; ``tokens_a_step`` of a request; ``tokens_per_s`` of all; ``engine_steps``,
        those before included.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0,
        max_tokens=llm.model_config.max_model_len - 64,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    names = [f"{time.monotonic_ns()}-{number}" for number in range(at_once)]
    for number, name in enumerate(names):
        ids = [1 + (seed * 97 + number * 13 + i * 31) % 500 for i in range(64)]
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    shared = every = tokens = 0
    begun = now = 0.0
    while shared < SETTLE + count:
        outputs = engine.step()
        now = time.perf_counter()
        every += bool(outputs)
        if shared >= SETTLE:
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        if len(outputs) == at_once or shared:
            shared += bool(outputs)
            if shared <= SETTLE:
                begun = now
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"answers ended after {shared} steps of {SETTLE + count}")
    engine.abort_request(names)
    seconds = now - begun
    return {
        "ms": 1e3 * seconds / count,
        "tokens_a_step": tokens / count / at_once,
        "tokens_per_s": tokens / seconds,
        "engine_steps": every,
    }


if __name__ == "__main__":
    main()
