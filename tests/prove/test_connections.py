"""Connections to a server that closes idle ones, as vLLM's does."""

import asyncio
import time

import httpx
import pytest

from drafthead.prove import server
from drafthead.prove.server import Client, Stream, parse_metrics

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def ask_after_idling(http: httpx.AsyncClient, limit: float, idle: float) -> int:
    """Two requests ``idle`` seconds apart, to a server that has given up a connection idle for
    ``limit`` seconds in the instant in which its next request comes. Returns connections made."""
    made = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        last = float("inf")  # idle is what comes after an answer, however slow the first request
        while await reader.readuntil(b"\r\n\r\n"):
            if time.monotonic() - last > limit:
                break  # the request is never read
            writer.write(ANSWER)
            await writer.drain()
            last = time.monotonic()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with http:
        for pause in (idle, 0.0):
            assert (await http.get(url)).text == "ok"
            await asyncio.sleep(pause)
    listening.close()
    return made


def test_an_idle_connection_is_not_used_when_the_server_may_be_closing_it(monkeypatch):
    monkeypatch.setattr(server, "KEPT_S", 0.1)
    assert asyncio.run(ask_after_idling(server.connections(1), limit=0.25, idle=0.4)) == 2
    # What happened before: kept for as long as the server keeps it, and used once too often.
    stale = httpx.AsyncClient(limits=httpx.Limits(keepalive_expiry=None), trust_env=False)
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        asyncio.run(ask_after_idling(stale, limit=0.25, idle=0.4))


def test_a_connection_in_use_is_used_again(monkeypatch):
    assert server.KEPT_S < 5.0  # vLLM's own limit
    monkeypatch.setattr(server, "KEPT_S", 3600.0)  # however slow the machine is
    made = asyncio.run(ask_after_idling(server.connections(1), limit=float("inf"), idle=0.0))
    assert made == 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_the_targets_own_configuration_samples_by_is_left_out(monkeypatch, temperature):
    """As in process: vLLM's server takes the rest from generation_config.json."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    bodies = []

    async def stream(self, http, body):
        bodies.append(body)
        return Stream(0.0)

    monkeypatch.setattr(Client, "stream", stream)
    monkeypatch.setattr(Client, "model", lambda self: {"id": "m"})
    monkeypatch.setattr(Client, "metrics", lambda self: [])
    Client("http://nowhere").generate([[1, 2]], max_tokens=3, temperature=temperature, seed=5)
    of_its_own = {"repetition_penalty": 1.05, "presence_penalty": 1.5, "frequency_penalty": 0.1}
    of_its_own |= {"temperature": 0.3, "min_p": 0.15, "top_k": 20, "top_p": 0.8}
    (body,) = bodies
    asked = CompletionRequest(**body).to_sampling_params(3, of_its_own)
    plain = SamplingParams(temperature=temperature)
    for name in of_its_own:
        assert getattr(asked, name) == getattr(plain, name), name


def test_counters_wait_until_every_token_is_counted(monkeypatch):
    """A step is counted after its tokens are sent; how long after, depends on the machine."""
    pages = iter([(100, 10), (100, 10), (102, 10), (103, 11)])

    def metrics(self):
        tokens, drafts = next(pages)
        return parse_metrics(
            f"vllm:generation_tokens_total {tokens}\nvllm:spec_decode_num_drafts_total {drafts}\n"
        )

    async def stream(self, http, body):
        return Stream(0.0, ids=[1, 2, 3], outputs=[(0.1, 3)])

    monkeypatch.setattr(Client, "stream", stream)
    monkeypatch.setattr(Client, "model", lambda self: {"id": "m"})
    monkeypatch.setattr(Client, "metrics", metrics)
    client = Client("http://nowhere")
    client.generate([[1]], max_tokens=3)
    assert client.counters().drafts == 11
