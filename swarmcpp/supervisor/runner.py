"""What runs requests on a node: what all runners have in common."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import Cancelled, PromptTooLong, QueueFull
from swarmcpp.peers import Load
from swarmcpp.supervisor.process import EngineStatus

LOCAL = "local"
"""The route of a request that runs in this node's own engine."""

MAX_RETRY_AFTER_S = 30.0


class Fetched(int):
    """What a fetch did for a request, in tokens of its prompt: those that came from peers, and how many before them
    were `computed` here for it meanwhile."""

    computed: int

    def __new__(cls, tokens: int = 0, computed: int = 0) -> Fetched:
        self = super().__new__(cls, tokens)
        self.computed = computed
        return self


Fetch = Callable[[GenerateRequest], Awaitable[Fetched]]
"""Brings what peers have of a prompt's beginning into the arena; the tokens that came, and those computed for it."""


class Bounds(Protocol):
    """What bounds the requests of a node."""

    @property
    def ctx_size(self) -> int:
        """Tokens of one request."""
        ...

    @property
    def slots(self) -> int:
        """Requests that run side by side."""
        ...

    @property
    def ahead(self) -> int:
        """Requests that run, wait or fetch."""
        ...


class Runner(Bounds, Protocol):
    """What answers whole requests on this node: its engine, or a head that drives stages."""

    @property
    def status(self) -> EngineStatus:
        """Whether it can, and if not, why."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counts and rates now."""
        ...

    @property
    def usable(self) -> bool:
        """Whether requests can be submitted."""
        ...

    def load(self, ttft_s: float = 0.0) -> Load:
        """How busy it is; `ttft_s` is told with it."""
        ...

    def route(self, request_id: str) -> str:
        """Where a request runs, as users see it: LOCAL, or the stages that it goes through."""
        ...

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """`request` with a limit of tokens that fits. Raises PromptTooLong, QueueFull, NotReady."""
        ...

    def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        """Run an admitted request; closing the generator cancels it. Raises NotReady, EngineFailed, Cancelled."""
        ...


def admitted(request: GenerateRequest, bounds: Bounds, queue_size: int) -> GenerateRequest:
    """`request` with a limit of tokens that fits. Raises PromptTooLong, and QueueFull when `queue_size` wait."""
    used, ctx_size = len(request.prompt), bounds.ctx_size
    if used >= ctx_size:
        raise PromptTooLong(
            f"the prompt has {used} tokens and a slot holds {ctx_size} with the answer; shorten it, or start swarmcpp "
            "with a larger --ctx-size",
            param="messages",
        )
    waiting = bounds.ahead - bounds.slots
    if waiting >= queue_size:
        raise QueueFull(
            f"all {bounds.slots} slots are busy and {waiting} requests wait; try again later",
            retry_after=min(MAX_RETRY_AFTER_S, 1.0 + waiting / max(1, bounds.slots)),
        )
    return replace(request, max_tokens=min(request.max_tokens, ctx_size - used))


@contextlib.asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """Raises Cancelled when what is done in it takes longer; None: no limit."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Cancelled(f"the request took longer than its limit of {seconds:g} s") from None
