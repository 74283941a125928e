"""What runs requests on a node: what all runners have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
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


class Runner(Protocol):
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
