"""Which chain a run gets: what the route search says, but not through nodes that failed a moment ago."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from swarmcpp.core import Clock
from swarmcpp.errors import NotReady, StageFailed, StageLost
from swarmcpp.peers import NodeId
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.pipeline.runs import Ask, Chain, ModelFacts, Run
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

AVOID_S = 5.0
"""For so long a node that failed is not asked while others can be: news of its end takes a few heartbeats."""

PATIENCE_S = 10.0
"""How long a request waits for a chain: in that time an engine restarts."""


class ChainFinder:
    """Asks for chains, checks them, and remembers which nodes failed."""

    def __init__(self, facts: ModelFacts, routes: Callable[[Ask], Sequence[StageRef]], clock: Clock) -> None:
        self._facts = facts
        self._routes = routes
        self._clock = clock
        self._avoid: dict[NodeId, float] = {}
        """Nodes that failed, and until when they are avoided."""
        self._found_s: float | None = None
        """When there was a chain last."""

    def check(self) -> None:
        """Raises NotReady when there is no chain, and was none for a while."""
        try:
            self._ask(Ask("", 1, 1, 0))
        except NotReady:
            if self._found_s is None or self._clock() - self._found_s > PATIENCE_S:
                raise

    def has_other(self) -> bool:
        """Whether there is a chain without any node that failed a moment ago."""
        avoided = self._avoided()
        try:
            chain = self._ask(Ask("", 1, 1, 0, avoided))
        except NotReady:
            return False
        return not any(stage.node in avoided for stage in chain)

    def find(self, run: Run, streams: int) -> Chain:
        """The best chain for a run, beside `streams` others. Raises NotReady."""
        answer = run.request.max_tokens - len(run.request.generated) - run.sampled
        ask = Ask(run.request.id, len(run.tokens), max(1, answer), streams, self._avoided())
        try:
            chain = self._ask(ask)
        except NotReady:
            if not ask.avoid:
                raise
            # Where there is no other chain, one that failed a moment ago is better than none.
            chain = self._ask(replace(ask, avoid=frozenset()))
        if chain != run.chain:
            route = ">".join(f"{stage.node}:{stage.first}-{stage.last}" for stage in chain)
            diag(logger, "Parallax", request=run.request.id, route=route)
        return chain

    def _avoided(self) -> frozenset[NodeId]:
        now = self._clock()
        self._avoid = {node: until for node, until in self._avoid.items() if until > now}
        return frozenset(self._avoid)

    def failed(self, error: StageFailed) -> None:
        """Avoid a node for a while; not one that only lost some KV, which is as good as before."""
        if error.node and error.reason != StageLost.code:
            self._avoid[error.node] = self._clock() + AVOID_S

    def _ask(self, ask: Ask) -> Chain:
        chain = tuple(self._routes(ask))
        at = 0
        for stage in chain:
            fits = stage.first == at < stage.last and stage.fingerprint == self._facts.fingerprint
            at = stage.last if fits else -1
        if at != self._facts.n_layers:
            raise NotReady(f"the route does not cover layers 0 to {self._facts.n_layers} of the model; try again")
        self._found_s = self._clock()
        return chain
