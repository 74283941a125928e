"""One fetch under way: requests to several peers, checks of what comes, and its delivery in order."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmcpp.errors import PeerTimeout, SnapshotError, SwarmError
from swarmcpp.kv.arena import Hashed
from swarmcpp.peers import NodeId
from swarmcpp.sharing.fetchcontext import FetchContext, Store
from swarmcpp.sharing.shipping import Progress, Shipment, ShipPlan, fetch_limit_s, overtaken
from swarmcpp.telemetry import diag
from swarmcpp.wire.peers import MAX_FRAMES, Blocks, Caller, FetchBlocks, Reply

logger = logging.getLogger(__name__)

_REQUEST_BYTES = (1 << 20, 4 << 20)
_REQUEST_S = 0.25
"""A request asks for what comes in this time, within the sizes above: small enough to use what came when stopped."""
_IN_FLIGHT = (2, 4)
_IN_FLIGHT_S = 0.5
"""Requests under way to one peer are to cover this time, within the numbers above: the link never waits for us."""
_WINDOW_BYTES = 64 << 20
"""How far ahead of the stored blocks others may arrive, since they wait in memory."""
_SPLIT_WINDOW_BYTES = 256 << 20
"""The same, as they come, while the blocks before them are computed: the link is not to wait for the engine."""
_STORE_BYTES = 8 << 20
_TICK_S = 0.05
_LAST_STORE_S = 0.5
_MAX_EMPTY = 2


class _UnsoundError(Exception):
    """What a peer sent is not what it says, or not what was asked for."""


@dataclass(slots=True)
class _Peer:
    id: NodeId
    caller: Caller
    request_blocks: int
    in_flight: int
    timeout_s: float
    outstanding: int = 0
    since: float = 0.0
    busy_s: float = 0.0
    """Time with a request under way, up to `since`."""
    received: int = 0
    empty: int = 0
    late: bool = False


@dataclass(frozen=True, slots=True)
class _Request:
    peer: _Peer
    first: int
    count: int


@dataclass(slots=True)
class FetchRun:
    """The blocks `ids` of `root`, of which `held[i]` have the i-th; they are the prompt's from number `have`.

    While `front` runs, the blocks before them are not there yet: they wait in memory. Its result says whether they can
    be stored.

    `stored`, `received` (bytes) and `sources` (who sent each stored block) tell what came of it, `wrong` who lied.
    """

    context: FetchContext
    root: bytes
    have: int
    ids: Sequence[bytes]
    held: list[set[NodeId]]
    what: Shipment
    plan: ShipPlan
    store: Store
    front: asyncio.Task[bool] | None = None
    waited_for: bool = True
    """Not so: it ends when all is here or its time is over, whatever computing the rest would take, and nobody is late
    with what cost no one anything."""
    stored: int = field(init=False, default=0)
    received: int = field(init=False, default=0)
    sources: list[NodeId] = field(init=False, default_factory=list)
    wrong: set[NodeId] = field(init=False, default_factory=set)
    _goal: int = field(init=False)
    """Blocks that can still be had: those before the first that nobody is left for."""
    _pending: set[int] = field(init=False)
    """Blocks that nobody is being asked for, and that are not here."""
    _arrived: dict[int, tuple[NodeId, Hashed]] = field(init=False, default_factory=dict)
    _peers: dict[NodeId, _Peer] = field(init=False, default_factory=dict)
    _gone: set[NodeId] = field(init=False, default_factory=set)
    _asks: dict[asyncio.Task[list[Hashed]], _Request] = field(init=False, default_factory=dict)
    _ended: list[asyncio.Task[list[Hashed]]] = field(init=False, default_factory=list)
    _storing: asyncio.Task[int] | None = field(init=False, default=None)
    _delivering: tuple[NodeId, int] = field(init=False, default=("", 0))
    _begun: float = field(init=False)
    _last: float = field(init=False)
    """When a peer last answered."""

    def __post_init__(self) -> None:
        self._goal = len(self.ids)
        self._pending = set(range(self._goal))
        self._begun = self._last = self.context.clock()

    async def drive(self, first: Sequence[NodeId]) -> str:
        """Fetch, starting with the peers `first`; why it ended early, empty if it did not. Always call `end` after."""
        for peer in first:
            self._join(peer, len(first))
        # The deadline cuts the plan down to what fits, with slack, but must also hold if that was wrong.
        estimate_s = max(self.plan.ship_s, self.plan.front_s)
        limit_s = min(fetch_limit_s(estimate_s, self.context.settings.fetch_s), self.what.limit_s)
        reason, front = "", self.front
        while self.stored < self._goal or self._computing:
            self._launch()
            self._deliver()
            waiting = self._under_way()
            if not waiting:
                break
            await asyncio.wait(waiting, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            for ask in [each for each in self._asks if each.done()]:
                # Another one may just have shown that this peer is not to be used.
                if request := self._asks.pop(ask, None):
                    self._settle(ask, request)
            self._shorten()
            if self._storing and self._storing.done() and not self._settle_store(self._storing):
                return "store-full"
            if front:
                # Waiting costs nothing: the request needs the front in any case.
                if not front.done():
                    continue
                if not front.result():
                    return "front-failed"
                # However long it took, what came meanwhile gets the time to be stored.
                limit_s = max(limit_s, self.context.clock() - self._begun + self.context.settings.fetch_s)
                front = None
            if self.stored < self._goal and (stop := self._stop(limit_s)):
                reason = stop
                if reason == "timed-out":
                    break
        return reason or ("" if self.stored == len(self.ids) else "holders-failed")

    @property
    def receiving_s(self) -> float:
        """Seconds until the last answer came."""
        return self._last - self._begun

    @property
    def _computing(self) -> bool:
        return self.front is not None and not self.front.done()

    def _under_way(self) -> list[asyncio.Task[Any]]:
        tasks: list[asyncio.Task[Any]] = [*self._asks]
        if self._storing:
            tasks.append(self._storing)
        if self.front and self._computing:
            tasks.append(self.front)
        return tasks

    async def end(self, *, slow: bool) -> None:
        """Stop whatever is under way, and note rates; `slow`: what did not come counts against its peer."""
        now = self.context.clock()
        for peer in self._peers.values():
            busy_s = peer.busy_s + (now - peer.since if slow and peer.outstanding else 0.0)
            if slow and peer.outstanding and not peer.received:
                self._late(peer.id)
            if peer.received or peer.late or (slow and peer.outstanding):
                rtt_s = self.context.links.rtt_s(peer.id)
                self.context.links.add_transfer(peer.id, peer.received, max(busy_s - rtt_s, busy_s / 10))
        tasks: list[asyncio.Task[Any]] = [*self._asks, *self._ended]
        for ask in self._asks:
            ask.cancel()
        if self.front:
            self.front.cancel()
            tasks.append(self.front)
        if self._storing:
            # Blocks that are here already are worth a moment, but a disk that hangs is not.
            await asyncio.wait([self._storing], timeout=_LAST_STORE_S)
            if self._storing.done():
                self._settle_store(self._storing)
            else:
                self._storing.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- requests ------------------------------------------------------------------------------------------------

    def _join(self, peer: NodeId, sharing: int) -> None:
        """Use `peer` from now on."""
        links, settings = self.context.links, self.context.settings
        caller = self.context.callers(peer)
        if caller is None:
            self._gone.add(peer)
            return
        rate, frame = links.bytes_per_s(peer), self.plan.wire_block_bytes
        # A split ends when the engine is done: the less is under way then, the less came in vain.
        least = frame if self.front else _REQUEST_BYTES[0]
        size = min(max(rate * _REQUEST_S, least), _REQUEST_BYTES[1])
        blocks = max(1, min(int(size // frame), MAX_FRAMES, math.ceil(len(self.ids) / sharing)))
        in_flight = min(max(math.ceil(rate * _IN_FLIGHT_S / (blocks * frame)), _IN_FLIGHT[0]), _IN_FLIGHT[1])
        timeout_s = settings.request_s
        if links.rate_known(peer):
            timeout_s = max(timeout_s, 2 * (links.rtt_s(peer) + in_flight * blocks * frame / rate))
        self._peers[peer] = _Peer(peer, caller, blocks, in_flight, timeout_s)

    def _launch(self) -> None:
        """Give every peer requests, in turns, so that the first one does not get them all."""
        if self._pending:
            head = self.held[min(self._pending)] - self._gone
            if head and not any(peer in self._peers for peer in head):
                best = min(head, key=lambda peer: (-self.context.trust.score(peer), peer))
                self._join(best, 1)
        for level in range(_IN_FLIGHT[1]):
            for peer in self._live():
                if peer.outstanding <= level < peer.in_flight and (request := self._take(peer)):
                    if not peer.outstanding:
                        peer.since = self.context.clock()
                    peer.outstanding += 1
                    self._asks[asyncio.create_task(self._ask(request))] = request

    def _live(self) -> list[_Peer]:
        return [peer for peer in self._peers.values() if peer.id not in self._gone]

    def _take(self, peer: _Peer) -> _Request | None:
        """The next blocks that `peer` has and nobody was asked for."""
        ahead = _SPLIT_WINDOW_BYTES // self.plan.wire_block_bytes
        if not self.front:
            ahead = _WINDOW_BYTES // self.what.block_bytes
        window = max(ahead, 2 * peer.request_blocks)
        able = {i for i in self._pending if peer.id in self.held[i] and i < self.stored + window}
        if not able:
            return None
        first = min(able)
        count = 1
        while count < peer.request_blocks and first + count in able:
            count += 1
        self._pending.difference_update(range(first, first + count))
        return _Request(peer, first, count)

    async def _ask(self, request: _Request) -> list[Hashed]:
        settings, peer = self.context.settings, request.peer
        ids = tuple(self.ids[request.first : request.first + request.count])
        budget_s = min(60.0, peer.timeout_s * settings.server_s / settings.request_s)
        message = FetchBlocks(self.root, ids, self.plan.encoding, budget_s)
        reply, frames = await peer.caller.ask(message, timeout_s=peer.timeout_s)
        now = self.context.clock()
        size = sum(len(frame) for frame in frames)
        peer.busy_s += now - peer.since
        peer.since = self._last = now
        peer.received += size
        self.received += size
        return await asyncio.to_thread(self._checked, reply, frames, request.count)

    def _checked(self, reply: Reply, frames: list[memoryview], asked: int) -> list[Hashed]:
        """The payloads in an answer. Raises _UnsoundError when it is not a sound one."""
        if not isinstance(reply, Blocks) or len(reply.digests) != len(frames) or len(frames) > asked:
            raise _UnsoundError(f"an answer of {len(frames)} frames to a request for {asked} blocks is not sound")
        came: list[Hashed] = []
        for digest, data in zip(reply.digests, frames, strict=True):
            if len(data) != self.plan.wire_block_bytes:
                raise _UnsoundError(f"a block of {len(data)} bytes where {self.plan.wire_block_bytes} are right")
            came.append(Hashed.of(data))
            if came[-1].digest != digest:
                raise _UnsoundError("a block is not what its digest says")
        # With a front they may wait for long, and are half as large as they came.
        if self.front:
            return came
        try:
            return self._decoded(came)
        except SnapshotError as error:
            raise _UnsoundError(str(error)) from error

    def _decoded(self, frames: list[Hashed]) -> list[Hashed]:
        """Payloads of blocks as they came. Raises SnapshotError when one is not sound."""
        if self.plan.encoding == "f16":
            return frames
        size = self.what.block_bytes
        payloads = [self.context.dequantise(frame.data, size) for frame in frames]
        for payload in payloads:
            if len(payload) != size:
                raise SnapshotError(f"a block of {len(payload)} bytes where {size} are right")
        # Of the payload, as the arena has it: the digest that came is that of the frame.
        return [Hashed.of(payload) for payload in payloads]

    def _settle(self, ask: asyncio.Task[list[Hashed]], request: _Request) -> None:
        peer, wanted = request.peer, range(request.first, request.first + request.count)
        peer.outstanding -= 1
        came = 0
        try:
            payloads = ask.result()
        except PeerTimeout:
            diag(logger, "prefix-probe: fetch timed out", peer=peer.id, ms=round(1000 * peer.timeout_s))
            peer.late = True
            peer.busy_s += self.context.clock() - peer.since
            self._late(peer.id)
            self._leave(peer.id)
        except _UnsoundError as error:
            self._lied(peer.id, str(error))
        except SwarmError as error:
            diag(logger, "cross-node prefix peer failed", peer=peer.id, code=error.code)
            # Not _leave: what else it was asked for may still come.
            self._gone.add(peer.id)
        else:
            came = len(payloads)
            self._arrived.update({i: (peer.id, payload) for i, payload in zip(wanted, payloads, strict=False)})
            if not came:
                self._has_not(peer, request.first)
        self._pending.update(i for i in wanted[came:] if i < self._goal)

    def _has_not(self, peer: _Peer, index: int) -> None:
        """A holder that has lost a block since it told of it: no fault, unless it goes on like that."""
        self.held[index].discard(peer.id)
        self.context.holders.drop(self.root, [self.ids[index]], peer.id)
        peer.empty += 1
        if peer.empty == _MAX_EMPTY:
            self._late(peer.id)
            self._leave(peer.id)

    def _late(self, peer: NodeId) -> None:
        if self.waited_for:
            self.context.trust.late(peer)

    def _lied(self, peer: NodeId, why: str) -> None:
        self.wrong.add(peer)
        self.context.trust.wrong(peer, why)
        for index in [i for i, (sender, _) in self._arrived.items() if sender == peer]:
            del self._arrived[index]
            if index < self._goal:
                self._pending.add(index)
        self._leave(peer)

    def _leave(self, peer: NodeId) -> None:
        """Ask `peer` nothing more in this fetch; others get what it was asked for."""
        self._gone.add(peer)
        self._drop([ask for ask, request in self._asks.items() if request.peer.id == peer])

    def _shorten(self) -> None:
        """Give up what comes after a block that nobody is left for."""
        lost = min((i for i in self._pending if not self.held[i] - self._gone), default=self._goal)
        if lost < self._goal:
            self._goal = lost
            self._drop([ask for ask, request in self._asks.items() if request.first >= lost])
            self._pending = {i for i in self._pending if i < lost}

    def _drop(self, asks: list[asyncio.Task[list[Hashed]]]) -> None:
        for ask in asks:
            request = self._asks.pop(ask)
            request.peer.outstanding -= 1
            self._pending.update(range(request.first, min(request.first + request.count, self._goal)))
            ask.cancel()
            self._ended.append(ask)

    # -- delivery ------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Store the next blocks that are here. Those of one peer at a time, so that a bad one has a name."""
        if self._storing or self._computing or self.stored not in self._arrived:
            return
        sender = self._arrived[self.stored][0]
        payloads: list[Hashed] = []
        most = max(1, _STORE_BYTES // self.what.block_bytes)
        while len(payloads) < most and (entry := self._arrived.get(self.stored + len(payloads))):
            if entry[0] != sender:
                break
            payloads.append(entry[1])
        exact = self.plan.encoding == "f16"
        self._storing = asyncio.create_task(self._stored_now(self.have + self.stored, payloads, exact))
        self._delivering = (sender, len(payloads))

    async def _stored_now(self, first: int, payloads: list[Hashed], exact: bool) -> int:
        if self.front:
            payloads = await asyncio.to_thread(self._decoded, payloads)
        return await self.store(first, payloads, exact=exact)

    def _settle_store(self, storing: asyncio.Task[int]) -> bool:
        """Count what was stored; False when the store takes no more."""
        self._storing = None
        sender, count = self._delivering
        try:
            done = min(max(storing.result(), 0), count)
        except SnapshotError as error:
            self._lied(sender, str(error))
            return True
        for index in range(self.stored, self.stored + done):
            self._arrived.pop(index, None)
        self.stored += done
        self.sources.extend([sender] * done)
        return done == count

    def _stop(self, limit_s: float) -> str:
        now = self.context.clock()
        if now - self._begun > limit_s:
            diag(logger, "prefix-probe: fetch timed out", ms=round(1000 * (now - self._begun)))
            return "timed-out"
        biggest: dict[NodeId, int] = {}
        for request in self._asks.values():
            biggest[request.peer.id] = max(biggest.get(request.peer.id, 0), request.count)
        usable = self.stored
        while usable in self._arrived and usable < self._goal:
            usable += 1
        progress = Progress(
            elapsed_s=now - self._begun,
            silent_s=now - self._last,
            received_bytes=self.received,
            credit_bytes=sum(biggest.values()) * self.plan.wire_block_bytes,
            unusable_blocks=self._goal - usable,
            missing_blocks=sum(i not in self._arrived for i in range(usable, self._goal)),
        )
        if usable == self._goal or not self.waited_for or not overtaken(self.plan, self.what, progress):
            return ""
        # What is here in order is stored yet: that takes a moment, and after a front it may be all that came.
        self._goal = usable
        self._pending.clear()
        return "overtaken"
