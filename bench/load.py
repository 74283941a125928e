"""A load generator for any server with OpenAI's /v1/completions: streams answers and keeps the time of every event."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

Prompt = Sequence[int] | str


class BadReply(RuntimeError):
    """The server answered with an error, or with something that is no completion stream."""


class CachedPrompt(BadReply):
    """The server took part of a prompt from a cache, so its times are not those of computing it."""


def cached_tokens(usage: Mapping[str, Any]) -> int:
    """Prompt tokens that `usage` says were not computed; 0 when the server does not tell."""
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


@dataclass(frozen=True, slots=True)
class Moment:
    """One event that carried text: `at` in seconds of time.perf_counter."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One streamed answer. Times are seconds of time.perf_counter.

    `moments` may be fewer than `completion_tokens`: a server may put several tokens in one event, or hold an event
    back while a character is incomplete. Totals therefore come from the server's usage, never from the events.
    """

    started: float
    moments: tuple[Moment, ...]
    first: float | None
    """When the first token showed: the first text, or the end of an answer whose text stayed empty."""
    finished: float
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    drafted: int = 0
    """Tokens that were guessed for it, of which `accepted` were right; 0 where the server does not tell."""
    accepted: int = 0

    @property
    def text(self) -> str:
        return "".join(moment.text for moment in self.moments)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; infinite when none came."""
        return float("inf") if self.first is None else self.first - self.started


def longest_pause(times: Sequence[float], since: float, until: float) -> float:
    """Longest time between neighbours in `times` (ascending) that overlaps [since, until], in seconds.

    A pause that began before `since` or ended after `until` counts in full: the user waited all of it. After the
    last event nothing is waited for, so there is no pause.
    """
    overlapping = (b - a for a, b in pairwise(times) if b > since and a < until)
    return max(overlapping, default=0.0)


def throughput(replies: Sequence[Reply]) -> float:
    """All completion tokens / wall time from the first request's start to the last answer's end, tokens/s."""
    if not replies:
        return 0.0
    wall = max(r.finished for r in replies) - min(r.started for r in replies)
    return sum(r.completion_tokens for r in replies) / wall


def common_prefix(a: str, b: str) -> int:
    """Characters that `a` and `b` share from their start."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def random_prompt(rng: random.Random, count: int, vocab: range) -> list[int]:
    """`count` token ids drawn from `vocab`: no two calls share a prefix that a prompt cache could use."""
    return [rng.randrange(vocab.start, vocab.stop) for _ in range(count)]


class EventParser:
    """Cuts a server-sent event stream, fed in any pieces, into the payloads of its `data:` fields."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, piece: bytes) -> list[str]:
        """Payloads of the `data:` lines that `piece` completes. Other fields and comments are dropped."""
        *lines, self._pending = (self._pending + piece).split(b"\n")
        texts = (line.rstrip(b"\r") for line in lines)
        return [text[5:].removeprefix(b" ").decode() for text in texts if text.startswith(b"data:")]


def request_body(prompt: Prompt, max_tokens: int, model: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A greedy, streamed completion of exactly `max_tokens` tokens."""
    return {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


class _Collector:
    """Builds a Reply from a stream's payloads."""

    def __init__(self, started: float, on_text: Callable[[], None] | None) -> None:
        self.started = started
        self.moments: list[Moment] = []
        self.first: float | None = None
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.ended = False
        self._on_text = on_text

    def take(self, payload: str, now: float) -> None:
        if payload == "[DONE]":
            self.ended = True
            return
        message = json.loads(payload)
        if "error" in message:
            raise BadReply(f"the server ended the stream with {payload[:300]}")
        self.usage = message.get("usage") or self.usage
        for choice in message.get("choices", ()):
            text, reason = choice.get("text") or "", choice.get("finish_reason")
            self.finish_reason = reason or self.finish_reason
            if (text or reason) and self.first is None:
                self.first = now
            if text:
                self.moments.append(Moment(now, text))
                if self._on_text is not None:
                    self._on_text()

    def reply(self, finished: float) -> Reply:
        details = self.usage.get("completion_tokens_details") or {}
        accepted, rejected = (details.get(f"{which}_prediction_tokens") or 0 for which in ("accepted", "rejected"))
        return Reply(
            started=self.started,
            moments=tuple(self.moments),
            first=self.first,
            finished=finished,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            completion_tokens=self.usage.get("completion_tokens", len(self.moments)),
            finish_reason=self.finish_reason,
            drafted=accepted + rejected,
            accepted=accepted,
        )


@dataclass(frozen=True, slots=True)
class Client:
    """One server under load. `extra` is added to every request's body."""

    session: aiohttp.ClientSession
    base_url: str
    model: str = "default"
    extra: Mapping[str, Any] | None = None
    cached: bool = False
    """Answers may come from a cache of prompts: that is what is measured."""

    async def complete(self, prompt: Prompt, max_tokens: int, on_text: Callable[[], None] | None = None) -> Reply:
        """Stream one greedy answer to its end; `on_text` is called after every event that carries text.

        Cancelling the task closes the connection, which is how a client leaves. Raises BadReply, and its
        CachedPrompt when any of the prompt was not computed and `cached` does not allow that.
        """
        body = request_body(prompt, max_tokens, self.model, self.extra or {})
        collector = _Collector(time.perf_counter(), on_text)
        parser = EventParser()
        async with self.session.post(f"{self.base_url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise BadReply(f"{self.base_url} answered {response.status}: {(await response.text())[:300]}")
            async for piece in response.content.iter_any():
                now = time.perf_counter()
                for payload in parser.feed(piece):
                    collector.take(payload, now)
        if not collector.ended:
            raise BadReply(f"{self.base_url} closed the stream without [DONE]")
        if (cached := cached_tokens(collector.usage)) and not self.cached:
            raise CachedPrompt(
                f"{self.base_url} took {cached} of {collector.usage.get('prompt_tokens')} prompt tokens from a cache; "
                "measure with prompts and a data directory that are new to it"
            )
        return collector.reply(time.perf_counter())

    async def together(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Reply]:
        """All `prompts` at once; the answers in the same order."""
        return list(await asyncio.gather(*(self.complete(prompt, max_tokens) for prompt in prompts)))


class Watched:
    """A request that runs in the background, whose events others can wait for."""

    def __init__(self, client: Client, prompt: Prompt, max_tokens: int) -> None:
        self.times: list[float] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(client.complete(prompt, max_tokens, self._saw))

    def _saw(self) -> None:
        self.times.append(time.perf_counter())
        self._news.set()

    async def wait_events(self, count: int, timeout: float = 300.0) -> None:
        """Until `count` events came in all. Raises what the request raised, BadReply when it ended earlier."""
        async with asyncio.timeout(timeout):
            while len(self.times) < count:
                if self.task.done():
                    self.task.result()
                    raise BadReply(f"the answer ended after {len(self.times)} events, {count} were expected")
                self._news.clear()
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({news, self.task}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()

    async def leave(self) -> float:
        """Disconnect; the moment at which that began."""
        left = time.perf_counter()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        return left


def new_session() -> aiohttp.ClientSession:
    """A session without limits of its own: the server decides. Each request has its own connection."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
