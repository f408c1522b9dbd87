"""A vLLM server over HTTP: started here or running elsewhere, asked by streaming.

:class:`Client` answers to the same calls as :class:`drafthead.prove.engine.EngineProcess`, so
that pairs are timed and answers compared over HTTP as they are in process.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from drafthead.errors import DraftheadError
from drafthead.head.acceptance import Acceptance
from drafthead.plan import Plan
from drafthead.process import Process, kill_group, kill_with_parent
from drafthead.prove.engine import Completion, Generation, Startable

_PLAIN = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What a server takes from the target's generation_config.json where a request does not say it:
the engine itself, and what training predicts, know of no penalty."""
_TIMEOUT = httpx.Timeout(600, connect=30)
"""Seconds; a server on a busy machine may be long in answering."""
_COUNTING_S = 60.0
"""Within which an answer's tokens are on the metrics page."""


def parse_metrics(text: str) -> list[Sample]:
    """Samples of a Prometheus page.

    Raises:
        ValueError: it is none.
    """
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples]


def spec_counters(samples: Sequence[Sample]) -> Acceptance:
    """Speculation counters of a metrics page, over all its engines."""
    per: dict[int, float] = {}
    for sample in samples:
        if sample.name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
            at = int(sample.labels["position"])
            per[at] = per.get(at, 0.0) + sample.value
    return Acceptance(
        total(samples, "spec_decode_num_drafts"),
        total(samples, "spec_decode_num_draft_tokens"),
        [round(per[at]) for at in sorted(per)],
    )


def total(samples: Sequence[Sample], name: str) -> int:
    """A counter of a metrics page, ``vllm:…_total``, over all its engines and labels."""
    return round(sum(s.value for s in samples if s.name == f"vllm:{name}_total"))


@dataclass
class Stream:
    """One streamed answer while it comes in."""

    begin: float
    """When it was asked for, by ``time.perf_counter``."""
    ids: list[int] = field(default_factory=list)
    outputs: list[tuple[float, int]] = field(default_factory=list)
    """When each output with tokens came, by the same clock, and how many it held."""
    finish_reason: str = "length"

    def completion(self, since: float) -> Completion:
        """The finished answer, with times in seconds after ``since``."""
        return Completion(
            ids=self.ids,
            finish_reason=self.finish_reason,
            begin_at=self.begin - since,
            outputs=[(at - since, tokens) for at, tokens in self.outputs],
        )


class Client:
    """Asks a running server.

    Args:
        url: of the server, without ``/v1``.
        name: what errors call it.
        pid: its process, if it was started here.

    Raises:
        DraftheadError: it does not answer, or refuses a request.
    """

    def __init__(self, url: str, name: str = "server", pid: int | None = None):
        self.url, self.name, self.pid = url.rstrip("/").removesuffix("/v1"), name, pid
        self._tokens_due = 0
        """Generated tokens that the server has counted once it has counted all of ours."""

    def get(self, path: str) -> httpx.Response:
        """A page of the server."""
        try:
            response = httpx.get(self.url + path, headers=_key(), timeout=_TIMEOUT, trust_env=False)
            response.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
                raise DraftheadError(
                    f"{self.url}{path}: needs an API key, and VLLM_API_KEY is wrong or not set"
                ) from None
            raise DraftheadError(
                f"{self.url}{path}: {error or type(error).__name__}; is a vLLM server there?"
            ) from None
        return response

    def metrics(self) -> list[Sample]:
        """The server's metrics.

        Raises:
            DraftheadError: it does not answer, or with none of vLLM's.
        """
        try:
            samples = parse_metrics(self.get("/metrics").text)
        except ValueError:
            samples = []
        if not any(sample.name.startswith("vllm:") for sample in samples):
            raise DraftheadError(
                f"{self.url}/metrics: no vLLM metrics; is it a vLLM server, started without "
                "--disable-log-stats?"
            )
        return samples

    def counters(self) -> Acceptance:
        """Speculation counters since the server's start, with those of every answer that
        :meth:`generate` got: a step is counted a moment after its tokens are sent."""
        samples, started = self.metrics(), time.monotonic()
        # A server that was started again counts from 0, and would keep this waiting for ever.
        while (
            total(samples, "generation_tokens") < self._tokens_due
            and time.monotonic() - started < _COUNTING_S
        ):
            time.sleep(0.01)
            samples = self.metrics()
        return spec_counters(samples)

    def model(self) -> dict[str, Any]:
        """The first model that it serves: ``id``, ``root``, ``max_model_len``."""
        return self.get("/v1/models").json()["data"][0]

    def tokenize_chat(
        self, messages: Sequence[dict[str, str]], chat_template_kwargs: dict | None = None
    ) -> list[int]:
        """Token ids that the server's chat template makes of a conversation, for a request with
        these arguments of the template."""
        body = {
            "model": self.model()["id"],
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": chat_template_kwargs,
        }
        try:
            response = httpx.post(
                f"{self.url}/tokenize", json=body, headers=_key(), timeout=_TIMEOUT, trust_env=False
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise DraftheadError(f"{self.url}/tokenize: {error}") from None
        return response.json()["tokens"]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        concurrency: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        prefix_cache: bool = True,
    ) -> Generation:
        """As :meth:`drafthead.prove.engine.EngineProcess.generate`, streamed over HTTP; times are
        those of this client."""
        model = self.model()["id"]
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        bodies = [
            {
                "model": model,
                "prompt": list(map(int, prompt)),
                "max_tokens": limits[i],
                "temperature": temperature,
                "top_p": top_p,
                **_PLAIN,
                "seed": None if seed is None else seed + i,
                "ignore_eos": ignore_eos,
                "stream": True,
                "return_token_ids": True,
                # A salt of its own keeps a request out of everyone's prefix cache.
                **({} if prefix_cache else {"cache_salt": uuid.uuid4().hex}),
            }
            for i, prompt in enumerate(prompts)
        ]
        counted = max(self._tokens_due, total(self.metrics(), "generation_tokens"))
        begin = time.perf_counter()
        streams = asyncio.run(self._ask_all(bodies, concurrency))
        wall = time.perf_counter() - begin
        self._tokens_due = counted + sum(len(stream.ids) for stream in streams)
        return Generation([stream.completion(begin) for stream in streams], wall)

    async def _ask_all(self, bodies: list[dict], concurrency: int) -> list[Stream]:
        gate = asyncio.Semaphore(concurrency)
        async with connections(concurrency) as http:

            async def ask(body: dict) -> Stream:
                async with gate:
                    return await self.stream(http, body)

            try:
                return await asyncio.gather(*(ask(body) for body in bodies))
            except httpx.HTTPError as error:
                raise DraftheadError(f"{self.name} ({self.url}): {error!r}") from None

    async def stream(
        self, http: httpx.AsyncClient, body: dict, *, leave_after: int | None = None
    ) -> Stream:
        """Ask for one completion and read it as it comes.

        Args:
            http: connections, from :func:`connections`.
            body: of the request; it asks for a stream with token ids.
            leave_after: hang up after so many outputs.
        """
        answer = Stream(time.perf_counter())
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")[:500]
                raise DraftheadError(f"{self.name} ({self.url}): {response.status_code}: {text}")
            async for line in response.aiter_lines():
                if leave_after is not None and len(answer.outputs) >= leave_after:
                    break
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise DraftheadError(f"{self.name} ({self.url}): {event['error']}")
                for choice in event["choices"]:
                    if choice["token_ids"]:
                        answer.outputs.append((time.perf_counter(), len(choice["token_ids"])))
                        answer.ids += choice["token_ids"]
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        return answer


