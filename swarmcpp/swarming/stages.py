"""Stages of this node and of its peers, joined to chains: each computes its part of a pass and sends it on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from swarmcpp.core import Clock, GenerateRequest
from swarmcpp.errors import (
    EngineFailed,
    NotReady,
    PeerLost,
    PeerTimeout,
    QueueFull,
    StageFailed,
    StageLost,
    SwarmError,
    WireError,
)
from swarmcpp.peers import NodeId
from swarmcpp.peerwire import (
    AskStage,
    Caller,
    CloseSequence,
    Hop,
    OpenSequence,
    PassReply,
    Pong,
    Reply,
    ResumeSequence,
    RunStage,
    SequenceReady,
    StoreSequence,
)
from swarmcpp.stages import Pass, Passed, StageCaller, StageRef, StageTime
from swarmcpp.swarm import stagecall
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.swarm.stagecall import HopTimes, StageBounds, StageHost

CALL_TIMEOUT_S: Final = 20.0
"""Of everything but passes. It waits for those before it at the engine, and `resume` reads blocks from a disk."""

_DOCUMENTED = (StageLost, QueueFull, PeerLost, PeerTimeout, NotReady, EngineFailed, WireError)
"""What `stages.StageCaller` raises."""


class _Turns:
    """Lets passes go on in the order in which they came, whichever is ready first, fails or is cancelled."""

    def __init__(self) -> None:
        self._last: asyncio.Future[None] | None = None

    def take(self) -> _Turn:
        """A turn after all that were taken before; to be used in `with`, whose end gives it up."""
        before, self._last = self._last, asyncio.get_running_loop().create_future()
        return _Turn(before, self._last)


@dataclass(slots=True)
class _Turn:
    before: asyncio.Future[None] | None
    over: asyncio.Future[None]

    async def come(self) -> None:
        """Until it is this one's turn."""
        if self.before is not None and not self.before.done():
            # Not awaited itself, as a cancel would be its end too.
            await asyncio.wait((self.before,))

    def __enter__(self) -> _Turn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.before is None or self.before.done():
            self.over.set_result(None)
        else:
            self.before.add_done_callback(lambda _: self.over.set_result(None))
        # A chain of all turns that ever were would be kept otherwise.
        self.before = None


@dataclass(frozen=True, slots=True)
class _Hosted:
    """A stage of this node."""

    ref: StageRef
    host: StageHost
    bounds: StageBounds
    turns: _Turns = field(default_factory=_Turns)


class StageService:
    """All stages that one node can ask, and its own, which its peers ask. Used on the event loop's thread.

    `callers` gives the link to a peer that can be asked now.
    """

    def __init__(self, node: NodeId, callers: Callable[[NodeId], Caller | None], clock: Clock) -> None:
        self._node = node
        self._callers = callers
        self._clock = clock
        self._times = HopTimes()
        self._hosted: dict[tuple[bytes, Hop], _Hosted] = {}

    def host(self, ref: StageRef, host: StageHost, bounds: StageBounds) -> None:
        """Answer for a stage of this node from now on, which takes the place of one of the same layers."""
        self._hosted[ref.fingerprint, stagecall.hop(ref)] = _Hosted(ref, host, bounds)

    def drop(self, ref: StageRef) -> None:
        """Answer no more for a stage; unknown ones are ignored."""
        self._hosted.pop((ref.fingerprint, stagecall.hop(ref)), None)

    def caller(self, ref: StageRef) -> StageCaller:
        """A stage as its head drives it. Whether it is there shows when it is asked."""
        if ref.node == self._node:
            return LocalStage(ref, self._find, self.caller)
        return RemoteStage(ref, self._callers, self._times, self._clock)

    def _find(self, fingerprint: bytes, hop: Hop) -> _Hosted:
        """A stage of this node. Raises StageLost."""
        hosted = self._hosted.get((fingerprint, hop))
        if hosted is None:
            raise StageLost(f"{stagecall.name(hop)} is not there, or not any more; take another route")
        return hosted

    async def answer(self, message: AskStage, payload: list[memoryview], respond: Responder) -> None:
        """Answer a peer's request to a stage of this node. Raises SwarmError; of passes, the answer tells it."""
        # Nothing is awaited before a pass is in its stage's queue: passes keep the order in which they came.
        if isinstance(message, RunStage):
            respond.send(await self._pass(message, payload))
            return
        respond.send(await self._call(self._find(message.fingerprint, message.stage), message))

    async def _call(
        self, hosted: _Hosted, message: OpenSequence | ResumeSequence | StoreSequence | CloseSequence
    ) -> Reply:
        host, sequence = hosted.host, message.sequence
        match message:
            case OpenSequence(epoch=epoch, keys=keys, n_tokens=n_tokens):
                request = stagecall.checked_open(message, hosted.ref, hosted.bounds)
                return SequenceReady(await host.open(sequence, epoch, keys, request, n_tokens))
            case ResumeSequence(epoch=epoch, n_tokens=n_tokens):
                stagecall.check_call(message, hosted.bounds)
                return SequenceReady(await host.resume(sequence, epoch, n_tokens))
            case StoreSequence(epoch=epoch, keys=keys):
                stagecall.check_call(message, hosted.bounds)
                await host.store(sequence, epoch, keys)
            case CloseSequence():
                await host.close_sequence(sequence)
        return Pong()

    async def _pass(self, message: RunStage, payload: list[memoryview]) -> PassReply:
        try:
            hosted = self._find(message.fingerprint, message.stage)
            work = stagecall.checked_pass(message, payload, hosted.ref, hosted.bounds)
            done = await self.caller(hosted.ref).run(work)
        except StageFailed as error:
            return PassReply(node=error.node, code=error.reason, message=_text(error))
        except SwarmError as error:
            return PassReply(node=self._node, code=error.code, message=_text(error))
        return PassReply(done.ids, tuple((each.compute_s, each.queue_s) for each in done.times))


