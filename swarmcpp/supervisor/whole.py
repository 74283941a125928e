"""A node's side of the engine that answers whole requests: it resumes what ran on one that died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Unpack

from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import EngineFailed, NotReady, SwarmError, WireError, revive
from swarmcpp.kv.cache import Lease
from swarmcpp.supervisor.incarnation import Incarnation
from swarmcpp.supervisor.process import EngineProcess, ProcessOptions
from swarmcpp.wire.engine import (
    BlocksFull,
    BlocksStored,
    Cancel,
    EngineOptions,
    Forget,
    FromEngine,
    StepOut,
    Submit,
)

logger = logging.getLogger(__name__)

CHECK_S = 10.0
"""How long the block of a finished check is waited for."""


class EngineStream:
    """One request on the engine, across as many engine processes as it takes.

    `async for` yields what the engine tells of it, in order, each token once; after the part with `finish` it ends. An
    error that ends the request is raised instead. Not more than `request.max_tokens` entries are ever buffered.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.serial = 0
        self.tokens: list[int] = list(request.generated)
        self.finished = False
        self.deaths = 0
        self.ready: deque[TokenPart] = deque()
        self.error: SwarmError | None = None
        self.lease: Lease | None = None
        self.chain: tuple[tuple[int, ...], str] | None = None
        """Tokens and salt whose blocks are loaded in place of the request's own; see `EngineSupervisor.recompute`."""
        self.wake = asyncio.Event()

    def push(self, part: TokenPart) -> None:
        """Take tokens from the engine."""
        self.deaths = 0
        self.tokens += part.ids
        self.ready.append(part)
        self.finished = part.finish is not None
        self.wake.set()

    def fail(self, error: SwarmError) -> None:
        """End the request with `error`."""
        self.error = error
        self.finished = True
        self.wake.set()

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> TokenPart:
        while not self.ready:
            if self.error is not None:
                raise self.error
            if self.finished:
                raise StopAsyncIteration
            self.wake.clear()
            await self.wake.wait()
        return self.ready.popleft()


@dataclass(slots=True)
class _Check:
    """A block that is computed again, see `EngineSupervisor.recompute`."""

    key: bytes = b""
    stored: asyncio.Event = field(default_factory=asyncio.Event)


