"""Answers over real sockets: their form, several choices, streams, and clients that leave or do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest

from swarmcpp.api.answers import merge
from swarmcpp.api.server import RunningServer
from swarmcpp.core import Event, GenerateRequest, Started, TextEvent
from swarmcpp.errors import EngineFailed
from swarmcpp.testing import FakeService

Serve = Callable[..., Awaitable[RunningServer]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def post(path: str, body: dict[str, Any], version: str = "1.1") -> bytes:
    """A whole request as bytes."""
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def drain(client: socket.socket) -> bytes:
    """All that a socket still gets until its end, orderly or not."""
    client.settimeout(60)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 20):
            received += data
    return received


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    """The JSON of every server-sent event; [DONE] as a string."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert "no-cache" in response.headers["Cache-Control"]
    parts = (await response.read()).split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") for part in parts)
    return [part[6:].decode() if part == b"data: [DONE]" else json.loads(part[6:]) for part in parts]


def by_seed(request: GenerateRequest) -> str:
    """A script that tells prompt and seed."""
    return f"{bytes(request.prompt).decode()}:{request.sampling.seed}"


async def test_chat_completion(serve: Serve, http: aiohttp.ClientSession) -> None:
    service = FakeService(script='Grüße, "Welt".\n')
    server = await serve(service)
    async with http.post(server.url + CHAT, json=HELLO | {"model": "fake", "seed": 5}) as response:
        body = await response.json()
    assert body["id"].startswith("chatcmpl-")
    assert response.headers["X-Request-Id"] == body["id"] == service.requests[0].id
    assert (body["object"], body["model"]) == ("chat.completion", "fake")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": 'Grüße, "Welt".\n', "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    prompt_tokens = len("user: hello\n")
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 17,
        "total_tokens": prompt_tokens + 17,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    timings = body["timings"]
    assert (timings["prompt_n"], timings["prompt_ms"], timings["prompt_per_second"]) == (12, 500.0, 24.0)
    assert (timings["predicted_n"], timings["predicted_ms"], timings["predicted_per_second"]) == (17, 250.0, 68.0)
    assert service.requests[0].max_tokens == service.ctx_size - prompt_tokens


async def test_completion_of_several_prompts_and_choices(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script=by_seed))
    query = {"prompt": ["a", "bb"], "n": 2, "seed": 10}
    async with http.post(server.url + "/v1/completions", json=query) as response:
        body = await response.json()
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    texts = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert texts == [(0, "a:10"), (1, "a:11"), (2, "bb:10"), (3, "bb:11")]
    # Each prompt counts once, each choice's tokens count.
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 18)
    assert "timings" in body["choices"][3]


async def test_token_id_prompts_stop_and_max_tokens(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script="one two three"))
    query = {"prompt": [[104, 105]], "stop": [" th", "zzz"]}
    async with http.post(server.url + "/completions", json=query) as response:
        assert (await response.json())["choices"][0]["text"] == "one two"
    async with http.post(server.url + "/completions", json=query | {"max_tokens": 3}) as response:
        choice = (await response.json())["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one", "length")


async def test_developer_messages_reach_the_template_as_system(serve: Serve, http: aiohttp.ClientSession) -> None:
    service = FakeService()
    server = await serve(service)
    messages = [{"role": "developer", "content": "be brief"}, *HELLO["messages"]]
    async with http.post(server.url + CHAT, json={"messages": messages}):
        pass
    assert [one.role for one in service.conversations[0]] == ["system", "user"]


async def test_chat_stream(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script='a"ü'))
    async with http.post(server.url + CHAT, json=HELLO | {"stream": True}) as response:
        chunks = await events(response)
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {response.headers["X-Request-Id"]}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": '"'},
        {"content": "ü"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]
    assert chunks[-1]["timings"]["predicted_n"] == 4
    assert all("usage" not in chunk for chunk in chunks)


async def test_text_stream_with_usage(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script="ab"))
    query = {"prompt": "hello", "stream": True, "stream_options": {"include_usage": True}}
    async with http.post(server.url + "/v1/completions", json=query) as response:
        chunks = await events(response)
    assert chunks.pop() == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 7
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]


