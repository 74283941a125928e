"""Where requests run: here or on a peer, and elsewhere when that fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from swarmcpp.core import Clock, GenerateRequest, TokenPart
from swarmcpp.errors import (
    BadRequest,
    EngineFailed,
    NotReady,
    PeerError,
    PeerLost,
    QueueFull,
    SwarmError,
    WireError,
)
from swarmcpp.node.remote import remote_tokens
from swarmcpp.node.view import RequestInView
from swarmcpp.peers import CacheHits, NodeId
from swarmcpp.route.replicas import DelegationRates, Replica, choose
from swarmcpp.sharing.blocks import SharedBlocks
from swarmcpp.sharing.offers import SwarmModels
from swarmcpp.supervisor.runner import Runner
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

SEEN_S: Final = 0.5
"""A request that was sent to a peer less than this before its last news is not in that news yet."""

ELSEWHERE = (PeerError, WireError, QueueFull, NotReady, EngineFailed, BadRequest)
"""What makes a request go on with another replica. A deadline that has passed, or a reader who left, does not."""

TTFT_SHARE: Final = 0.2
"""What the newest time to the first token counts in the mean."""


@dataclass(slots=True)
class Tally:
    """Prompt tokens of requests that ran here, by where their KV came from, and their time to the first token."""

    slot: int = 0
    arena: int = 0
    peer: int = 0
    computed: int = 0
    ttft_s: float = 0.0

    def hits(self) -> CacheHits:
        """The counts now."""
        return CacheHits(self.slot, self.arena, self.peer, self.computed)

    def count(self, prompt: int, first: TokenPart, ttft_s: float) -> None:
        """Add a request of `prompt` tokens whose first token came after `ttft_s`."""
        if first.tier in ("slot", "arena", "peer"):
            setattr(self, first.tier, getattr(self, first.tier) + first.cached_tokens)
        self.computed += max(0, prompt - first.cached_tokens)
        self.ttft_s += TTFT_SHARE * (ttft_s - self.ttft_s) if self.ttft_s else ttft_s


@dataclass(slots=True)
class _Sent:
    """A request under way at a peer: since when, and the tokens of its prompt that the peer has to compute."""

    begun: float
    tokens: int
    alone: bool
    """Nothing else ran there, as far as this node knows, so its times say how fast the peer is."""


class Requests:
    """The requests of one node. Used on the event loop's thread."""

    def __init__(
        self, own: NodeId, queue_size: int, mesh: Mesh, models: SwarmModels, blocks: SharedBlocks, clock: Clock
    ) -> None:
        self._own = own
        self._queue_size = queue_size
        self._mesh = mesh
        self._models = models
        self._blocks = blocks
        self._clock = clock
        self._serial = 0
        self._running: dict[int, RequestInView] = {}
        self._sent: dict[NodeId, list[_Sent]] = {}
        self._rates = DelegationRates(clock)
        self.tally = Tally()

    def running(self) -> tuple[RequestInView, ...]:
        """Requests under way, the oldest first."""
        return tuple(self._running.values())

    @contextmanager
    def tracked(self, request: GenerateRequest, route: Callable[[], str] = str) -> Iterator[RequestInView]:
        """Show a request as running; `route` tells where."""
        self._serial += 1
        serial = self._serial
        row = self._running[serial] = RequestInView(request, route, self._clock())
        try:
            yield row
        finally:
            del self._running[serial]

    async def tokens(
        self, request: GenerateRequest, local: Runner | None, timeout_s: float | None
    ) -> AsyncGenerator[tuple[str, TokenPart], None]:
        """Tokens with the route that they came by: from one replica after another until one has finished.

        A replica that fails is not asked again for this request; the next goes on after the tokens that came. Raises
        the last failure when none is left, and says what is wrong when there never was one.
        """
        ends = None if timeout_s is None else self._clock() + timeout_s
        produced, finished = list(request.generated), False
        failed: dict[NodeId, SwarmError] = {}
        with self.tracked(request) as row:
            row.generated = len(produced)
            while not finished:
                left = None if ends is None else max(0.001, ends - self._clock())
                current = replace(request, generated=tuple(produced), deadline_s=left)
                replica = self._choose(current, local, failed)
                row.route, told = _teller(replica, request, local), ""
                async with self._attempt(replica, current, local, failed) as parts:
                    async for part in parts:
                        produced.extend(part.ids)
                        row.count(part)
                        finished = part.finish is not None
                        told = told or row.route()
                        yield told, part
                    if not finished:
                        raise PeerLost(f"{replica.route} ended an answer before its end")

    def _choose(self, request: GenerateRequest, local: Runner | None, failed: Mapping[NodeId, SwarmError]) -> Replica:
        """Where the request finishes first. Raises what is wrong when it can run nowhere."""
        served = self._models.own(request.model)
        offer = served.offer if local and served else self._models.offer(request.model)
        choice = choose(
            [each for each in self._replicas(request, local) if each.node not in failed],
            len(request.prompt) + len(request.generated),
            max(1, request.max_tokens - len(request.generated)),
            n_layers=offer.n_layers if offer else 1,
            token_bytes=offer.token_bytes if offer and self._blocks.can_fetch else 0,
        )
        if choice is None:
            raise [*failed.values()][-1] if failed else _nowhere(request, local)
        diag(logger, "Parallax", request=request.id, route=choice.replica.route, why=choice.why)
        return choice.replica

    def _replicas(self, request: GenerateRequest, local: Runner | None) -> list[Replica]:
        have, warm = self._blocks.warm(request) if local else (0, {})
        found: list[Replica] = []
        if local is not None and local.usable and len(request.prompt) < local.ctx_size:
            served = self._models.own(request.model)
            head = served is not None and served.offer.pipeline
            own = Replica(self._own, "", local.slots, self._queue_size, local.load(), warm_tokens=have, pipeline=head)
            found.append(own)
        links = self._mesh.links
        for view, offer in self._models.of(request.model):
            node = view.capability.node
            if len(request.prompt) + request.max_tokens > offer.ctx_size:
                continue
            unseen = self._unseen(node, view.heard_s)
            found.append(
                Replica(
                    node=node,
                    name=view.capability.name or node,
                    slots=offer.slots,
                    queue_size=self._queue_size,
                    load=view.capability.load,
                    outstanding=len(unseen),
                    outstanding_tokens=sum(unseen),
                    warm_tokens=warm.get(node, 0),
                    own_rates=self._rates.rates(node),
                    rtt_s=links.rtt_s(node),
                    bytes_per_s=links.bytes_per_s(node),
                    pipeline=offer.pipeline,
                )
            )
        return found

    def _unseen(self, node: NodeId, heard_s: float) -> list[int]:
        """Prompt tokens of requests that were sent to a peer so late that its last news does not count them."""
        now = self._clock()
        return [each.tokens for each in self._sent.get(node, ()) if now - each.begun < heard_s + SEEN_S]

    @asynccontextmanager
    async def _attempt(
        self, replica: Replica, request: GenerateRequest, local: Runner | None, failed: dict[NodeId, SwarmError]
    ) -> AsyncGenerator[AsyncGenerator[TokenPart, None], None]:
        """A request's tokens at one replica. What fails there ends the block, and is noted in `failed`."""
        parts = self._run_there(replica, request) if replica.name or local is None else self.run_here(local, request)
        try:
            async with aclosing(parts):
                yield parts
        except ELSEWHERE as error:
            failed[replica.node] = error
            if replica.name:
                self._mesh.note(f"{request.id} goes on elsewhere, {replica.route} failed: {error}")

    async def run_here(self, local: Runner, request: GenerateRequest) -> AsyncGenerator[TokenPart, None]:
        """Run a request on this node, a peer's too. Raises what `Runner.admit` and `tokens` raise."""
        begun = self._clock()
        counted = False
        async with aclosing(local.tokens(local.admit(request), self._blocks.fetch)) as parts:
            async for part in parts:
                if not counted:
                    counted = True
                    self.tally.count(len(request.prompt) + len(request.generated), part, self._clock() - begun)
                yield part

    async def _run_there(self, replica: Replica, request: GenerateRequest) -> AsyncGenerator[TokenPart, None]:
        caller, offer = self._mesh.caller(replica.node), self._models.offer(request.model)
        if caller is None or offer is None:
            raise PeerLost(f"{replica.route} is not there any more")
        there = replace(request, model=self._models.name_at(replica.node, request.model))
        begun = self._clock()
        others = self._sent.setdefault(replica.node, [])
        for other in others:
            other.alone = False
        tokens = max(0, len(request.prompt) + len(request.generated) - replica.warm_tokens)
        sent = _Sent(begun, tokens, alone=not others and replica.ahead == 0)
        others.append(sent)
        first: TokenPart | None = None
        first_at, count = 0.0, 0
        try:
            async with aclosing(remote_tokens(caller, there, offer.n_vocab)) as parts:
                async for part in parts:
                    if first is None:
                        first, first_at = part, self._clock()
                    count += len(part.tokens)
                    yield part
        finally:
            self._sent[replica.node] = [each for each in self._sent[replica.node] if each is not sent]
            if not self._sent[replica.node]:
                del self._sent[replica.node]
            if first and sent.alone:
                # What the peer says of its prefill is not looked at: what this node waited for it is.
                self._rates.add(
                    replica.node,
                    computed_tokens=max(0, len(request.prompt) + len(request.generated) - first.cached_tokens),
                    prefill_s=first_at - begun - min(first.queue_s, first_at - begun),
                    tokens=count - len(first.tokens),
                    decode_s=self._clock() - first_at,
                    streams=1,
                )


def _nowhere(request: GenerateRequest, local: Runner | None) -> SwarmError:
    if local is not None:
        # Raises what exactly is wrong.
        local.admit(request)
    return NotReady(f"no node of the swarm can run {request.model!r} now; `swarmcpp status` shows them")


def _teller(replica: Replica, request: GenerateRequest, local: Runner | None) -> Callable[[], str]:
    """What tells where a request runs now."""
    if replica.name or local is None:
        return lambda: replica.route
    return lambda: local.route(request.id)
