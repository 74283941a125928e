"""Clients of a real server: streamed completions that can be watched while they run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from serve_process import DEADLINE_S

Body = dict[str, Any]


@dataclass(slots=True)
class Heard:
    """What one stream has brought so far."""

    pieces: list[str] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    longest_gap_s: float = 0.0
    """Between two pieces of text."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def chars(self) -> int:
        return sum(map(len, self.pieces))


def http_session() -> aiohttp.ClientSession:
    """A session without a bound on connections."""
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


def completion(prompt: str | list[int], max_tokens: int, **more: Any) -> Body:
    """A greedy text completion that only its length ends."""
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


async def listen(http: aiohttp.ClientSession, url: str, body: Body, heard: Heard | None = None) -> Heard:
    """Stream a text completion to its end; `heard` grows meanwhile."""
    heard = Heard() if heard is None else heard
    last = 0.0
    async with http.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.strip():
                continue
            assert not heard.done, f"after [DONE]: {line!r}"
            assert line.startswith(b"data: "), line
            data = line[6:].strip()
            if data == b"[DONE]":
                heard.done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                heard.error = chunk["error"]
                continue
            heard.usage = chunk.get("usage") or heard.usage
            for choice in chunk["choices"]:
                now = time.monotonic()
                if choice["text"]:
                    heard.longest_gap_s = max(heard.longest_gap_s, now - last if last else 0.0)
                    last = now
                    heard.pieces.append(choice["text"])
                heard.finish = choice["finish_reason"] or heard.finish
    return heard


async def complete(http: aiohttp.ClientSession, url: str, body: Body) -> str:
    """The text of a completion that is not streamed."""
    status, answer = await ask(http, url, body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


async def ask(http: aiohttp.ClientSession, url: str, body: Body | bytes) -> tuple[int, Any]:
    """Status and JSON of POST /v1/completions."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    async with http.post(f"{url}/v1/completions", data=data, headers=headers) as response:
        return response.status, await response.json()


async def health(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """GET /health."""
    async with http.get(f"{url}/health") as response:
        found: dict[str, Any] = await response.json()
        return found


async def until(
    condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S, pause_s: float = 0.01
) -> None:
    """Poll what other processes bring about."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        await asyncio.sleep(pause_s)


async def until_health(http: aiohttp.ClientSession, url: str, deadline_s: float = 10.0, **wanted: Any) -> None:
    """Until /health shows `wanted`."""
    end = time.monotonic() + deadline_s
    while not (found := await health(http, url)).items() >= wanted.items():
        assert time.monotonic() < end, f"{wanted} wanted and {found} after {deadline_s:g} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def bystander(url: str, body: Body, text: str, *, longest_gap_s: float) -> AsyncIterator[Heard]:
    """Somebody who streams the same completion again and again while the block runs.

    Afterwards every answer was `text`, and no pause inside one was longer than `longest_gap_s`.
    """
    stop = asyncio.Event()
    current = Heard()

    async def keep_asking() -> None:
        async with http_session() as http:
            while not stop.is_set():
                heard = await listen(http, url, body)
                assert (heard.text, heard.done, heard.error) == (text, True, None)
                current.longest_gap_s = max(current.longest_gap_s, heard.longest_gap_s)
                current.pieces.append(heard.text)

    task = asyncio.create_task(keep_asking())
    try:
        await until(lambda: bool(current.pieces) or task.done(), "the bystander's first answer")
        yield current
    finally:
        stop.set()
        await asyncio.wait_for(task, DEADLINE_S)
    assert current.longest_gap_s < longest_gap_s