async def test_three_choices_interleave_in_one_stream(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script=lambda request: str(request.sampling.seed) * 20))
    query = HELLO | {"stream": True, "n": 3, "seed": 4, "stream_options": {"include_usage": True}}
    async with http.post(server.url + CHAT, json=query) as response:
        chunks = await events(response)
    texts: dict[int, str] = {}
    order = []
    for chunk in chunks[:-2]:
        (choice,) = chunk["choices"]
        order.append(choice["index"])
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    assert texts == {0: "4" * 20, 1: "5" * 20, 2: "6" * 20}
    assert order != sorted(order)
    assert chunks[-2]["usage"]["completion_tokens"] == 60
    assert chunks[-2]["usage"]["prompt_tokens"] == len("user: hello\n")


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_in_mid_stream_ends_it(serve: Serve, http: aiohttp.ClientSession, until: Until, n: int) -> None:
    service = FakeService(script="abcdef", fail_at=(3, EngineFailed("the engine died")))
    server = await serve(service)
    async with http.post(server.url + CHAT, json=HELLO | {"stream": True, "n": n}) as response:
        assert response.status == 200
        chunks = await events(response)
    assert chunks[-1] == {
        "error": {"message": "the engine died", "type": "server_error", "code": "engine_failed", "param": None}
    }
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    text = "".join(one["delta"].get("content", "") for one in deltas if one["index"] == 0)
    assert text in ("ab", "abc")
    await until(lambda: service.running == 0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("gate_at", [0, 2])
async def test_a_client_that_leaves_cancels_its_work(
    serve: Serve, http: aiohttp.ClientSession, until: Until, n: int, stream: bool, gate_at: int
) -> None:
    service = FakeService(gate=asyncio.Event(), gate_at=gate_at)
    server = await serve(service)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(CHAT, HELLO | {"stream": stream, "n": n}))
    await until(lambda: service.running == n)
    writer.close()
    await until(lambda: service.running == 0)
    assert sorted(service.cancelled) == sorted(request.id for request in service.requests)
    async with http.get(server.url + "/metrics") as response:
        assert 'endpoint="/v1/chat/completions",outcome="cancelled"} 1.0' in await response.text()


