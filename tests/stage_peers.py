"""Nodes over real sockets whose stages are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm_support import Peers, pong

from swarmcpp.core import GenerateRequest, Limits
from swarmcpp.errors import StageFailed
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.contract import Pass, Passed, StageCaller, StageRef
from swarmcpp.pipeline.service import StageService
from swarmcpp.supervisor.books import ComputeDone
from swarmcpp.swarm.endpoint import Endpoint, Responder
from swarmcpp.swarm.identity import new_node_keys, node_id
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.testing import FakeClock, FakeStage
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import Ask, AskStage, PassPart, RunStage

N_EMBD = 4
N_VOCAB = 1000
CTX = 2000
BOUNDS = StageBounds(Limits(ctx_size=CTX, n_vocab=N_VOCAB), N_EMBD)
FINGERPRINT = b"f" * 32
LAYERS = ((0, 4), (4, 6), (6, 10))
N_LAYERS = 10
REQUEST = GenerateRequest("r", "m", (1, 2, 3), 10)


def ref_of(node: str, stage: FakeStage) -> StageRef:
    return StageRef(node, FINGERPRINT, stage.first, stage.last, stage.n_layers)


async def open_at(caller: StageCaller, ref: StageRef, sequence: bytes, epoch: int = 1) -> None:
    """Get a sequence of REQUEST, of which nothing is there yet."""
    assert await caller.open(sequence, epoch, (), REQUEST if ref.is_tail else None, len(REQUEST.prompt)) == 0
    assert await caller.resume(sequence, epoch, 0) == 0


@dataclass
class WatchedStage(FakeStage):
    """Notes what it is asked."""

    begun: list[tuple[tuple[PassPart, ...], RowEncoding, RowEncoding]] = field(default_factory=list)
    """Parts, encoding and encoding of the reply of each pass."""
    calls: list[tuple[object, ...]] = field(default_factory=list)
    """All others, by name."""
    error: Exception | None = None
    """What every call fails with."""

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        self._note("open", sequence, epoch, tuple(keys), request, n_tokens)
        return await super().open(sequence, epoch, keys, request, n_tokens)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        self._note("resume", sequence, epoch, n_tokens)
        return await super().resume(sequence, epoch, n_tokens)

    def begin(
        self,
        parts: Sequence[PassPart],
        encoding: RowEncoding,
        rows: bytes | memoryview,
        reply: RowEncoding,
        done: ComputeDone,
    ) -> None:
        self.begun.append((tuple(parts), encoding, reply))
        self._fail()
        super().begin(parts, encoding, rows, reply, done)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        self._note("store", sequence, epoch, tuple(keys))
        await super().store(sequence, epoch, keys)

    async def close_sequence(self, sequence: bytes) -> None:
        self._note("close", sequence)
        await super().close_sequence(sequence)

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        self._fail()

    def _fail(self) -> None:
        if self.error:
            raise self.error


@dataclass
class Node:
    """One node of the swarm, and its links to those that it has met."""

    id: str
    endpoint: Endpoint
    links: dict[str, PeerLink]
    service: StageService
    clock: FakeClock

    def host(self, first: int, last: int, bounds: StageBounds = BOUNDS) -> WatchedStage:
        stage = WatchedStage(first, last, N_LAYERS, bounds.n_embd)
        self.service.host(ref_of(self.id, stage), stage, bounds)
        return stage


async def open_nodes(peers: Peers, count: int) -> list[Node]:
    """Nodes that are all linked to one another."""
    nodes: list[Node] = []
    addresses = []
    for _ in range(count):
        keys = new_node_keys()
        links: dict[str, PeerLink] = {}
        clock = FakeClock()
        service = StageService(node_id(keys.public), links.get, clock)

        async def handle(
            message: Ask, payload: list[memoryview], respond: Responder, service: StageService = service
        ) -> None:
            if isinstance(message, AskStage):
                await service.answer(message, respond)
            else:
                await pong(message, payload, respond)

        def begin(message: Ask, payload: list[memoryview], respond: Responder, service: StageService = service) -> bool:
            if isinstance(message, RunStage):
                service.begin(message, payload, respond)
            return isinstance(message, RunStage)

        endpoint, address = await peers.endpoint(handle, keys=keys, begin=begin)
        nodes.append(Node(node_id(keys.public), endpoint, links, service, clock))
        addresses.append(address)
    for node in nodes:
        for other, address in zip(nodes, addresses, strict=True):
            if other is not node:
                node.links[other.id] = peers.link(address)
    return nodes


async def run_pass(caller: StageCaller, work: Pass) -> Passed:
    """A pass, waited for."""
    future: asyncio.Future[Passed] = asyncio.get_running_loop().create_future()

    def done(result: Passed | StageFailed) -> None:
        if isinstance(result, Passed):
            future.set_result(result)
        else:
            future.set_exception(result)

    caller.begin(work, done)
    assert not future.done(), "not before `begin` has returned"
    return await future
