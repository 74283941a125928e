"""The load generator: parsing, arithmetic, and real HTTP against a small server."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from bench.load import (
    BadReply,
    CachedPrompt,
    Client,
    EventParser,
    Moment,
    Reply,
    Watched,
    common_prefix,
    longest_pause,
    new_session,
    random_prompt,
    throughput,
)

payloads = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n")).filter(lambda t: not t.startswith(" ")), max_size=8
)


@given(payloads, st.data())
def test_parser_gives_the_payloads_however_the_stream_is_cut(texts: list[str], data: st.DataObject) -> None:
    stream = b": ping\n\n" + b"".join(f"event: x\r\ndata: {text}\r\n\r\n".encode() for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    edges = [0, *cuts, len(stream)]
    parser = EventParser()
    found = [text for a, b in pairwise(edges) for text in parser.feed(stream[a:b])]
    assert found == texts


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_common_prefix_is_the_longest(a: str, b: str) -> None:
    shared = common_prefix(a, b)
    assert a[:shared] == b[:shared]
    assert shared == min(len(a), len(b)) or a[shared] != b[shared]


@pytest.mark.parametrize(
    ("since", "until", "pause"),
    [
        (2.5, 3.0, 6.0),  # inside one pause: all of it was waited
        (0.0, 1.5, 1.0),
        (0.0, 20.0, 6.0),
        (8.5, 8.8, 1.0),
        (9.5, 20.0, 0.0),  # after the last event nothing is waited for
    ],
)
def test_longest_pause_counts_pauses_that_overlap(since: float, until: float, pause: float) -> None:
    assert longest_pause([0.0, 1.0, 2.0, 8.0, 9.0], since, until) == pause


def reply(started: float, finished: float, tokens: int) -> Reply:
    return Reply(started, (Moment(finished, "x"),), finished, finished, 3, tokens, "length")


def test_throughput_is_all_tokens_over_wall_time() -> None:
    """Two users that took turns are no faster than one: rates are never added up."""
    assert throughput([reply(0.0, 5.0, 10), reply(5.0, 10.0, 10)]) == 2.0
    assert throughput([reply(0.0, 5.0, 10), reply(0.0, 5.0, 10)]) == 4.0
    assert throughput([]) == 0.0


def test_random_prompts_stay_in_the_vocabulary_and_differ() -> None:
    rng = random.Random(1)
    first, second = (random_prompt(rng, 64, range(300, 400)) for _ in range(2))
    assert first != second
    assert set(first) | set(second) <= set(range(300, 400))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(text: str, reason: str | None = None, **more: object) -> bytes:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": reason}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def client_of(handler: Handler) -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    async with TestServer(app) as server, new_session() as session:
        yield Client(session, str(server.make_url("")).rstrip("/"), "m", {"cache_prompt": False})


async def with_client(handler: Handler, use: Callable[[Client], Awaitable[None]]) -> None:
    async for client in client_of(handler):
        await use(client)


async def test_counts_come_from_usage_and_the_request_is_greedy() -> None:
    seen: dict[str, object] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.update(await request.json())
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event("") + event("a b") + event("", "length"))
        usage = {"prompt_tokens": 3, "completion_tokens": 7}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def use(client: Client) -> None:
        got = await client.complete([1, 2, 3], 7)
        assert (got.text, got.prompt_tokens, got.completion_tokens, got.finish_reason) == ("a b", 3, 7, "length")
        assert got.started < got.started + got.ttft <= got.finished
        assert len(got.moments) == 1

    await with_client(handler, use)
    assert seen["prompt"] == [1, 2, 3]
    assert (seen["temperature"], seen["ignore_eos"], seen["max_tokens"], seen["cache_prompt"]) == (0, True, 7, False)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"nope", 503, "answered 503: nope"),
        (event("a"), 200, "without \\[DONE\\]"),
        (b'data: {"error": {"message": "lost"}}\n\n', 200, "lost"),
    ],
)
async def test_a_broken_answer_is_an_error_and_never_a_sample(body: bytes, status: int, message: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    async def use(client: Client) -> None:
        with pytest.raises(BadReply, match=message):
            await client.complete("hello", 4)

    await with_client(handler, use)


async def test_a_prompt_from_a_cache_is_never_a_sample() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        usage = {"prompt_tokens": 4096, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4032}}
        body = event("a", "length") + b"data: " + json.dumps({"choices": [], "usage": usage}).encode()
        return web.Response(body=body + b"\n\ndata: [DONE]\n\n")

    async def use(client: Client) -> None:
        with pytest.raises(CachedPrompt, match="4032 of 4096"):
            await client.complete([1] * 4096, 1)

    await with_client(handler, use)


async def test_a_watched_request_shows_events_and_leaving_disconnects() -> None:
    more, gone = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event("a"))
        await more.wait()
        try:
            while True:
                await response.write(event("b"))
                await asyncio.sleep(0.001)
        except (ConnectionError, asyncio.CancelledError):
            gone.set()
            raise

    async def use(client: Client) -> None:
        watched = Watched(client, [1], 100)
        await watched.wait_events(1, timeout=10)
        assert len(watched.times) == 1
        more.set()
        await watched.wait_events(5, timeout=10)
        left = await watched.leave()
        assert left > watched.times[0]
        async with asyncio.timeout(60):
            await gone.wait()

    await with_client(handler, use)


async def test_waiting_for_events_of_an_answer_that_ended_fails_at_once() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=event("a", "stop") + b"data: [DONE]\n\n")

    async def use(client: Client) -> None:
        watched = Watched(client, [1], 100)
        with pytest.raises(BadReply, match="after 1 events, 3 were expected"):
            await watched.wait_events(3, timeout=10)

    await with_client(handler, use)


def test_a_reply_without_tokens_never_looks_fast() -> None:
    assert math.isinf(Reply(0.0, (), None, 1.0, 3, 0, None).ttft)