async def test_a_client_that_does_not_read_loses_its_request(
    serve: Serve, http: aiohttp.ClientSession, until: Until
) -> None:
    service = FakeService(script="x" * 20_000_000, ctx_size=100_000_000, event_chars=100_000)
    server = await serve(service, write_timeout_s=0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(post("/v1/completions", {"prompt": "a", "stream": True}))
        await until(lambda: len(service.cancelled) == 1)
        async with http.get(server.url + "/metrics") as response:
            assert 'endpoint="/v1/completions",outcome="slow_client"} 1.0' in await response.text()
        # Cut off, not closed in good order: nothing follows the broken stream, least of all another response.
        received = await asyncio.to_thread(drain, client)
        assert received.count(b"HTTP/1.1 ") == 1
        assert not received.endswith(b"\r\n0\r\n\r\n")


async def test_a_long_answer_that_is_not_read_frees_the_connection(
    serve: Serve, http: aiohttp.ClientSession, until: Until
) -> None:
    service = FakeService(script="x" * 20_000_000, ctx_size=100_000_000, event_chars=1_000_000)
    server = await serve(service, write_timeout_s=0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(post("/v1/completions", {"prompt": "a"}))
        outcome = 'endpoint="/v1/completions",outcome="slow_client"} 1.0'
        while True:
            async with http.get(server.url + "/metrics") as response:
                if outcome in await response.text():
                    break


async def test_an_old_client_gets_a_stream_that_ends_with_the_connection(serve: Serve) -> None:
    server = await serve(FakeService(script="hi"))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(CHAT, HELLO | {"stream": True}, "1.0"))
    answer = await asyncio.wait_for(reader.read(), 60)
    assert answer.endswith(b"data: [DONE]\n\n")
    writer.close()


class _Stream:
    """An iterator of events that is no generator and counts how often it is closed."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.closed = 0

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        await asyncio.sleep(0)
        if self.left == 0:
            raise StopAsyncIteration
        self.left -= 1
        return TextEvent("x", (1,))

    async def aclose(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("count", [1, 4])
async def test_merge_closes_streams_that_are_not_read_to_their_end(count: int) -> None:
    streams = [_Stream(1000) for _ in range(count)]
    merged = merge(streams)
    await anext(merged)
    for _ in range(200):
        await asyncio.sleep(0)
    await merged.aclose()
    assert [stream.closed for stream in streams] == [1] * count
    # A reader that stops takes little from the streams: what is ahead of it is bounded.
    assert all(stream.left > 900 for stream in streams)


async def test_an_answer_that_stops_without_its_end_is_a_failure(serve: Serve, http: aiohttp.ClientSession) -> None:
    class Broken(FakeService):
        def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
            return _Stream(2)

    server = await serve(Broken())
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (500, "engine_failed")


class Placed(FakeService):
    """A FakeService whose choices run where `routes` says, by their seed."""

    routes: tuple[str, ...] = ("local",)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        route = self.routes[request.sampling.seed % len(self.routes)]
        yield Started(route, queue_s=0.0015, fetch_s=0.02, prefill_s=0.5)
        async with aclosing(FakeService.generate(self, request)) as events:
            async for event in events:
                yield event


def placed(*routes: str, **options: Any) -> Placed:
    service = Placed(**options)
    service.routes = routes
    return service


async def test_headers_say_where_an_answer_comes_from_and_how_long_it_took(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    server = await serve(placed("peer box"))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "Hello, world."
    assert response.headers["x-swarm-route"] == "peer box"
    assert response.headers["Server-Timing"] == "queue;dur=1.5, fetch;dur=20.0, prefill;dur=500.0, decode;dur=250.0"
    async with http.post(server.url + CHAT, json=HELLO | {"stream": True}) as response:
        chunks = await events(response)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "Hello, world."
    assert response.headers["x-swarm-route"] == "peer box"
    assert response.headers["Server-Timing"] == "queue;dur=1.5, fetch;dur=20.0, prefill;dur=500.0"


async def test_routes_of_several_choices_are_named_once_each(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(placed("local", "peer box", "peer box", "peer den"))
    async with http.post(server.url + CHAT, json=HELLO | {"n": 4, "seed": 0}) as response:
        assert len((await response.json())["choices"]) == 4
    assert response.headers["x-swarm-route"] == "local, peer box, peer den"


async def test_a_node_that_tells_no_route_still_tells_times(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService())
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert response.headers["Server-Timing"] == "queue;dur=0.0, prefill;dur=500.0, decode;dur=250.0"
        assert "x-swarm-route" not in response.headers
    async with http.post(server.url + CHAT, json=HELLO | {"stream": True}) as response:
        assert "x-swarm-route" not in response.headers
        assert "Server-Timing" not in response.headers


async def test_the_name_of_a_peer_cannot_break_headers_or_the_log(
    serve: Serve, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarmcpp.api.answers")
    server = await serve(placed("peer a,b\r\nSet-Cookie: x=\x1b[0mé" + "y" * 1000))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert response.status == 200
        assert "Set-Cookie" not in response.headers
        assert response.headers["x-swarm-route"] == ("peer a_b__Set-Cookie: x=_[0m_" + "y" * 1000)[:80]
    assert all(record.getMessage().isprintable() for record in caplog.records)


async def test_a_chain_of_stages_is_told_whole(
    serve: Serve, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarmcpp.api.answers")
    route = "stages alpha 0-12, " + "b" * 24 + " 12-24, " + "c" * 24 + " 24-36, 3 more, delta 72-80"
    server = await serve(placed(route))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert response.headers["x-swarm-route"] == route
    assert any(" route=stages:alpha:0-12,bbb" in record.getMessage() for record in caplog.records)
    async with http.get(server.url + "/metrics") as response:
        assert 'swarmcpp_routed_requests_total{outcome="ok",route="stages"} 1.0' in await response.text()


async def test_one_line_in_the_log_sums_up_each_choice(
    serve: Serve, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarmcpp.api.answers")
    server = await serve(placed("peer my box", script="abc"))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        answer_id = (await response.json())["id"]
    (line,) = caplog.messages
    assert line.startswith(f"request {answer_id} route=peer:my:box queue=0.002s fetch=0.020s prefill=0.500s ttft=")
    assert line.endswith("tok/s prompt=12 cached=0 completion=3 guessed=0/0 finish=stop")


async def test_the_line_of_a_choice_that_failed_says_how(
    serve: Serve, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarmcpp.api.answers")
    server = await serve(placed("local", fail_at=(1, EngineFailed("the engine died"))))
    async with http.post(server.url + CHAT, json=HELLO | {"n": 2}) as response:
        assert response.status == 500
    assert [line.split()[-1] for line in caplog.messages] == ["finish=engine_failed"] * 2


async def test_the_line_of_a_choice_whose_client_left(
    serve: Serve, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarmcpp.api.answers")
    service = FakeService(gate=asyncio.Event())
    server = await serve(service)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(CHAT, HELLO | {"stream": True}))
    await until(lambda: service.running == 1)
    writer.close()
    await until(lambda: bool(caplog.messages))
    assert "route=- queue=0.000s" in caplog.messages[0]
    assert caplog.messages[0].endswith(
        "ttft=- decode=0.0tok/s prompt=12 cached=0 completion=0 guessed=0/0 finish=cancelled"
    )
