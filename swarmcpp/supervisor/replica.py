"""What runs requests on this machine, and the first of it: the replica, a whole model in one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from swarmcpp.config import Config
from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import Cancelled, NotReady, PromptTooLong, QueueFull
from swarmcpp.peers import Load
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.runner import LOCAL, MAX_RETRY_AFTER_S, Fetch, Fetched
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.wire.engine import EngineOptions


class LocalReplica:
    """The engine of this node, as a place where requests run."""

    def __init__(self, config: Config, options: EngineOptions, supervisor: EngineSupervisor) -> None:
        self._queue_size = config.server.queue_size
        self._options = options
        self._fetching = 0
        self._backlog = 0
        self.supervisor = supervisor

    @property
    def status(self) -> EngineStatus:
        """Of the engine."""
        return self.supervisor.status

    @property
    def stats(self) -> EngineStats:
        """Of the engine."""
        return self.supervisor.stats

    @property
    def ctx_size(self) -> int:
        """Tokens of a slot."""
        return self.supervisor.status.ctx_size or self._options.ctx_size

    @property
    def slots(self) -> int:
        """Requests that run side by side."""
        return self._options.slots

    @property
    def ahead(self) -> int:
        """Requests that run, wait or fetch."""
        return self.supervisor.active + self._fetching

    @property
    def usable(self) -> bool:
        """Whether requests can be submitted, if only for an engine that is starting."""
        return self.supervisor.status.state not in ("failed", "stopped")

    def route(self, request_id: str) -> str:
        """See `Runner`."""
        return LOCAL

    def load(self, ttft_s: float = 0.0) -> Load:
        """How busy it is; requests that wait for blocks of peers wait like others."""
        stats = self.supervisor.stats
        waiting = max(0, self.ahead - stats.slots_busy)
        return Load(stats.slots_busy, waiting, stats.prefill_tps, stats.decode_tps, ttft_s, self._backlog)

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """`request` with a limit of tokens that fits. Raises PromptTooLong, QueueFull, NotReady."""
        if not self.usable:
            raise NotReady(self.supervisor.status.detail or "the engine is not running")
        if len(request.prompt) >= self.ctx_size:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens and a slot holds {self.ctx_size} with the answer; "
                f"shorten it, or start swarmcpp with a larger --ctx-size",
                param="messages",
            )
        waiting = self.ahead - self.slots
        if waiting >= self._queue_size:
            raise QueueFull(
                f"all {self.slots} slots are busy and {waiting} requests wait; try again later",
                retry_after=min(MAX_RETRY_AFTER_S, 1.0 + waiting / max(1, self.slots)),
            )
        return replace(request, max_tokens=min(request.max_tokens, self.ctx_size - len(request.prompt)))

    async def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        """Run an admitted request; closing the generator cancels it at once.

        Raises NotReady, EngineFailed, and Cancelled when `request.deadline_s` has passed.
        """
        try:
            async with asyncio.timeout(request.deadline_s), aclosing(self._tokens(request, fetch)) as parts:
                async for part in parts:
                    yield part
        except TimeoutError:
            raise Cancelled(f"the request took longer than its limit of {request.deadline_s:g} s") from None

    async def _tokens(self, request: GenerateRequest, fetch: Fetch | None) -> AsyncGenerator[TokenPart, None]:
        backlog = len(request.prompt) + len(request.generated)
        self._backlog += backlog
        try:
            async with aclosing(self._run(request, fetch)) as parts:
                async for part in parts:
                    self._backlog -= backlog
                    backlog = 0
                    yield part
        finally:
            self._backlog -= backlog

    async def _run(self, request: GenerateRequest, fetch: Fetch | None) -> AsyncGenerator[TokenPart, None]:
        fetched, fetch_s = Fetched(), 0.0
        if fetch:
            clock = asyncio.get_running_loop().time
            begun = clock()
            self._fetching += 1
            try:
                fetched = await fetch(request)
            finally:
                self._fetching -= 1
            fetch_s = clock() - begun
        stream = self.supervisor.submit(request)
        try:
            async for out in stream:
                # What was computed while the rest came is in the arena too, and was not cached before.
                cached = max(0, out.cached_tokens - fetched.computed)
                tier = ("peer" if fetched and out.tier == "arena" else out.tier) if cached else ""
                yield TokenPart((out.token,), out.finish, cached, tier, out.queue_s, out.prefill_s, fetch_s=fetch_s)
                fetch_s = 0.0
        finally:
            if not stream.finished:
                self.supervisor.cancel(stream)
