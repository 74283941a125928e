"""Run one query on a node: prompts to requests, events to a reply or to server-sent events. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from swarmcpp.api import replies
from swarmcpp.api.metrics import Metrics
from swarmcpp.api.openai import Query, too_long
from swarmcpp.api.replies import Choice, ChunkWriter, Head
from swarmcpp.core import Clock, Done, Event, GenerateRequest, Service, Started, TextEvent, Usage
from swarmcpp.errors import BadRequest, Cancelled, EngineFailed, NotReady, SwarmError, UnknownModel

_log = logging.getLogger(__name__)

_EVENTS_PER_CHOICE = 4
"""Events that wait per choice when the client reads slowly; more stay with the service, whose queues are bounded."""


def pick_model(service: Service, name: str | None) -> str:
    """The id of the model that a request means; None means the default. Raises UnknownModel, NotReady."""
    ids = [model.id for model in service.models()]
    if not ids:
        snapshot = service.snapshot()
        raise NotReady(f"no model is loaded ({snapshot.state}: {snapshot.detail}); try again later")
    if name is None:
        return ids[0]
    if name not in ids:
        raise UnknownModel(f"model {name[:80]!r} is not served here; available: {', '.join(ids)}", param="model")
    return name


async def plan(service: Service, query: Query, head: Head) -> tuple[GenerateRequest, ...]:
    """One request per choice, those of one prompt side by side.

    Raises PromptTooLong, BadRequest (an empty prompt), and what the service's tokenizer raises.
    """
    if query.kind == "chat":
        prompts = [await service.tokenize_chat(head.model, query.messages)]
    else:
        prompts = [
            await service.tokenize_text(head.model, prompt) if isinstance(prompt, str) else prompt
            for prompt in query.prompts
        ]
    prediction = query.prediction
    if isinstance(prediction, str):
        prediction = await service.tokenize_text(head.model, prediction, begins=False) if prediction else ()
    ctx_size = service.limits(head.model).ctx_size
    for prompt in prompts:
        _check_length(len(prompt), ctx_size, "messages" if query.kind == "chat" else "prompt")
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        room = ctx_size - len(prompt)
        for choice in range(query.n):
            requests.append(
                GenerateRequest(
                    id=head.id if query.sequences == 1 else f"{head.id}-{len(requests)}",
                    model=head.model,
                    prompt=prompt,
                    max_tokens=room if query.max_tokens is None else min(query.max_tokens, room),
                    sampling=query.sampling_of(choice),
                    stop=query.stop,
                    cache_salt=query.cache_salt,
                    # Nobody answers more than that.
                    prediction=prediction[:ctx_size],
                    drafter=query.drafter,
                    gamma=query.gamma,
                )
            )
    return tuple(requests)


def _check_length(tokens: int, ctx_size: int, param: str) -> None:
    if tokens == 0:
        raise BadRequest("the prompt has no tokens; give some text", param=param)
    if tokens >= ctx_size:
        raise too_long(f"the prompt has {tokens} tokens", ctx_size, param)


class Answer:
    """One query on its way: used once, by one task, through `reply` or `stream`."""

    def __init__(
        self,
        service: Service,
        query: Query,
        head: Head,
        requests: Sequence[GenerateRequest],
        *,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._service = service
        self._query = query
        self._head = head
        self._requests = requests
        self._metrics = metrics
        self._clock = clock
        self._progress = [_Progress() for _ in requests]

    async def reply(self) -> replies.JsonObject:
        """The whole answer. Raises what `Service.generate` raises; a cancelled task cancels the work."""
        texts: list[list[str]] = [[] for _ in self._requests]
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, TextEvent):
                    texts[index].append(event.text)
        dones = self._dones()
        choices = [Choice(index, "".join(text), dones[index]) for index, text in enumerate(texts)]
        return replies.completion(self._head, choices, self._usage(dones))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, [DONE] included. Raises like `reply`; closing it cancels the work."""
        writers = [
            ChunkWriter(self._head, index, with_usage=self._query.include_usage) for index in range(len(self._requests))
        ]
        started = [False] * len(writers)
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, Started):
                    continue
                writer = writers[index]
                data = b"" if started[index] else writer.start()
                started[index] = True
                if isinstance(event, Done):
                    data += writer.finish(event)
                elif event.text:
                    data += writer.text(event.text)
                if data:
                    yield data
        dones = self._dones()
        if self._query.include_usage:
            yield replies.usage_chunk(self._head, self._usage(dones))
        yield replies.DONE_EVENT

    def headers(self) -> dict[str, str]:
        """Where the choices run that have begun by now, and how long the first of them took."""
        return replies.route_headers([progress.started for progress in self._progress], self._progress[0].done)

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        clock = self._clock
        begin = clock()
        outcome = SwarmError.code
        try:
            async with aclosing(merge(await self._open())) as merged:
                async for index, event in merged:
                    progress = self._progress[index]
                    if isinstance(event, Started):
                        progress.started = event
                    elif isinstance(event, Done):
                        progress.done = event
                    elif event.tokens:
                        progress.last = clock()
                        if progress.tokens == 0:
                            progress.first = progress.last
                            self._metrics.first_token(progress.first - begin)
                        progress.tokens += len(event.tokens)
                    yield index, event
            outcome = EngineFailed.code
        except SwarmError as error:
            outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = Cancelled.code
            raise
        finally:
            for request, progress in zip(self._requests, self._progress, strict=True):
                self._account(request, progress, begin, "ok" if progress.done else outcome)

    def _account(self, request: GenerateRequest, progress: _Progress, begin: float, outcome: str) -> None:
        """Count a choice that ended, and say so in one line."""
        done, started = progress.done, progress.started
        decode_s = progress.last - progress.first
        self._metrics.choice(progress.tokens, decode_s, done.usage if done else None)
        if started:
            self._metrics.routed(started.route, outcome)
        times = started or (done.timings if done else None)
        _log.info(
            "request %s route=%s queue=%.3fs fetch=%.3fs prefill=%.3fs ttft=%s decode=%.1ftok/s "
            "prompt=%d cached=%d completion=%d guessed=%d/%d finish=%s",
            request.id,
            replies.route_text(started.route).replace(", ", ",").replace(" ", ":") if started else "-",
            times.queue_s if times else 0.0,
            started.fetch_s if started else 0.0,
            times.prefill_s if times else 0.0,
            f"{progress.first - begin:.3f}s" if progress.tokens else "-",
            (progress.tokens - 1) / decode_s if decode_s > 0 else 0.0,
            len(request.prompt),
            done.usage.cached_tokens if done else 0,
            progress.tokens,
            done.usage.accepted if done else 0,
            done.usage.drafted if done else 0,
            done.reason if done else outcome,
        )

    async def _open(self) -> list[AsyncIterator[Event]]:
        streams: list[AsyncIterator[Event]] = []
        try:
            for request in self._requests:
                streams.append(self._service.generate(request))  # noqa: PERF401 - what is open must be closed on failure
        except BaseException:
            for stream in streams:
                await _close(stream)
            raise
        return streams

    def _dones(self) -> list[Done]:
        dones = [progress.done for progress in self._progress if progress.done]
        if len(dones) != len(self._requests):
            raise EngineFailed("the answer stopped before its end; send the request again")
        return dones

    def _usage(self, dones: Sequence[Done]) -> Usage:
        n = self._query.n
        usages = [done.usage for done in dones]
        return replies.total_usage(usages[start : start + n] for start in range(0, len(usages), n))


