"""Nodes over real sockets whose stages do sums instead of a model's layers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from engine_support import sampled_of
from swarm_support import Peers, pong

from swarmcpp.core import GenerateRequest, Limits
from swarmcpp.errors import StageFailed, StageLost
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.contract import Pass, Passed, StageCaller, StageRef
from swarmcpp.pipeline.service import StageService
from swarmcpp.supervisor.books import Computed, ComputeDone
from swarmcpp.swarm.endpoint import Endpoint, Responder
from swarmcpp.swarm.identity import new_node_keys, node_id
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.testing import FakeClock
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import Ask, AskStage, PassPart, RunStage

N_EMBD = 4
N_VOCAB = 1000
CTX = 2000
BOUNDS = StageBounds(Limits(ctx_size=CTX, n_vocab=N_VOCAB), N_EMBD)
FINGERPRINT = b"f" * 32
LAYERS = ((0, 4), (4, 6), (6, 10))
N_LAYERS = 10

Rows = npt.NDArray[np.float32]


def layers(rows: Rows, first: int, last: int) -> Rows:
    """What layers [first, last) make of rows (n, n_embd) of integers from 0 to 60."""
    made = np.arange(61)
    for layer in range(first, last):
        made = (made * 3 + layer) % 61
    return made.astype(np.float32)[rows.astype(np.uint8)]


def token(rows: Rows) -> int:
    """What is sampled after `rows`, all those of a sequence."""
    return int(rows.sum()) % N_VOCAB


@dataclass
class SumStage:
    """A `StageHost`. Its passes end a while after they began, in their order."""

    ref: StageRef
    n_embd: int = N_EMBD
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    kv: dict[bytes, tuple[int, Rows]] = field(default_factory=dict)
    """By sequence: epoch and all rows so far."""
    begun: list[tuple[PassPart, ...]] = field(default_factory=list)
    encodings: list[tuple[RowEncoding, RowEncoding]] = field(default_factory=list)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    """What every call fails with."""
    last: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def _check(self, sequence: bytes, epoch: int) -> Rows:
        if self.error:
            raise self.error
        if sequence not in self.kv or self.kv[sequence][0] != epoch:
            raise StageLost("the sequence is not known in this epoch")
        return self.kv[sequence][1]

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        self.calls.append(("open", sequence, epoch, tuple(keys), request, n_tokens))
        if self.error:
            raise self.error
        _, rows = self.kv.get(sequence, (0, np.zeros((0, self.n_embd), np.float32)))
        self.kv[sequence] = (epoch, rows)
        return min(len(rows), n_tokens - 1)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        self.calls.append(("resume", sequence, epoch, n_tokens))
        return min(len(self._check(sequence, epoch)), n_tokens)

    def begin(
        self,
        parts: Sequence[PassPart],
        encoding: RowEncoding,
        rows: bytes | memoryview,
        reply: RowEncoding,
        done: ComputeDone,
    ) -> None:
        self.begun.append(tuple(parts))
        self.encodings.append((encoding, reply))
        ids, out = self._compute(parts, np.frombuffer(rows, np.float32).reshape(-1, self.n_embd))
        before = self.last

        async def end() -> None:
            await self.gate.wait()
            for _ in range(self.chance.randrange(20)):
                await asyncio.sleep(0)
            if before:
                await asyncio.wait((before,))
            tail = self.ref.is_tail
            done(Computed(sampled_of(*ids) if tail else (), None if tail else out.tobytes(), 0.5, 0.25))

        self.last = asyncio.create_task(end())

    def _compute(self, parts: Sequence[PassPart], rows: Rows) -> tuple[list[int], Rows]:
        ids, results, at = [], [], 0
        for part in parts:
            known = self._check(part.sequence, part.epoch)
            if part.start > len(known):
                raise StageLost(f"there is a hole from {len(known)} to {part.start}")
            done = layers(rows[at : at + part.count], self.ref.first, self.ref.last)
            known = np.concatenate([known[: part.start], done])
            self.kv[part.sequence] = (part.epoch, known)
            results.append(done)
            at += part.count
            if part.outputs:
                ids.append(token(known))
        return ids, np.concatenate(results)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        self.calls.append(("store", sequence, epoch, tuple(keys)))
        self._check(sequence, epoch)

    async def close_sequence(self, sequence: bytes) -> None:
        self.calls.append(("close", sequence))
        if self.error:
            raise self.error
        self.kv.pop(sequence, None)


@dataclass
class Node:
    """One node of the swarm, and its links to those that it has met."""

    id: str
    endpoint: Endpoint
    links: dict[str, PeerLink]
    service: StageService
    clock: FakeClock

    def host(self, first: int, last: int, bounds: StageBounds = BOUNDS) -> SumStage:
        stage = SumStage(StageRef(self.id, FINGERPRINT, first, last, N_LAYERS), bounds.n_embd)
        self.service.host(stage.ref, stage, bounds)
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
