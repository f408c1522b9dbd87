"""Real engines on the CPU, in this process, and the requests that the tests give them."""

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The n-gram proposer's threads would wait for each other on the engine's one core.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

Request = tuple[list[int], int]  # prompt ids, tokens to write


@contextmanager
def engine(target: Path, speculative: dict | None = None, **arguments: object) -> Iterator:
    """An ``LLM`` for a target without a tokenizer, in fp32; gone when the block ends."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(model=str(target), speculative_config=speculative, **{**defaults, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def norms_write_in_place(monkeypatch) -> None:
    """Let ``RMSNorm`` write into what it is given, as its kernel on a GPU does in eager mode; on a
    CPU it makes new tensors."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    stock = RMSNorm.forward_native

    def forward_native(self, x, residual=None):
        if residual is None:
            return stock(self, x)
        normed, total = stock(self, x, residual)
        return x.copy_(normed), residual.copy_(total)

    monkeypatch.setattr(RMSNorm, "forward_native", forward_native)


def eagle3(head: Path, k: int) -> dict:
    return {"method": "eagle3", "model": str(head), "num_speculative_tokens": k}


def ngram(k: int) -> dict:
    return {
        "method": "ngram",
        "num_speculative_tokens": k,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }


def _greedy(tokens: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm, requests: list[Request]) -> list[list[int]]:
    """Token ids that ``llm`` writes when it gets all requests at once."""
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [_greedy(tokens) for _, tokens in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def staggered(llm, requests: list[Request]) -> list[list[int]]:
    """As :func:`answers`, with a new request every other step."""
    waiting = list(enumerate(requests))
    done: dict[str, list[int]] = {}
    step = 0
    while len(done) < len(requests):
        if waiting and step % 2 == 0:
            index, (ids, tokens) = waiting.pop(0)
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, _greedy(tokens))
        for output in llm.llm_engine.step():
            if output.finished:
                # The engine adds a suffix to the ids it was given.
                done[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        step += 1
    return [done[str(index)] for index in range(len(requests))]


def counter(llm, name: str) -> int:
    """The engine's counter ``vllm:<name>``."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def prompt(rng: random.Random, length: int, vocab: int = 512) -> list[int]:
    return [rng.randrange(5, vocab) for _ in range(length)]


def stress(seed: int = 0) -> list[Request]:
    """80 requests; most prompts are shorter than a verify step is wide."""
    rng = random.Random(seed)
    lengths, outputs = (1, 1, 2, 3, 4, 5, 8, 20, 60, 130, 200), (1, 2, 5, 17, 40)
    return [(prompt(rng, rng.choice(lengths)), rng.choice(outputs)) for _ in range(80)]


def sharing(seed: int = 1) -> list[Request]:
    """Prompts that begin alike and end around the edges of blocks of 32, twice over."""
    rng = random.Random(seed)
    trunk = prompt(rng, 200)
    return [(trunk[: 32 * (1 + i % 6)] + prompt(rng, i % 3), 12) for i in range(18)] * 2