class EngineSupervisor(EngineProcess):
    """Keeps one engine alive, and the requests that run there. Every method runs on the event loop of `start`."""

    def __init__(self, options: EngineOptions, **how: Unpack[ProcessOptions]) -> None:
        """See `EngineProcess`."""
        super().__init__(options, **how)
        self._streams: dict[int, EngineStream] = {}
        self._checks: dict[str, _Check] = {}
        """By salt."""
        self._idle = EngineStats(slots=options.slots, slots_busy=0, waiting=0)
        self.stats = self._idle

    # -- messages ------------------------------------------------------------------------------------------------

    def _handle(self, incarnation: Incarnation, message: FromEngine, frame: bytes | None) -> None:
        match message:
            case StepOut():
                self._on_step(message)
            case BlocksFull():
                self._on_full(incarnation, message)
            case BlocksStored():
                self._on_stored(incarnation, message)

    def _serve(self, incarnation: Incarnation) -> None:
        # One by one: should this engine fail in between, the next one finds the rest.
        for waiting, stream in list(self._streams.items()):
            try:
                self._place(incarnation, stream)
            except WireError as error:
                stream.fail(error)
            del self._streams[waiting]

    def _on_step(self, step: StepOut) -> None:
        self.stats = step.stats
        if step.tokens:
            self._deaths = 0
        for out in step.tokens:
            stream = self._streams.get(out.serial)
            if stream is None:
                continue
            self._end_lease(stream, out.part)
            stream.push(out.part)
            if out.part.finish is not None:
                del self._streams[out.serial]
        for refusal in step.refused:
            if stream := self._streams.pop(refusal.serial, None):
                self._end_lease(stream)
                stream.fail(revive(refusal.code, refusal.message))

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Requests that are waiting or running."""
        return len(self._streams)

    def submit(self, request: GenerateRequest, *, chain: tuple[tuple[int, ...], str] | None = None) -> EngineStream:
        """Queue a request; while an engine restarts it waits for the next one. Raises NotReady, WireError.

        `chain`: tokens and salt whose blocks are loaded in place of the request's own.
        """
        if self.status.state in ("failed", "stopped"):
            raise NotReady(self.status.detail or "the engine is not running")
        stream = EngineStream(request)
        stream.chain = chain
        if self._incarnation and self.status.state == "ready":
            self._place(self._incarnation, stream)
        else:
            self._serial += 1
            self._streams[self._serial] = stream
        return stream

    def _place(self, incarnation: Incarnation, stream: EngineStream) -> None:
        """Give a stream to this engine under a new serial, from where it stands."""
        self._serial += 1
        stream.serial = self._serial
        request = replace(stream.request, generated=tuple(stream.tokens))
        if self.cache:
            self._end_lease(stream)
            chain = stream.chain or ((*request.prompt, *request.generated), request.cache_salt)
            stream.lease = self.cache.lease(*chain)
        blocks = stream.lease.refs if stream.lease else ()
        try:
            incarnation.link.send(Submit(serial=self._serial, request=request, blocks=blocks))
        except WireError:
            self._end_lease(stream)
            raise
        except EngineFailed:
            # It has just died, which is noticed a moment later, or reads no more. The next one finds the stream.
            with contextlib.suppress(ProcessLookupError):
                incarnation.process.kill()
        self._streams[self._serial] = stream

    def cancel(self, stream: EngineStream) -> None:
        """Drop a request at once; a prompt in the middle of a step is aborted. Finished streams are ignored."""
        stream.finished = True
        self._streams = {serial: other for serial, other in self._streams.items() if other is not stream}
        self._end_lease(stream)
        if stream.serial and self._incarnation and self.status.state == "ready":
            with contextlib.suppress(EngineFailed):
                self._incarnation.link.send(Cancel(serial=stream.serial))
            self._incarnation.abort.abort_prompt(stream.serial)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _end_lease(self, stream: EngineStream, part: TokenPart | None = None) -> None:
        """The engine needs a stream's blocks no more; `part`, with its first token, tells which of them were sound."""
        lease, stream.lease = stream.lease, None
        if lease is None or self.cache is None:
            return
        told = part is not None and (part.tier == "arena" or part.bad_blocks)
        self.cache.release(lease, part.cached_tokens if told and part else None)

    def _on_full(self, incarnation: Incarnation, full: BlocksFull) -> None:
        if self.cache is None:
            return
        check = self._checks.get(full.salt)
        if check:
            grant, key = self.cache.grant_check(full.tokens, full.salt)
            if grant.grants:
                check.key = key
            else:
                check.stored.set()
        else:
            grant = self.cache.grant(full.tokens, full.salt)
        # Even when nothing is wanted: the engine keeps the slot for the answer.
        self._grant(incarnation, full.serial, grant)

    def _on_stored(self, incarnation: Incarnation, stored: BlocksStored) -> None:
        grant = self._enter(incarnation, stored)
        for check in self._checks.values():
            if grant and any(block.key == check.key for block in grant.blocks.values()):
                check.stored.set()

    async def recompute(self, tokens: tuple[int, ...], salt: str, block_tokens: int) -> bytes | None:
        """Compute the last full block of `tokens` again, on top of the blocks before it that the arena has.

        `tokens` has at least one token after that block. Returns the key under which the arena holds the result until
        the caller drops it; None when that could not be done. Raises NotReady, EngineFailed.
        """
        if self.cache is None:
            return None
        before = (len(tokens) // block_tokens - 1) * block_tokens
        # A salt of its own: nothing else is read from what this computes, and it is stored under a key of its own.
        own_salt = f"check {secrets.token_hex(16)}"
        request = GenerateRequest(own_salt, "", tokens, 1, cache_salt=own_salt)
        check = self._checks[own_salt] = _Check()
        # The result must not take the place of the block that it is for, which as a copy goes before all others.
        cache, lease = self.cache, self.cache.lease(tokens, salt)
        try:
            stream = self.submit(request, chain=(tokens[: before + 1], salt))
            try:
                async for _ in stream:
                    pass
                async with asyncio.timeout(CHECK_S):
                    await check.stored.wait()
            except TimeoutError:
                return None
            finally:
                if not stream.finished:
                    self.cancel(stream)
        finally:
            cache.release(lease)
            del self._checks[own_salt]
        return check.key or None

    def forget(self) -> None:
        """Let the engine use none of the KV that it has, after blocks that it may have loaded were found to be wrong.

        Drop them from the cache first.
        """
        if self._incarnation and self.status.state == "ready":
            # A dead engine has forgotten.
            with contextlib.suppress(EngineFailed):
                self._incarnation.link.send(Forget())

    # -- deaths --------------------------------------------------------------------------------------------------

    def _gone(self) -> None:
        self.stats = self._idle
        for stream in self._streams.values():
            self._end_lease(stream)

    def _count_death(self, limit: int, reason: str) -> None:
        for serial, stream in list(self._streams.items()):
            stream.deaths += 1
            if stream.deaths >= limit:
                del self._streams[serial]
                stream.fail(EngineFailed(f"the engine died {stream.deaths} times on this request ({reason})"))

    def _fail_all(self, error: SwarmError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
