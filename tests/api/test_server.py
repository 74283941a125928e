"""Routes, keys, limits and errors over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.errors import BadConfig, EngineFailed, PortInUse, SwarmError
from swarmcpp.testing import FakeService

Serve = Callable[..., Awaitable[RunningServer]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


async def raw(server: RunningServer, data: bytes) -> bytes:
    """Send bytes, and all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of a raw HTTP answer."""
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)["error"]


async def test_models(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService())
    for path in ("/v1/models", "/models"):
        async with http.get(server.url + path) as response:
            assert response.headers["X-Request-Id"].startswith("req_")
            listed = await response.json()
    assert [one["id"] for one in listed["data"]] == ["fake"]
    assert listed["data"][0]["object"] == "model"
    async with http.get(server.url + "/v1/models/fake") as response:
        assert (await response.json())["created"] == 1_700_000_000
    async with http.get(server.url + "/v1/models/some/other") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")
    async with http.head(server.url + "/v1/models") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes(
    serve: Serve, http: aiohttp.ClientSession, method: str, path: str, status: int, code: str
) -> None:
    server = await serve(FakeService())
    async with http.request(method, server.url + path) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"], error["param"]) == (
        status,
        code,
        "invalid_request_error",
        None,
    )
    assert path in error["message"]
    assert ("Allow" in response.headers) == (status == 405)


async def test_health_tells_liveness_from_readiness(serve: Serve, http: aiohttp.ClientSession) -> None:
    service = FakeService(state="starting")
    server = await serve(service, api_key="secret")
    for path, status in (("/health", 200), ("/health/ready", 503)):
        async with http.get(server.url + path) as response:
            body = await response.json()
            assert (response.status, body["state"], body["detail"]) == (status, "starting", "fake engine starting")
    service.state = "ready"
    async with http.get(server.url + "/health/ready") as response:
        assert (response.status, (await response.json())["status"]) == (200, "ok")


async def test_no_model_yet_is_a_503(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(state="starting"))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "not_ready")


@pytest.mark.parametrize(
    "value", [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer secretx", "Bearer \xff"]
)
async def test_api_key_is_required(serve: Serve, http: aiohttp.ClientSession, value: str | None) -> None:
    server = await serve(FakeService(), api_key="secret")
    headers = {} if value is None else {"Authorization": value}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing")):
        async with http.request(method, server.url + path, headers=headers) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
            assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_api_key_opens(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(), api_key="sécret")
    for scheme in ("Bearer", "bearer"):
        async with http.get(server.url + "/v1/models", headers={"Authorization": f"{scheme} sécret"}) as response:
            assert response.status == 200


def test_an_empty_api_key_is_refused() -> None:
    with pytest.raises(BadConfig, match="--api-key"):
        build_app(FakeService(), ServerOptions(api_key=""))


PREFLIGHT = {
    "Origin": "http://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,x-own",
}


async def test_cors_is_off_by_default(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService())
    async with http.options(server.url + CHAT, headers=PREFLIGHT) as response:
        assert response.status == 405
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


async def test_cors_for_listed_origins_only(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(), cors_origins=("http://page.example",), api_key="secret")
    async with http.options(server.url + CHAT, headers=PREFLIGHT) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "http://page.example"
        assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-own"
    headers = {"Origin": "http://page.example", "Authorization": "Bearer secret"}
    async with http.post(server.url + CHAT, json=HELLO | {"stream": True}, headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "http://page.example"
        assert response.headers["Vary"] == "Origin"
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"X-Request-Id", "Retry-After", "x-swarm-route", "Server-Timing"} == set(exposed)
    async with http.options(server.url + CHAT, headers=PREFLIGHT | {"Origin": "http://other.example"}) as response:
        assert response.status == 401
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_cors_for_all(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(), cors_origins=("*",))
    async with http.get(server.url + "/v1/models", headers={"Origin": "null"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]])
async def test_a_body_of_100_mb_is_refused_unread(serve: Serve, expect: list[str]) -> None:
    server = await serve(FakeService())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    # Not one byte of the body is sent: the answer comes from the header alone.
    writer.write(head(CHAT, "Content-Length: 104857600", *expect))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer
    assert json.loads(await reader.readuntil(b"}}"))["error"]["code"] == "body_too_large"
    writer.close()


async def test_expect_continue_goes_on(serve: Serve) -> None:
    server = await serve(FakeService(script="hi"))
    body = json.dumps(HELLO).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head(CHAT, f"Content-Length: {len(body)}", "Expect: 100-continue"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_chunked_body_is_cut_at_the_limit(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(), max_body_bytes=100_000)
    sent = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head(CHAT, "Transfer-Encoding: chunked"))
    answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    while not answer.done():
        writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        sent += 10_000
        await writer.drain()
        assert sent < 100_000_000
    assert (await answer).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_a_gzip_bomb_is_cut_at_the_limit(serve: Serve, http: aiohttp.ClientSession) -> None:
    import gzip

    server = await serve(FakeService(), max_body_bytes=100_000)
    bomb = gzip.compress(b" " * 20_000_000)
    async with http.post(server.url + CHAT, data=bomb, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 413


async def test_a_slow_body_is_a_408_and_disturbs_no_one(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script="ok"), body_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head(CHAT, "Content-Length: 1000") + b"{")
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert response.status == 200
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 60)
    assert error_of(answer)[0] == 408
    assert error_of(answer)[1]["code"] == "request_timeout"
    writer.close()


async def test_a_client_that_leaves_in_mid_body_is_forgotten(
    serve: Serve, until: Until, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve(FakeService())
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head(CHAT, "Content-Length: 1000") + b"{")
    await writer.drain()
    writer.close()
    while True:
        async with http.get(server.url + "/metrics") as response:
            if (
                'swarmcpp_requests_total{endpoint="/v1/chat/completions",outcome="cancelled"} 1.0'
                in await response.text()
            ):
                break
    assert caplog.records == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
        (json.dumps(HELLO | {"stop": ["x"] * 1000}).encode(), "stop"),
        (json.dumps(HELLO | {"max_tokens": 0}).encode(), "max_tokens"),
        (json.dumps(HELLO | {"max_tokens": -5}).encode(), "max_tokens"),
        (json.dumps(HELLO | {"tools": [{}]}).encode(), "tools"),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode(), "messages"),
        (b"[" * 1_000_000, None),
        (b"", None),
    ],
)
async def test_bad_bodies_are_400(serve: Serve, http: aiohttp.ClientSession, body: bytes, param: str | None) -> None:
    service = FakeService()
    server = await serve(service)
    async with http.post(server.url + CHAT, data=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert service.requests == []


async def test_a_prompt_that_is_too_long_says_what_to_do(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(script="x" * 100, ctx_size=10))
    async with http.post(server.url + "/v1/completions", json={"prompt": "0123456789"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    for part in ("10 tokens", "--ctx-size"):
        assert part in error["message"]
    async with http.post(server.url + "/v1/completions", json={"prompt": "012345678"}) as response:
        body = await response.json()
    assert body["choices"][0]["text"] == "x"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_unknown_model_is_404(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService())
    for extra in ({}, {"stream": True}):
        async with http.post(server.url + CHAT, json=HELLO | {"model": "gpt-4"} | extra) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "fake" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after(serve: Serve, http: aiohttp.ClientSession, stream: bool) -> None:
    server = await serve(FakeService(max_running=2, retry_after=2.5))
    async with http.post(server.url + CHAT, json=HELLO | {"n": 3, "stream": stream}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
    assert response.headers["Retry-After"] == "3"
    async with http.post(server.url + CHAT, json=HELLO) as response:
        assert response.status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    serve: Serve, http: aiohttp.ClientSession, stream: bool
) -> None:
    server = await serve(FakeService(fail_at=(0, EngineFailed("the engine died"))))
    async with http.post(server.url + CHAT, json=HELLO | {"stream": stream}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["message"]) == (500, "engine_failed", "the engine died")


async def test_a_bug_is_a_500_that_tells_the_client_nothing(
    serve: Serve, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: object) -> str:
        raise ZeroDivisionError("private detail")

    server = await serve(FakeService(script=script))
    async with http.post(server.url + CHAT, json=HELLO) as response:
        body = await response.text()
    assert response.status == 500
    assert "private" not in body
    assert json.loads(body)["error"]["code"] == SwarmError.code
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.records[0].exc_info is not None


async def test_what_is_not_http_is_a_400_without_a_traceback(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = await serve(FakeService())
    for noise in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET /" + b"x" * 20_000, b"NOT HTTP\r\n\r\n"):
        assert (await raw(server, noise)).startswith(b"HTTP/1.0 400 ")
    assert caplog.records == []


async def test_idle_connections_give_way_to_new_ones(serve: Serve, http: aiohttp.ClientSession) -> None:
    server = await serve(FakeService(), max_connections=20)
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(60)]
    async with http.get(server.url + "/v1/models") as response:
        assert response.status == 200
    # The oldest went first; a close by the server is an end of file or a reset.
    for reader, _ in idle[:39]:
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 60) == b""
    for _, writer in idle:
        writer.close()


async def test_connections_that_work_are_never_dropped_for_new_ones(
    serve: Serve, http: aiohttp.ClientSession, until: Until
) -> None:
    service = FakeService(gate=asyncio.Event())
    server = await serve(service, max_connections=5)
    posts = [asyncio.create_task(http.post(server.url + CHAT, json=HELLO)) for _ in range(5)]
    await until(lambda: service.running == 5)
    status, error = error_of(await raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert (status, error["code"]) == (503, "too_many_connections")
    assert service.gate is not None
    service.gate.set()
    assert [(await post).status for post in posts] == [200] * 5


async def test_a_connection_that_sends_no_request_is_closed(serve: Serve) -> None:
    server = await serve(FakeService(), idle_timeout_s=0.1)
    assert await raw(server, b"GET /health HT") == b""


async def test_a_port_in_use_is_named(serve: Serve) -> None:
    server = await serve(FakeService())
    with pytest.raises(PortInUse, match=f"127.0.0.1:{server.port} .*--port"):
        await start_server(build_app(FakeService(), ServerOptions()), "127.0.0.1", server.port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no such host", 0)])
async def test_addresses_that_cannot_be_bound(host: str, port: int) -> None:
    with pytest.raises(BadConfig, match=r"--(host|port)"):
        await start_server(build_app(FakeService(), ServerOptions()), host, port)


async def test_close_cancels_what_runs(until: Until) -> None:
    service = FakeService(gate=asyncio.Event())
    server = await start_server(build_app(service, ServerOptions()), "127.0.0.1", 0, grace_s=0.05)
    body = json.dumps(HELLO).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head(CHAT, f"Content-Length: {len(body)}") + body)
        await until(lambda: service.running == 1)
        await server.close()
        await until(lambda: len(service.cancelled) == 1)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)
