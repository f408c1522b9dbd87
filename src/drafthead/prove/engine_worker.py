"""The child's side of :mod:`drafthead.prove.engine`: one vLLM engine, requests over a socket.

Run as ``python -m drafthead.prove.engine_worker SOCKET_FD LIFE_FD``. Messages are JSON, one at a
time: an object with ``op`` comes in, an object with ``ok`` or ``error`` goes back. Before it comes
one with ``ended`` for each answer that ends, if the request asks for a ``report``. LIFE_FD is a
pipe whose other end only the parent holds: when the parent ends, however it ends, reading it
returns and this process kills its whole group, vLLM's own children with it.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from drafthead.capture.child import die_with_group
from drafthead.serve import llm_class
from drafthead.vllm_plugin.registry import unprotected


def _die_with_parent(life_fd: int) -> None:
    os.read(life_fd, 1)
    die_with_group()


def counters(llm: Any) -> dict:
    """Speculation counters since the engine's start; empty without speculation."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "draft_tokens",
        "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted",
    }
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        name = names.get(metric.name)
        if name == "accepted":
            old = found.get(name, [0] * len(metric.values))
            found[name] = [a + b for a, b in zip(old, metric.values, strict=True)]
        elif name:
            found[name] = found.get(name, 0) + metric.value
    return found


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

    def give_in() -> bool:
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
        while len(live) < request["concurrency"] and give_in():
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
                    give_in()
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
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        rows = (row or {} for row in output.prompt_logprobs)
        found.append([{str(t): entry.logprob for t, entry in row.items()} for row in rows])
    return {"rows": found}


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_die_with_parent, args=(int(sys.argv[2]),), daemon=True).start()

    def reply(message: dict) -> None:
        connection.send_bytes(json.dumps(message).encode())

    llm: Any = None
    while True:
        request = json.loads(connection.recv_bytes())
        try:
            if request["op"] == "start":
                llm = llm_class()(**request["args"])
                config = llm.llm_engine.vllm_config
                reply(
                    {
                        "ok": {
                            "dtype": str(config.model_config.dtype).removeprefix("torch."),
                            "quantization": config.model_config.quantization,
                            "max_model_len": config.model_config.max_model_len,
                            "unprotected": unprotected(
                                config.model_config.hf_text_config.model_type
                            ),
                        }
                    }
                )
            elif request["op"] == "generate":
                reply({"ok": generate(llm, request, lambda: reply({"ended": 1}))})
            elif request["op"] == "score":
                reply({"ok": score(llm, request["sequences"], request["top"])})
            elif request["op"] == "counters":
                reply({"ok": counters(llm)})
            else:
                raise ValueError(f"unknown op {request['op']!r}")
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        main()
