"""Load test: minutes of mixed requests at a real server with the head on, then every answer judged.

    python -m benchmarks.serve.load --target TARGET --head HEAD --prompts prompts.jsonl \
        --minutes 20 --out OUT
    python -m benchmarks.serve.load --out /tmp/load --tiny --minutes 0.3  # rehearsal on a CPU

Users (--concurrency) each ask, wait a little, and ask again. Prompts have mixed lengths, from one
token up; some are the beginning of others (prefix caching). Answers are limited to 1 … 128 tokens,
and some users hang up in the middle. Meanwhile the memory of the server's processes and of the GPU
is sampled.

OUT/load.json has three claims; the exit code is 1 if one does not hold:
- lossless: every finished answer is what the engine without the head writes, token for token, but
  for ties within its numeric noise (drafthead.prove.lossless)
- no request stuck: none took longer than the limit, and the server was empty at the end
- memory flat: over the last third it grew by no more than 2 % or 32 MiB, by its fitted line
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console

from benchmarks.lib.record import begin, save
from drafthead.data.template import Template
from drafthead.machine import this_machine
from drafthead.prove.engine import Completion, EngineProcess
from drafthead.prove.grid import running, shared, start
from drafthead.prove.lossless import Examiner
from drafthead.prove.server import Client, connections
from drafthead.recipe import parse_recipe
from drafthead.serve import engine_plan
from drafthead.targets import load_target

CONSOLE = Console(stderr=True, width=120)
PROMPT_LENGTHS = (1, 1, 2, 3, 5, 8, 20, 60, 130, 200, 400)
ANSWER_LENGTHS = (1, 2, 5, 17, 40, 64, 128)
HANG_UP, STUCK_S, PAUSE_S = 0.1, 120.0, 0.05


def make_requests(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Prompts as token ids, each with the limit of its answer."""
    rng = np.random.default_rng(0)
    target = load_target(options.target)
    template = Template(target.tokenizer(), target.eos_token_ids, str(target.path))
    texts = [json.loads(row)["prompt"] for row in options.prompts.read_text().splitlines()]
    found = []
    for i in range(options.requests):
        text = texts[i % len(texts)]
        ids = list(template.encode([{"role": "user", "content": text}])[0])
        ids = ids[: rng.choice(PROMPT_LENGTHS)]
        if found and rng.random() < 0.25:  # begins as an earlier one: its blocks are cached
            ids = (found[rng.integers(len(found))][0] + ids)[: max(PROMPT_LENGTHS)]
        found.append((ids, int(rng.choice(ANSWER_LENGTHS))))
    return found


class Load:
    """The users, and what came of their requests."""

    def __init__(self, client: Client, requests: list[tuple[list[int], int]], seed: int = 0):
        self.client, self.requests = client, requests
        self.model = client.model()["id"]
        self.rng = np.random.default_rng(seed)
        self.answers: dict[tuple[int, tuple[int, ...], str], int] = {}
        """How often (request, answer, reason of its end) came."""
        self.finished = self.left = self.tokens = 0
        self.slowest = 0.0
        self.failures: list[str] = []

    async def user(self, http: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.exponential(PAUSE_S))
            index = int(self.rng.integers(len(self.requests)))
            prompt, limit = self.requests[index]
            leave = int(self.rng.integers(1, limit + 1)) if self.rng.random() < HANG_UP else None
            body = {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": limit,
                "temperature": 0,
                "stream": True,
                "return_token_ids": True,
            }
            begun = time.monotonic()
            try:
                stream = await asyncio.wait_for(
                    self.client.stream(http, body, leave_after=leave), STUCK_S
                )
            except Exception as error:
                self.failures.append(f"request {index}: {type(error).__name__}: {error}"[:300])
                continue
            self.slowest = max(self.slowest, time.monotonic() - begun)
            if leave is not None:
                self.left += 1
                continue
            key = (index, tuple(stream.ids), stream.finish_reason)
            self.answers[key] = self.answers.get(key, 0) + 1
            self.finished += 1
            self.tokens += len(stream.ids)

    async def watch(self, until: float, memory: list[dict], every: float) -> None:
        begun = time.monotonic()
        while time.monotonic() < until:
            memory.append({"s": round(time.monotonic() - begun, 1), **memory_now(self.client.pid)})
            await asyncio.sleep(every)

    async def run(self, concurrency: int, seconds: float) -> list[dict]:
        """Run the load; returns the samples of memory."""
        until, memory = time.monotonic() + seconds, []
        async with connections(concurrency) as http:
            watching = self.watch(until, memory, max(1.0, seconds / 120))
            await asyncio.gather(watching, *(self.user(http, until) for _ in range(concurrency)))
        return memory


def memory_now(pid: int) -> dict[str, int]:
    """Bytes that the server's processes hold in memory, the API server's and the engine's part of
    them, and on the GPUs."""
    server = psutil.Process(pid)
    found = {"server_rss": server.memory_info().rss, "engine_rss": 0}
    children = server.children(recursive=True)
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            found["engine_rss"] += process.memory_info().rss
    found["rss"] = sum(found.values())
    if this_machine().vllm_device == "cuda":
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
        rows = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        used = (line.split(",") for line in rows.splitlines())
        own = {process.pid for process in children}
        sizes = [int(size.split()[0]) << 20 for pid, size in used if int(pid) in own]
        found |= {"gpu": sum(sizes)} if sizes else {}
    return found