def _text(error: SwarmError) -> str:
    # What a message carries at most, without what cannot be encoded.
    return str(error).encode("utf-8", "replace").decode()[:1000]


class LocalStage:
    """A stage of this node, which sends on what it computed. Satisfies `stages.StageCaller`."""

    def __init__(
        self, ref: StageRef, find: Callable[[bytes, Hop], _Hosted], caller: Callable[[StageRef], StageCaller]
    ) -> None:
        self._ref = ref
        self._find = find
        self._caller = caller

    def _hosted(self) -> _Hosted:
        return self._find(self._ref.fingerprint, stagecall.hop(self._ref))

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """See `stages.StageCaller`."""
        return await self._hosted().host.open(sequence, epoch, keys, request, n_tokens)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """See `stages.StageCaller`."""
        return await self._hosted().host.resume(sequence, epoch, n_tokens)

    async def run(self, work: Pass) -> Passed:
        """See `stages.StageCaller`. It keeps the order of calls to the next stage too, and waits for its answer."""
        try:
            hosted = self._hosted()
            with hosted.turns.take() as turn:
                ids, rows, *times = await hosted.host.run(work.parts, work.encoding, work.rows, work.wire)
                await turn.come()
                onward = self._onward(work, rows)
        except SwarmError as error:
            raise StageFailed(str(error), node=self._ref.node, reason=error.code) from error
        own = StageTime(*times)
        if onward is None:
            return Passed(ids, (own,))
        rest = await onward
        return Passed(rest.ids, (own, *rest.times))

    def _onward(self, work: Pass, rows: bytes | memoryview | None) -> asyncio.Task[Passed] | None:
        """Begin to send on what came out. Tasks begin in the order in which they are made."""
        if not work.onward:
            return None
        if rows is None:
            raise EngineFailed(f"{stagecall.name(self._ref)} gave no rows to send on")
        following, *rest = work.onward
        then = Pass(work.parts, work.wire, rows, tuple(rest), work.wire)
        return asyncio.create_task(self._caller(following).run(then))

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """See `stages.StageCaller`."""
        await self._hosted().host.store(sequence, epoch, keys)

    async def close(self, sequence: bytes) -> None:
        """See `stages.StageCaller`."""
        await self._hosted().host.close_sequence(sequence)


class RemoteStage:
    """A stage of a peer, over the link to it. Satisfies `stages.StageCaller`."""

    def __init__(
        self, ref: StageRef, callers: Callable[[NodeId], Caller | None], times: HopTimes, clock: Clock
    ) -> None:
        self._ref = ref
        self._callers = callers
        self._times = times
        self._clock = clock

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """See `stages.StageCaller`."""
        ref = self._ref
        asked = OpenSequence(ref.fingerprint, stagecall.hop(ref), sequence, epoch, tuple(keys), n_tokens, request)
        return stagecall.ready_tokens(await self._ask(asked), ref, n_tokens - 1)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """See `stages.StageCaller`."""
        ref = self._ref
        asked = ResumeSequence(ref.fingerprint, stagecall.hop(ref), sequence, epoch, n_tokens)
        return stagecall.ready_tokens(await self._ask(asked), ref, n_tokens)

    async def run(self, work: Pass) -> Passed:
        """See `stages.StageCaller`. The request is sent before anything is waited for."""
        ref, chain, begun = self._ref, (self._ref, *work.onward), self._clock()
        limit_s = self._times.limit_s(chain, work.n_rows)
        try:
            reply, _ = await self._link().ask(
                stagecall.run_message(ref, work), stagecall.frames(work.rows), timeout_s=limit_s
            )
        except SwarmError as error:
            self._times.forget(chain)
            raise StageFailed(str(error), node=ref.node, reason=error.code) from error
        try:
            done = stagecall.passed(reply, ref, work)
        except StageFailed:
            self._times.forget(chain)
            raise
        self._times.add(chain, work.n_rows, self._clock() - begun)
        return done

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """See `stages.StageCaller`."""
        ref = self._ref
        await self._tell(StoreSequence(ref.fingerprint, stagecall.hop(ref), sequence, epoch, tuple(keys)))

    async def close(self, sequence: bytes) -> None:
        """See `stages.StageCaller`."""
        await self._tell(CloseSequence(self._ref.fingerprint, stagecall.hop(self._ref), sequence))

    async def _tell(self, message: StoreSequence | CloseSequence) -> None:
        reply = await self._ask(message)
        if not isinstance(reply, Pong):
            raise WireError(f"{stagecall.name(self._ref)} answers with a {type(reply).__name__}; it was only told")

    async def _ask(self, message: OpenSequence | ResumeSequence | StoreSequence | CloseSequence) -> Reply:
        try:
            reply, _ = await self._link().ask(message, timeout_s=CALL_TIMEOUT_S)
        except _DOCUMENTED:
            raise
        except SwarmError as error:
            # What an honest node asks is not refused as a client's mistake.
            raise WireError(f"{stagecall.name(self._ref)} refuses: {error}") from error
        return reply

    def _link(self) -> Caller:
        caller = self._callers(self._ref.node)
        if caller is None:
            raise PeerLost(f"there is no link to {stagecall.name(self._ref)}")
        return caller
