"""The first stage of a model and its tail, by each who plays them: real ones, and what stands for them in tests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine_support import sampled_of
from pipeline_support import Swarm
from stage_peers import open_nodes, ref_of
from stage_processes import stage
from stage_support import N_EMBD, N_LAYERS, N_VOCAB, stage_model
from swarm_support import swarm as peers_of_a_swarm

from swarmcpp.core import Limits
from swarmcpp.errors import StageFailed, revive
from swarmcpp.pipeline.calls import StageBounds, StageHost
from swarmcpp.pipeline.contract import Pass, Passed, StageCaller, StageRef, StageTime
from swarmcpp.supervisor.books import Computed, ComputeDone
from swarmcpp.testing import FakeStage
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import PassPart

SLOTS, CUT = 3, 2
BOUNDS = StageBounds(Limits(ctx_size=512, n_vocab=N_VOCAB), N_EMBD)


def behind(ref: StageRef) -> StageRef:
    """All layers after a stage, at its node."""
    return replace(ref, first=ref.last, last=ref.n_layers)


class Sink:
    """All stages after one, which only shows what that sends on. A `StageHost` as far as passes go there."""

    def __init__(self) -> None:
        self.rows: deque[bytes] = deque()
        """Of each pass, in the order in which they came."""

    def begin(
        self,
        parts: Sequence[PassPart],
        encoding: RowEncoding,
        rows: bytes | memoryview,
        reply: RowEncoding,
        done: ComputeDone,
    ) -> None:
        self.rows.append(bytes(rows))
        tokens = sampled_of(*(0 for part in parts if part.outputs))
        asyncio.get_running_loop().call_soon(done, Computed(tokens, None, 0.0, 0.0))

    async def run(self, work: Pass) -> Passed:
        """What stages in this process call."""
        self.rows.append(bytes(work.rows))
        return Passed((), (StageTime(0.0, 0.0),))


class Called:
    """A `StageHost` that asks a `StageCaller`, and reads what comes out from the `sink` behind it; without one, a tail.

    Checks what callers promise beyond hosts: `begin` raises nothing, failures name the node, `computed` comes once.
    """

    def __init__(self, caller: StageCaller, ref: StageRef, sink: Sink | None) -> None:
        self.open, self.resume, self.store, self.close_sequence = caller.open, caller.resume, caller.store, caller.close
        self._caller, self._ref, self._sink = caller, ref, sink
        self._onward = (behind(ref),) if sink else ()
        self.computed: list[int] = []
        """How often each pass was told to be computed."""
        self.wrong: list[Exception | StageFailed] = []

    def begin(
        self,
        parts: Sequence[PassPart],
        encoding: RowEncoding,
        rows: bytes | memoryview,
        reply: RowEncoding,
        done: ComputeDone,
    ) -> None:
        number = len(self.computed)
        self.computed.append(0)

        def computed() -> None:
            self.computed[number] += 1

        def ended(result: Passed | StageFailed) -> None:
            if isinstance(result, StageFailed):
                self.wrong += [] if result.node == self._ref.node else [result]
                done(revive(result.reason, str(result)))
            else:
                made = self._sink.rows.popleft() if self._sink else None
                done(Computed(() if self._sink else result.tokens, made, *astuple(result.times[0])))

        try:
            self._caller.begin(Pass(tuple(parts), encoding, rows, self._onward, reply), ended, computed)
        except Exception as error:
            self.wrong.append(error)
            raise

    def check(self) -> None:
        assert not self.wrong
        assert max(self.computed, default=0) <= 1


Pair = tuple[StageHost, StageHost]


@asynccontextmanager
async def fakes(_directory: Path) -> AsyncIterator[Pair]:
    yield FakeStage(0, CUT, N_LAYERS, N_EMBD, SLOTS), FakeStage(CUT, N_LAYERS, N_LAYERS, N_EMBD, SLOTS)


@asynccontextmanager
async def engines(directory: Path) -> AsyncIterator[Pair]:
    path = stage_model(directory)
    async with (
        stage(path, 0, CUT, directory, slots=SLOTS) as first,
        stage(path, CUT, N_LAYERS, directory, slots=SLOTS) as tail,
    ):
        yield first, tail


@asynccontextmanager
async def threads(directory: Path) -> AsyncIterator[Pair]:
    """Called as heads call them."""
    swarm = Swarm(stage_model(directory), (0, CUT, N_LAYERS), directory, SLOTS)
    ref, tail = swarm.stages
    sink: Any = Sink()
    first, last = Called(swarm.stages[ref], ref, sink), Called(swarm.stages[tail], tail, None)
    swarm.stages[behind(ref)] = sink
    yield first, last
    del swarm.stages[behind(ref)]
    swarm.close()
    first.check()
    last.check()


@asynccontextmanager
async def called(directory: Path, local: bool) -> AsyncIterator[Pair]:
    """Fakes behind what heads call, at their own node or at a peer."""
    async with fakes(directory) as pair, peers_of_a_swarm() as peers:
        hosts = []
        for fake in pair:
            nodes = await open_nodes(peers, 2)
            node, ref, sink = nodes[not local], ref_of(nodes[not local].id, fake), Sink()
            node.service.host(ref, fake, BOUNDS)
            node.service.host(behind(ref), sink, BOUNDS)
            hosts.append(Called(nodes[0].service.caller(ref), ref, None if ref.is_tail else sink))
        yield hosts[0], hosts[1]
        for host in hosts:
            host.check()


MAKERS = {
    "fake": fakes,
    "engine": engines,
    "thread": threads,
    "local": partial(called, local=True),
    "remote": partial(called, local=False),
}