@dataclass(slots=True)
class _Progress:
    """What one choice has produced; times in seconds of the injected clock."""

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    started: Started | None = None
    done: Done | None = None


async def merge(streams: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several streams as they come, each with its stream's index; a failure of one ends all.

    Every stream is closed, which cancels its work, before this generator ends or its aclose() returns.
    """
    if len(streams) == 1:
        async with _closing(streams[0]):
            async for event in streams[0]:
                yield 0, event
        return
    # The semaphore bounds the queue; the end of a stream needs no permit, so that it can always be told.
    queue: _Queue = asyncio.Queue()
    permits = asyncio.Semaphore(_EVENTS_PER_CHOICE * len(streams))
    pumps = [asyncio.create_task(_pump(index, stream, queue, permits)) for index, stream in enumerate(streams)]
    try:
        left = len(pumps)
        while left:
            source, item = await queue.get()
            if item is None:
                left -= 1
                await pumps[source]
            else:
                permits.release()
                yield source, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


_Queue = asyncio.Queue[tuple[int, Event | None]]


async def _pump(index: int, stream: AsyncIterator[Event], queue: _Queue, permits: asyncio.Semaphore) -> None:
    try:
        async with _closing(stream):
            async for event in stream:
                await permits.acquire()
                queue.put_nowait((index, event))
    finally:
        # Also after a failure: the reader then awaits this task and gets the exception.
        queue.put_nowait((index, None))


@asynccontextmanager
async def _closing(stream: AsyncIterator[Event]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await _close(stream)


async def _close(stream: AsyncIterator[Event]) -> None:
    # AsyncIterator promises no aclose(); generators have it, and so must whatever holds work that can be cancelled.
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
