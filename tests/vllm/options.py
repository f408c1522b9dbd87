"""Requests with every option that people serve with, put to real engines on the CPU: what the
target answers alone must be what it answers with a head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from drafthead.targets import load_target
from tests import tiny
from tests.prove import crafted
from tests.vllm.engines import counter, eagle3
from tests.vllm.models import write_head, write_target

TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}},
    "required": ["n", "name"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {
    "skip_tokenizer_init": False,
    # Else the targets write white space for ever.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
"""Arguments of every engine that is asked."""


def hard(kind: str, drafter: str = "eagle3") -> dict[str, Any]:
    """Prefix caching, prompts in chunks, priorities, and few blocks: room for two to four requests.
    (With room for less than two, vLLM 0.32 has answers of one request, which come at the same
    moment, preempt each other for ever.)"""
    blocks = {"dense": 12, "hybrid": 40, "hybrid dspark": 72}
    return {
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_model_len": 128,
        "max_num_batched_tokens": 20,
        "long_prefill_token_threshold": 8,
        "scheduling_policy": "priority",
        "num_gpu_blocks_override": blocks.get(f"{kind} {drafter}", blocks[kind]),
        "max_num_seqs": 8,
    }


def pair(folder: Path, kind: str, drafter: str) -> tuple[Path, Path]:
    """A target (``dense`` or ``hybrid``) with a tokenizer, and a head that is right now and then.

    Both targets repeat themselves in runs, which penalties and the like can end.
    """
    target, head = folder / f"{kind}", folder / f"{kind}-{drafter}"
    if not target.exists():
        if kind == "dense":
            crafted.target(target, scale=0.1)
        else:
            write_target(target)
            tiny.tiny_tokenizer(target)
    if drafter == "eagle3":
        if kind == "dense":
            return target, crafted.head(head, target)
        return target, write_head(head, target, aux_layers=(2, 3, 6), repeats=True)
    from tests.vllm.test_dspark import repeating, saved

    aux = (1, 2, 3) if kind == "dense" else (2, 3, 6)
    return target, saved(repeating(load_target(target), aux), head)


def speculative(drafter: str, head: Path, k: int, method: str = "greedy") -> dict[str, Any]:
    return {**eagle3(head, k), "method": drafter, "draft_sample_method": method}


def cases() -> dict[str, dict[str, Any]]:
    """Options of ``SamplingParams`` by name; all greedy, `top_k` 1 where greedy is refused."""
    from vllm.sampling_params import StructuredOutputsParams as Structured

    schema = Structured(json=SCHEMA)
    regex = Structured(regex=r"[a-z !-~]{4,40}")
    return {
        "plain": {},
        "json schema": {"structured_outputs": schema, "ignore_eos": False},
        "regex": {"structured_outputs": regex, "ignore_eos": False},
        "penalties": {
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
        },
        "bad words": {"bad_words": ["'", "0", "a", " the", "!!"]},
        "allowed tokens": {"allowed_token_ids": list(range(5, 300))},
        "min tokens": {"min_tokens": 9, "stop_token_ids": list(range(5, 300, 2))},
        "stop tokens": {"stop_token_ids": list(range(7, 300, 5))},
        "stop strings": {"stop": ["'''", "00", "a", "BB"], "include_stop_str_in_output": True},
        "log-probabilities": {"logprobs": 3},
        "three answers": {"n": 3, "temperature": 1.0, "top_k": 1},
        "few tokens": {"max_tokens": 3},
    }


def prompts() -> list[list[int]]:
    """Prompts that begin alike, and end where targets repeat, alternate, or neither."""
    trunk = [(7 * i) % 290 + 5 for i in range(70)]
    ends = (11, 20, 37, 44, 69, 80, 92, 97, 110, 131, 205, 310)
    return [[*trunk[: 6 * i], end] for i, end in enumerate(ends)]


def asked(llm: Any, options: dict[str, Any]) -> list[Any]:
    """Answers to all prompts at once: ids, why each ended, text, and log-probabilities."""
    from vllm import SamplingParams

    given = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True} | options
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts()],
        SamplingParams(**given),
        use_tqdm=False,
        **({"priority": [i % 3 for i in range(len(prompts()))]} if _by_priority(llm) else {}),
    )
    return [
        (list(o.token_ids), o.finish_reason, o.stop_reason, o.text, _likeliest(o.logprobs))
        for output in outputs
        for o in output.outputs
    ]


def _by_priority(llm: Any) -> bool:
    return llm.llm_engine.vllm_config.scheduler_config.policy == "priority"


def _likeliest(rows: Any) -> list[list[tuple[int, float]]] | None:
    if rows is None:
        return None
    return [sorted((i, entry.logprob) for i, entry in row.items()) for row in rows]


def same(one: Any, other: Any) -> bool:
    """Whether two answers are one: log-probabilities as far as fp32 holds between batch shapes."""
    if isinstance(one, list) or one[-1] is None or other[-1] is None:
        return one == other
    flat = [np.array([pair for row in answer[-1] for pair in row]) for answer in (one, other)]
    return one[:-1] == other[:-1] and np.allclose(*flat, rtol=0, atol=1e-3)


def streamed(llm: Any, abort: bool = False) -> list[list[int]]:
    """Token ids of all prompts, put together from what each step hands out; with ``abort`` every
    other request is ended in mid-draft, and its answer left out."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    engine, written = llm.llm_engine, {}
    for i, ids in enumerate(prompts()):
        engine.add_request(f"s{i}", {"prompt_token_ids": ids}, sampling)
        written[f"s{i}"] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            written[output.request_id.split("-")[0]] += output.outputs[0].token_ids
        begun = [f"s{i}" for i in range(1, len(written), 2) if len(written[f"s{i}"]) > 4]
        if abort and begun:
            engine.abort_request(begun)
    return [ids for name, ids in written.items() if not abort or int(name[1:]) % 2 == 0]


def ways() -> dict[str, Callable[[Any], list[Any]]]:
    """Everything to ask an engine, by name."""
    found: dict[str, Callable[[Any], list[Any]]] = {
        name: lambda llm, options=options: asked(llm, options) for name, options in cases().items()
    }
    found["streaming"] = streamed
    found["aborts in mid-draft"] = lambda llm: streamed(llm, abort=True)
    return found


def answers(llm: Any, drafted: bool) -> dict[str, dict[str, Any]]:
    """What an engine answers in each way, and what its counters say of the drafts."""
    found = {}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    for name, ask in ways().items():
        before = {n: counter(llm, f"spec_decode_{n}") if drafted else 0 for n in names}
        said = ask(llm)
        after = {n: counter(llm, f"spec_decode_{n}") if drafted else 0 for n in names}
        found[name] = {"answers": said} | {n: after[n] - before[n] for n in names}
    return found