KEPT_S = 2.0
"""Seconds that an idle connection is used again. vLLM's server closes it after five, and so would
httpx: a request sent in that instant is lost."""


def connections(count: int) -> httpx.AsyncClient:
    """An HTTP client with at most ``count`` connections. It ignores proxies of the environment,
    which would be timed with the server."""
    limits = httpx.Limits(max_connections=count, keepalive_expiry=KEPT_S)
    return httpx.AsyncClient(limits=limits, timeout=_TIMEOUT, headers=_key(), trust_env=False)


def _key() -> dict[str, str]:
    """The header with the key of a server that asks for one, where vLLM itself would read it."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess(Startable[Client]):
    """``vllm serve`` for a plan, in a process of its own: a context manager that gives a client of
    it once it is healthy, and leaves nothing behind. It ends with this process, even if that is
    killed.

    Args:
        plan: what is served.
        log: file for what the server prints; appended to.
        name: what errors call it.

    Raises:
        DraftheadError: it ended before it was healthy.
    """

    def __init__(self, plan: Plan, *, log: Path, name: str):
        self.plan, self.log, self.name = plan, log, name
        self._server: Process | None = None
        self._watcher: subprocess.Popen | None = None
        self._grace = 0  # s: what still loads has nothing to put in order

    def start(self) -> None:
        """Begin loading the model and return at once; :meth:`wait_ready` waits for it."""
        self._port = _free_port()
        command = [*self.plan.command, "--host", "127.0.0.1", "--port", str(self._port)]
        # A user who has another server's key set would be refused by this one.
        environment = self.plan.environment | {"VLLM_API_KEY": ""}
        self._server = Process(self.name, command, self.log, environment)
        self._watcher = kill_with_parent(self._server.process.pid)

    def wait_ready(self) -> Client:
        """Wait until the server is healthy; what asks it."""
        if self._server is None:
            self.start()
        assert self._server is not None
        process = self._server.process
        client = Client(f"http://127.0.0.1:{self._port}", self.name, process.pid)
        while True:
            with contextlib.suppress(DraftheadError):
                client.get("/health")
                self._grace = 20
                return client
            if process.poll() is not None:
                raise self._server.death("vllm serve ended")
            time.sleep(0.5)

    def close(self) -> None:
        """End the server and everything that it started."""
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
        if self._server is None:
            return
        process = self._server.process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=self._grace)
        kill_group(process.pid)
        process.wait()
