"""What runs requests on this machine, and the first of it: the replica, a whole model in one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from swarmcpp.config import Config
from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import NotReady
from swarmcpp.peers import Load
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.runner import LOCAL, Fetch, Fetched, admitted, deadline
from swarmcpp.supervisor.whole import EngineStream, EngineSupervisor
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
        """See `Runner`."""
        if not self.usable:
            raise NotReady(self.supervisor.status.detail or "the engine is not running")
        return admitted(request, self, self._queue_size)

    async def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        """Run an admitted request; closing the generator cancels it at once.

        Raises NotReady, EngineFailed, and Cancelled when `request.deadline_s` has passed.
        """
        backlog = len(request.prompt) + len(request.generated)
        self._backlog += backlog
        stream: EngineStream | None = None
        try:
            async with deadline(request.deadline_s):
                fetched, fetch_s = await self._fetch(request, fetch)
                stream = self.supervisor.submit(request)
                async for part in stream:
                    self._backlog -= backlog
                    backlog = 0
                    yield _with_fetched(part, fetched, fetch_s) if fetch_s or fetched else part
                    fetched, fetch_s = Fetched(), 0.0
        finally:
            self._backlog -= backlog
            if stream and not stream.finished:
                self.supervisor.cancel(stream)

    async def _fetch(self, request: GenerateRequest, fetch: Fetch | None) -> tuple[Fetched, float]:
        """What peers had of a request, and the seconds that it took to come."""
        if fetch is None:
            return Fetched(), 0.0
        clock = asyncio.get_running_loop().time
        begun = clock()
        self._fetching += 1
        try:
            return await fetch(request), clock() - begun
        finally:
            self._fetching -= 1


def _with_fetched(first: TokenPart, fetched: Fetched, fetch_s: float) -> TokenPart:
    # What was computed while the rest came is in the arena too, and was not cached before.
    cached = max(0, first.cached_tokens - fetched.computed)
    tier = ("peer" if fetched and first.tier == "arena" else first.tier) if cached else ""
    return msgspec.structs.replace(first, cached_tokens=cached, tier=tier, fetch_s=fetch_s)
