"""What answers requests on a node that has layers of a model and not all: a head over stages, or nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import NotReady
from swarmcpp.peers import Load
from swarmcpp.pipeline.conductor import Conductor
from swarmcpp.pipeline.runs import Chain
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.runner import LOCAL, Fetch

ONLY_LAYERS = "this node has layers of the model only, and answers once the swarm has a node with the first layer"


class StageRunner:
    """Satisfies `Runner`. `engine` tells how this node's own stages are, `missing` what is missing for a chain,
    in words, and `told` a chain; as long as there is no `head` this node only computes for other ones."""

    def __init__(
        self,
        engine: Callable[[], EngineStatus],
        missing: Callable[[], str],
        told: Callable[[Chain], str],
        head: Callable[[], Conductor | None],
    ) -> None:
        self._engine = engine
        self._missing = missing
        self._told = told
        self._conductor = head

    @property
    def conductor(self) -> Conductor | None:
        """What drives stages from here."""
        return self._conductor()

    @property
    def status(self) -> EngineStatus:
        """Of the node's stages; of the whole chain where this node is a head."""
        own = self._engine()
        if own.state != "ready":
            return own
        missing = self._missing()
        if self.conductor is None:
            return replace(own, detail=missing or ONLY_LAYERS)
        return replace(own, state="starting", detail=missing) if missing else own

    @property
    def stats(self) -> EngineStats:
        """Counts and rates of the requests that this node heads."""
        return self.conductor.stats if self.conductor else EngineStats(slots=0, slots_busy=0, waiting=0)

    @property
    def ctx_size(self) -> int:
        """Tokens of a sequence."""
        return self.conductor.ctx_size if self.conductor else self._engine().ctx_size

    @property
    def slots(self) -> int:
        """Requests that run side by side."""
        return self.conductor.slots if self.conductor else self._engine().slots

    @property
    def ahead(self) -> int:
        """Requests that run or wait."""
        return self.conductor.ahead if self.conductor else 0

    @property
    def usable(self) -> bool:
        """Whether a chain leads through the model."""
        return self.conductor is not None and self.conductor.usable

    def load(self, ttft_s: float = 0.0) -> Load:
        """How busy the head is."""
        return self.conductor.load(ttft_s) if self.conductor else Load()

    def route(self, request_id: str) -> str:
        """See `Runner`."""
        chain = self.conductor.chain(request_id) if self.conductor else ()
        return self._told(chain) if chain else LOCAL

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """See `Runner`."""
        return self._head().admit(request)

    def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        """See `Runner`."""
        return self._head().tokens(request, fetch)

    def _head(self) -> Conductor:
        if self.conductor is None:
            raise NotReady(self._missing() or ONLY_LAYERS)
        return self.conductor