def growth(memory: list[dict], name: str) -> dict:
    """A line fitted through the last third of the samples: before that, caches fill."""
    late = [m for m in memory if name in m][2 * len(memory) // 3 :]
    s, used = (np.array([m[key] for m in late], dtype=float) for key in ("s", name))
    slope = float(np.polyfit(s, used, 1)[0]) if len(late) > 2 else 0.0
    grown = slope * float(s[-1] - s[0])
    return {
        "first_bytes": memory[0][name],
        "last_bytes": memory[-1][name],
        "slope_bytes_per_minute": 60 * slope,
        "grown_bytes_in_last_third": grown,
        "flat": bool(grown <= max(0.02 * used[0], 32 << 20)),
    }


def empty_in_time(client: Client, seconds: float = 60) -> bool:
    """Whether the server comes to run and hold no request."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if sum(sample.value for sample in client.metrics() if sample.name in names) == 0:
            return True
        time.sleep(0.5)
    return False


def judge(engine: EngineProcess, load: Load, concurrency: int) -> dict:
    """Hold every different answer against the target's alone."""
    used = sorted({index for index, _, _ in load.answers})
    wanted = engine.generate(
        [load.requests[i][0] for i in used],
        max_tokens=[load.requests[i][1] for i in used],
        concurrency=concurrency,
        prefix_cache=False,
    )
    alone = dict(zip(used, wanted.completions, strict=True))
    keys = list(load.answers)
    asked = [load.requests[i] for i, _, _ in keys]
    examiner = Examiner(engine, [ids for ids, _ in asked], [n for _, n in asked], concurrency)
    verdict = examiner.compare(
        [alone[i] for i, _, _ in keys],
        [Completion(list(ids), reason) for _, ids, reason in keys],
    )
    return {
        "different_requests": len(used),
        "different_answers": len(keys),
        # Not verdict["lossless"]: of answers that came out alike only one is counted here, so the
        # rate at which they part says nothing.
        "lossless": not verdict["differences"],
        "identical": verdict["identical"],
        "ties": verdict["ties"],
        "differences": verdict["differences"],
        "noise": verdict["noise"],
        "examined": verdict["examined"][:50],
    }


def tiny(options: argparse.Namespace) -> None:
    """A target and head of known tokens for the rehearsal."""
    from tests.prove import crafted

    options.target, options.head = options.out / "target", options.out / "head"
    if not options.head.exists():
        crafted.head(options.head, crafted.target(options.target))
    options.prompts = options.out / "prompts.jsonl"
    rows = (json.dumps({"prompt": f"words {n} " * (n % 9 + 1)}) + "\n" for n in range(60))
    options.prompts.write_text("".join(rows))
    options.concurrency, options.requests = min(options.concurrency, 8), 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target")
    parser.add_argument("--head")
    parser.add_argument("--prompts", type=Path, help="JSONL with `prompt`")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=300, help="different requests")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        tiny(options)
    cuda = this_machine().vllm_device == "cuda"
    recipe = parse_recipe(
        {
            "name": "load",
            "target": {"path": str(options.target)},
            "prompts": {"sources": [{"path": str(options.prompts)}]},
            "engine": {
                "dtype": "bfloat16" if cuda else "float32",
                "max_model_len": 512 if options.tiny else 1024,
                "max_num_seqs": options.concurrency,
                # On a CPU a page counts once it is touched: small, so that all are, soon.
                "kv_cache_memory_bytes": (4 << 30) if cuda else (128 << 20),
            },
        },
        "load.py",
    )
    requests = make_requests(options)
    record = {
        **begin("load"),
        "target": str(options.target),
        "num_speculative_tokens": options.k,
        "concurrency": options.concurrency,
        "minutes": options.minutes,
    }
    logs = options.out / "logs"
    drafted = engine_plan(recipe, head=str(options.head), num_speculative_tokens=options.k)
    plans = {
        "server": (drafted, "http"),
        "target": (engine_plan(recipe, head=None), "engine"),
    }
    with contextlib.ExitStack() as stack:
        # Both from the start: the target alone is idle until the load is over, and ready then.
        server, alone = start(
            [
                running(shared(plan, 2), over, logs / f"{name}.log", name)
                for name, (plan, over) in plans.items()
            ],
            stack,
            CONSOLE,
        )
        load = Load(server, requests)
        memory = asyncio.run(load.run(options.concurrency, 60 * options.minutes))
        empty = empty_in_time(server)
        counters = server.counters()
        record |= {
            "requests": load.finished + load.left + len(load.failures),
            "finished": load.finished,
            "hung_up": load.left,
            "failures": load.failures,
            "tokens": load.tokens,
            "slowest_s": load.slowest,
            "drafts": counters.drafts,
            "accepted_length": counters.accepted_length,
            "no_request_stuck": empty and not load.failures,
            "memory": {name: growth(memory, name) for name in memory[0] if name != "s"},
            "memory_samples": memory,
        }
        record["memory_flat"] = all(part["flat"] for part in record["memory"].values())
        save(options.out / "load.json", record, {})
        CONSOLE.print(f"{record['requests']} requests, {load.tokens} tokens; judging the answers")
        record |= judge(alone, load, options.concurrency)
    record["holds"] = all(record[n] for n in ("lossless", "no_request_stuck", "memory_flat"))
    figures = {name: part for name, part in record.items() if name not in ("machine", "noise")}
    save(options.out / "load.json", record, figures)
    CONSOLE.print({k: v for k, v in record.items() if k not in ("memory_samples", "examined")})
    sys.exit(0 if record["holds"] else 1)


if __name__ == "__main__":
    main()
