"""What clients get wrong while the server runs: each gets one clear answer, and the others notice nothing."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from serve_client import Heard, ask, bystander, complete, completion, listen, until, until_health
from serve_process import ServeProcess
from trained_models import BEGINNINGS, TRAINED

pytestmark = pytest.mark.e2e

LONGEST_GAP_S = 2.0
"""Between two pieces of text of somebody who has done nothing wrong: far above a step, far below a stall."""

MIB = 1 << 20


@pytest.fixture(autouse=True)
async def somebody(trained_server: ServeProcess, http: aiohttp.ClientSession) -> AsyncIterator[Heard]:
    """Streams all the while, and hears the same text each time."""
    body = completion(BEGINNINGS[0], 100)
    text = await complete(http, trained_server.url, body)
    async with bystander(trained_server.url, body, text, longest_gap_s=LONGEST_GAP_S) as heard:
        yield heard
        answers = len(heard.pieces)
        await until(lambda: len(heard.pieces) > answers, "another answer for the bystander")
    await until_health(http, trained_server.url, slots_busy=0, queued=0, restarts=0)


VALID = {"prompt": "Once upon a time", "max_tokens": 5}


BAD_VALUES: tuple[tuple[dict[str, object], int, str, str | None, str], ...] = (
    ({"prompt": "word " * 3000}, 400, "context_length_exceeded", "prompt", "2048"),
    ({"prompt": [5] * 2048}, 400, "context_length_exceeded", "prompt", "2048"),
    ({"prompt": [3072]}, 400, "invalid_request", "prompt", "0 to 3071"),
    ({"prompt": []}, 400, "invalid_request", "prompt", "prompt"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens", "from 1"),
    ({"max_tokens": -1}, 400, "invalid_request", "max_tokens", "from 1"),
    ({"stop": ["x" * 9] * 1000}, 400, "invalid_request", "stop", "1000 strings; at most 16"),
    ({"temperature": float("nan")}, 400, "invalid_request", None, "NaN"),
    ({"temperature": -1}, 400, "invalid_request", "temperature", "from 0"),
    ({"temperature": "hot"}, 400, "invalid_request", "temperature", "number"),
    ({"model": "gpt-7"}, 404, "model_not_found", "model", TRAINED),
    ({"logprobs": 3}, 400, "unsupported_field", "logprobs", "not supported"),
    ({"tools": [{}]}, 400, "unsupported_field", "tools", "not supported"),
    ({"n": 17}, 400, "invalid_request", "n", "from 1 to 16"),
    ({"nonsense": 1}, 400, "unsupported_field", "nonsense", "supported fields"),
)


async def test_bad_values(trained_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    for change, status, code, param, says in BAD_VALUES:
        for stream in (False, True):
            body = json.dumps({**VALID, **change, "stream": stream}).encode()
            found, answer = await ask(http, trained_server.url, body)
            assert found == status, change
            error = answer["error"]
            assert (error["code"], error["param"]) == (code, param), change
            assert says in error["message"], change
            assert "\n" not in error["message"]
            assert len(error["message"]) < 1000


async def test_bodies_that_are_no_requests(trained_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    for body in (b'{"prompt": "\xff\xfe"}', b"", b"{", b"[]", b"\0" * 99, b'{"prompt":' + b"[" * 100_000):
        status, answer = await ask(http, trained_server.url, body)
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
        assert "body" in answer["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_100_megabytes(
    trained_server: ServeProcess, http: aiohttp.ClientSession, chunked: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * MIB

    before = psutil.Process(trained_server.pid).memory_info().rss
    data = pieces() if chunked else io.BytesIO(b"x" * (100 * MIB))
    async with http.post(f"{trained_server.url}/v1/completions", data=data) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"
    assert psutil.Process(trained_server.pid).memory_info().rss - before < 50 * MIB


async def test_a_body_of_100_megabytes_after_asking(trained_server: ServeProcess) -> None:
    """As curl sends it: the client waits for the server's word, and never sends the body."""
    async with raw(trained_server) as (reader, writer):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")


# -- slow and idle clients ---------------------------------------------------------------------------------------


class raw:
    """A plain connection; `receive_buffer` bytes bound what the kernel takes for it."""

    def __init__(self, server: ServeProcess, receive_buffer: int = 0) -> None:
        self._address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
        self._receive_buffer = receive_buffer

    async def __aenter__(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        connection.setblocking(False)
        if self._receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        await asyncio.get_running_loop().sock_connect(connection, self._address)
        # The reader's limit bounds what asyncio reads ahead.
        reader, self._writer = await asyncio.open_connection(sock=connection, limit=1024)
        return reader, self._writer

    async def __aexit__(self, *_error: object) -> None:
        self._writer.transport.abort()


def request_bytes(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data


async def test_1000_idle_connections(trained_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    allow_files(2000)
    connections = [raw(trained_server) for _ in range(1000)]
    try:
        await asyncio.gather(*(connection.__aenter__() for connection in connections))
        await until(lambda: sockets_of(trained_server) > 1000, "all are accepted", pause_s=0.1)
        status, answer = await ask(http, trained_server.url, completion(BEGINNINGS[0], 5))
        assert (status, answer["usage"]["completion_tokens"]) == (200, 5)
    finally:
        for connection in connections:
            await connection.__aexit__()
    await until(lambda: sockets_of(trained_server) < 100, "all are closed", pause_s=0.1)


def sockets_of(server: ServeProcess) -> int:
    return len(psutil.Process(server.pid).net_connections("tcp"))


def allow_files(count: int) -> None:
    """Let this process have as many open files, or skip."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"no more than {hard} open files are allowed here")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def test_a_client_that_sends_byte_by_byte(trained_server: ServeProcess) -> None:
    async with raw(trained_server) as (reader, writer):
        writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request_bytes(completion(BEGINNINGS[0], 5)):
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.005)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'"completion_tokens":5' in answer


async def test_a_client_that_reads_a_byte_a_second(
    trained_server: ServeProcess, http: aiohttp.ClientSession, somebody: Heard
) -> None:
    # Four streams of 2000 tokens with all that is around them are more than the buffers of both kernels hold.
    body = completion(BEGINNINGS[0], 2000, n=4, stream=True)
    async with raw(trained_server, receive_buffer=4096) as (reader, writer):
        writer.write(request_bytes(body))
        answers, seconds = len(somebody.pieces), 0
        while seconds < 3 or len(somebody.pieces) < answers + 2:
            assert len(await reader.read(1)) == 1
            await asyncio.sleep(1.0)
            seconds += 1
            heard = await listen(http, trained_server.url, completion(BEGINNINGS[1], 20))
            assert heard.done
        assert seconds < 60, "an answer of the bystander takes a second or two"


async def test_something_that_is_not_http(trained_server: ServeProcess) -> None:
    async with raw(trained_server) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)))
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
