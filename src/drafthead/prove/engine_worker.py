"""The child's side of :mod:`drafthead.prove.engine`: one vLLM engine that answers requests.

The order holds the arguments of ``vllm.LLM``. Each later message is a request with ``op``; its
answer has ``ok``, or ``failed`` with the reason. Before the answer comes one message with ``ended``
for each completion that ends, if the request asks for a ``report``.
"""

import contextlib
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from drafthead.process import child_main
from drafthead.serve import llm_class
from drafthead.vllm_plugin.registry import unprotected


def counters(llm: Any) -> dict:
    """Speculation counters since the engine's start; empty without speculation."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "draft_tokens",
        "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted",
    }
    totals: dict[str, Any] = {}
    for metric in llm.get_metrics():
        name = names.get(metric.name)
        if name == "accepted":
            old = totals.get(name, [0] * len(metric.values))
            totals[name] = [a + b for a, b in zip(old, metric.values, strict=True)]
        elif name:
            totals[name] = totals.get(name, 0) + metric.value
    return totals


def generate(llm: Any, request: dict, ended: Callable[[], None]) -> dict:
    """Run prompts with at most ``concurrency`` of them in the engine at once.

    A new one is given in as soon as one ends, so lengths mix as under real load. Times are this
    process's wall clock, in seconds since the first was given in: ``begin_at`` of each request,
    and with the number of its tokens that of each of its ``outputs``. ``ended`` is called at the
    end of each answer if the request asks for a ``report``.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    prompts = request["prompts"]
    limits = request["max_tokens"]
    limit_of = (lambda i: limits[i]) if isinstance(limits, list) else (lambda i: limits)
    results: list[dict] = [{} for _ in prompts]
    live: dict[str, dict] = {}
    waiting = iter(range(len(prompts)))
    start = time.perf_counter()

    def submit_next() -> bool:
        i = next(waiting, None)
        if i is None:
            return False
        params = SamplingParams(
            max_tokens=limit_of(i),
            temperature=request["temperature"],
            top_p=request["top_p"],
            seed=None if request["seed"] is None else request["seed"] + i,
            ignore_eos=request["ignore_eos"],
            logprobs=request["logprobs"],
            skip_reading_prefix_cache=not request["prefix_cache"],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        begin_at = time.perf_counter() - start
        record = {"begin_at": begin_at, "ids": [], "outputs": [], "logprobs": []}
        engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, params)
        live[str(i)] = record
        return True

    try:
        while len(live) < request["concurrency"] and submit_next():
            pass
        while live:
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                record = live[output.request_id]
                part = output.outputs[0]
                if part.token_ids:
                    record["outputs"].append((now, len(part.token_ids)))
                record["ids"] += part.token_ids
                if part.logprobs is not None:
                    record["logprobs"] += [
                        {str(token): entry.logprob for token, entry in row.items()}
                        for row in part.logprobs
                    ]
                if output.finished:
                    del live[output.request_id]
                    record["finish_reason"] = part.finish_reason
                    results[int(output.request_id)] = record
                    submit_next()
                    if request["report"]:
                        ended()
    except BaseException:
        with contextlib.suppress(Exception):
            engine.abort_request(list(live))
        raise
    return {"results": results, "wall_s": time.perf_counter() - start}


def score(llm: Any, sequences: list[list[int]], top: int) -> dict:
    """Log-probabilities of the tokens of each sequence and of the likeliest at their places."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    scored = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        rows = (row or {} for row in output.prompt_logprobs)
        scored.append([{str(t): entry.logprob for t, entry in row.items()} for row in rows])
    return {"rows": scored}


_requests: queue.SimpleQueue[dict] = queue.SimpleQueue()


def _serve(args: dict, report: Callable[[dict], None]) -> None:
    """Start an engine with these arguments, then do what each request says."""

    def reply(work: Callable[..., dict], *given: Any) -> None:
        try:
            report({"ok": work(*given)})
        except Exception as error:
            traceback.print_exc()
            report({"failed": f"{type(error).__name__}: {error}"})

    llm: Any = None

    def start() -> dict:
        nonlocal llm
        llm = llm_class()(**args)
        config = llm.llm_engine.vllm_config.model_config
        return {
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "max_model_len": config.max_model_len,
            "unprotected": unprotected(config.hf_text_config.model_type),
        }

    def answer(request: dict) -> dict:
        match request["op"]:
            case "generate":
                return generate(llm, request, lambda: report({"ended": 1}))
            case "score":
                return score(llm, request["sequences"], request["top"])
            case "counters":
                return counters(llm)
            case unknown:
                raise ValueError(f"unknown op {unknown!r}")

    reply(start)
    while True:
        reply(answer, _requests.get())


if __name__ == "__main__":
    child_main(_serve, _requests.put)
