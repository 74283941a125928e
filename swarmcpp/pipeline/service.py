"""Stages of this node and of its peers, joined to chains: each computes its part of a pass and sends it on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from swarmcpp.pipeline import calls
from swarmcpp.pipeline.calls import StageBounds, StageHost
from swarmcpp.pipeline.contract import Pass, PassDone, Passed, StageCaller, StageRef, StageTime
from swarmcpp.route.patience import hop_s
from swarmcpp.supervisor.books import Computed, GuessDone
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.wire.engine import GuessPart
from swarmcpp.wire.peers import (
    AskStage,
    Caller,
    CloseSequence,
    Hop,
    OfferBlocks,
    OpenSequence,
    PassReply,
    Pong,
    Reply,
    ResumeSequence,
    RunStage,
    SequenceReady,
    StoreSequence,
)

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 20.0
"""Of everything but passes. It waits for those before it at the engine, and `resume` reads blocks from a disk."""

CLOSE_TIMEOUT_S: Final = 120.0
"""Of a close: after so long the stage has closed what nobody uses by itself."""

WATCH_S: Final = 0.25
"""Between looks at whether a node that is asked still gives news of itself."""

_DOCUMENTED = (StageLost, QueueFull, PeerLost, PeerTimeout, NotReady, EngineFailed, WireError)
"""What `contract.StageCaller` raises."""


Guess = Callable[[Sequence[GuessPart], GuessDone], None]
"""Asks the draft model beside a stage. Raises SwarmError; then the second argument is not called."""


@dataclass(frozen=True, slots=True)
class _Hosted:
    """A stage of this node."""

    ref: StageRef
    host: StageHost
    bounds: StageBounds
    guess: Guess | None


class StageService:
    """All stages that one node can ask, and its own, which its peers ask. Used on the event loop's thread.

    `callers` gives the link to a peer that can be asked now; `alive` says whether it still gives news of itself;
    `on_offer` is told of blocks that a peer (who says which) has for a stage of this node.
    """

    def __init__(
        self,
        node: NodeId,
        callers: Callable[[NodeId], Caller | None],
        clock: Clock,
        *,
        alive: Callable[[NodeId], bool] = lambda _node: True,
        on_offer: Callable[[StageRef, NodeId, Sequence[bytes]], None] = lambda _ref, _source, _keys: None,
    ) -> None:
        self._node = node
        self._callers = callers
        self._alive = alive
        self._clock = clock
        self._hosted: dict[tuple[bytes, Hop], _Hosted] = {}
        self._on_offer = on_offer

    def host(self, ref: StageRef, host: StageHost, bounds: StageBounds, guess: Guess | None = None) -> None:
        """Answer for a stage of this node from now on, which takes the place of one of the same layers. `guess` asks
        the draft model beside it."""
        self._hosted[ref.fingerprint, calls.hop(ref)] = _Hosted(ref, host, bounds, guess)

    def drop(self, ref: StageRef) -> None:
        """Answer no more for a stage; unknown ones are ignored."""
        self._hosted.pop((ref.fingerprint, calls.hop(ref)), None)

    def caller(self, ref: StageRef) -> StageCaller:
        """A stage as its head drives it. Whether it is there shows when it is asked."""
        if ref.node == self._node:
            return LocalStage(ref, self._find, self.caller, self._clock)
        return RemoteStage(ref, self._callers, self._alive)

    def guess(self, fingerprint: bytes, parts: Sequence[GuessPart], done: GuessDone) -> bool:
        """Ask the draft model beside a stage of this node; False when there is none now, and `done` is not called."""
        for hosted in self._hosted.values():
            if hosted.ref.fingerprint == fingerprint and hosted.guess:
                with contextlib.suppress(SwarmError):
                    hosted.guess(parts, done)
                    return True
        return False

    def _find(self, fingerprint: bytes, hop: Hop) -> _Hosted:
        """A stage of this node. Raises StageLost."""
        hosted = self._hosted.get((fingerprint, hop))
        if hosted is None:
            raise StageLost(f"{calls.name(hop)} is not there, or not any more; take another route")
        return hosted

    async def answer(self, message: AskStage, respond: Responder) -> None:
        """Answer a peer's request to a stage of this node that is no pass. Raises SwarmError."""
        if isinstance(message, RunStage):
            raise WireError("a pass was asked where passes are not taken")
        respond.send(await self._call(self._find(message.fingerprint, message.stage), message))

    def begin(self, message: RunStage, payload: list[memoryview], respond: Responder) -> None:
        """Begin a pass that a peer asks of a stage of this node. Its one answer says how it ended, whatever happens."""

        def done(result: Passed | StageFailed) -> None:
            if isinstance(result, Passed):
                reply = PassReply(result.tokens, tuple((each.compute_s, each.queue_s) for each in result.times))
            else:
                reply = PassReply(node=result.node, code=result.reason, message=_text(result))
            # Nobody is there to be told when the asker itself is what was lost.
            with contextlib.suppress(PeerLost):
                respond.send(reply)

        try:
            hosted = self._find(message.fingerprint, message.stage)
            work = calls.checked_pass(message, payload, hosted.ref, hosted.bounds)
            self.caller(hosted.ref).begin(work, done)
        except SwarmError as error:
            done(StageFailed(str(error), node=self._node, reason=error.code))
        except Exception:
            logger.exception("a pass could not be begun")
            reason = "the stage failed to take the pass; its log says why"
            done(StageFailed(reason, node=self._node, reason=SwarmError.code))

    async def _call(
        self, hosted: _Hosted, message: OpenSequence | ResumeSequence | StoreSequence | CloseSequence | OfferBlocks
    ) -> Reply:
        if isinstance(message, OfferBlocks):
            self._on_offer(hosted.ref, message.source, message.keys)
            return Pong()
        host, sequence = hosted.host, message.sequence
        match message:
            case OpenSequence(epoch=epoch, keys=keys, n_tokens=n_tokens):
                request = calls.checked_open(message, hosted.ref, hosted.bounds)
                return SequenceReady(await host.open(sequence, epoch, keys, request, n_tokens))
            case ResumeSequence(epoch=epoch, n_tokens=n_tokens):
                calls.check_call(message, hosted.bounds)
                return SequenceReady(await host.resume(sequence, epoch, n_tokens))
            case StoreSequence(epoch=epoch, keys=keys):
                calls.check_call(message, hosted.bounds)
                await host.store(sequence, epoch, keys)
            case CloseSequence():
                await host.close_sequence(sequence)
        return Pong()


def _text(error: SwarmError) -> str:
    # What a message carries at most, without what cannot be encoded.
    return str(error).encode("utf-8", "replace").decode()[:1000]


def _failed(ref: StageRef, error: SwarmError) -> StageFailed:
    return error if isinstance(error, StageFailed) else StageFailed(str(error), node=ref.node, reason=error.code)


def _soon(done: PassDone, error: StageFailed) -> None:
    asyncio.get_running_loop().call_soon(done, error)


def _with_own(own: StageTime, rest: Passed | StageFailed) -> Passed | StageFailed:
    return Passed(rest.tokens, (own, *rest.times)) if isinstance(rest, Passed) else rest


class LocalStage:
    """A stage of this node, which sends on what it computed. Satisfies `contract.StageCaller`."""

    def __init__(
        self,
        ref: StageRef,
        find: Callable[[bytes, Hop], _Hosted],
        caller: Callable[[StageRef], StageCaller],
        clock: Clock,
    ) -> None:
        self._ref = ref
        self._find = find
        self._caller = caller
        self._clock = clock

    def _hosted(self) -> _Hosted:
        return self._find(self._ref.fingerprint, calls.hop(self._ref))

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """See `contract.StageCaller`."""
        return await self._hosted().host.open(sequence, epoch, keys, request, n_tokens)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """See `contract.StageCaller`."""
        return await self._hosted().host.resume(sequence, epoch, n_tokens)

    def begin(self, work: Pass, done: PassDone, computed: Callable[[], None] = lambda: None) -> None:
        """See `contract.StageCaller`. What came out goes to the next stage in the order of the passes, since they end
        in that order here."""
        begun = self._clock()

        def ended(result: Computed | SwarmError) -> None:
            if isinstance(result, SwarmError):
                done(_failed(self._ref, result))
                return
            tokens, rows, compute_s, queue_s = result
            own = StageTime(compute_s, queue_s)
            if not work.onward:
                done(Passed(tokens, (own,)))
            elif rows is None:
                done(_failed(self._ref, EngineFailed(f"{calls.name(self._ref)} gave no rows to send on")))
            elif (left_s := work.limit_s - (self._clock() - begun)) <= 0:
                late = f"{calls.name(self._ref)} took longer than the {work.limit_s:.3g} s that the pass had left"
                done(_failed(self._ref, PeerTimeout(late)))
            else:
                following, *rest = work.onward
                then = Pass(work.parts, work.wire, rows, tuple(rest), work.wire, left_s)
                self._caller(following).begin(then, lambda passed: done(_with_own(own, passed)))
                computed()

        try:
            self._hosted().host.begin(work.parts, work.encoding, work.rows, work.wire, ended)
        except SwarmError as error:
            _soon(done, _failed(self._ref, error))

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """See `contract.StageCaller`."""
        await self._hosted().host.store(sequence, epoch, keys)

    async def close(self, sequence: bytes) -> None:
        """See `contract.StageCaller`."""
        await self._hosted().host.close_sequence(sequence)


class RemoteStage:
    """A stage of a peer, over the link to it. Satisfies `contract.StageCaller`."""

    def __init__(
        self,
        ref: StageRef,
        callers: Callable[[NodeId], Caller | None],
        alive: Callable[[NodeId], bool],
    ) -> None:
        self._ref = ref
        self._callers = callers
        self._alive = alive

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """See `contract.StageCaller`."""
        ref = self._ref
        asked = OpenSequence(ref.fingerprint, calls.hop(ref), sequence, epoch, tuple(keys), n_tokens, request)
        return calls.ready_tokens(await self._ask(asked), ref, n_tokens - 1)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """See `contract.StageCaller`."""
        ref = self._ref
        asked = ResumeSequence(ref.fingerprint, calls.hop(ref), sequence, epoch, n_tokens)
        return calls.ready_tokens(await self._ask(asked), ref, n_tokens)

    def begin(self, work: Pass, done: PassDone, computed: Callable[[], None] = lambda: None) -> None:
        """See `contract.StageCaller`."""
        ref, limit_s = self._ref, hop_s(work.limit_s, 1 + len(work.onward))

        def answered(reply: Reply | SwarmError, _payload: list[memoryview]) -> None:
            try:
                if isinstance(reply, SwarmError):
                    raise _failed(ref, reply)
                passed = calls.passed(reply, ref, work)
            except StageFailed as error:
                done(error)
            else:
                done(passed)

        message = calls.run_message(ref, work, limit_s)
        try:
            self._link().begin(message, calls.frames(work.rows), answered, timeout_s=limit_s)
        except SwarmError as error:
            _soon(done, _failed(ref, error))
        else:
            asyncio.get_running_loop().call_soon(computed)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """See `contract.StageCaller`."""
        ref = self._ref
        asked = StoreSequence(ref.fingerprint, calls.hop(ref), sequence, epoch, tuple(keys))
        self._check_told(await self._ask(asked))

    async def close(self, sequence: bytes) -> None:
        """See `contract.StageCaller`."""
        asked = CloseSequence(self._ref.fingerprint, calls.hop(self._ref), sequence)
        # Never cancelled: a node that was frozen would read both at once, and not begin what is cancelled.
        reply, _ = await asyncio.shield(self._link().ask(asked, timeout_s=CLOSE_TIMEOUT_S))
        self._check_told(reply)

    def _check_told(self, reply: Reply) -> None:
        if not isinstance(reply, Pong):
            raise WireError(f"{calls.name(self._ref)} answers with a {type(reply).__name__}; it was only told")

    async def _ask(self, message: OpenSequence | ResumeSequence | StoreSequence) -> Reply:
        asking = asyncio.ensure_future(self._link().ask(message, timeout_s=CALL_TIMEOUT_S))
        try:
            # A stage may be busy for long, but a node that has frozen says nothing of itself either.
            while not (await asyncio.wait((asking,), timeout=WATCH_S))[0]:
                if not self._alive(self._ref.node):
                    raise PeerTimeout(f"{calls.name(self._ref)} does not answer, and its node gives no news")
            reply, _ = asking.result()
        except _DOCUMENTED:
            raise
        except SwarmError as error:
            # What an honest node asks is not refused as a client's mistake.
            raise WireError(f"{calls.name(self._ref)} refuses: {error}") from error
        finally:
            asking.cancel()
        return reply

    def _link(self) -> Caller:
        caller = self._callers(self._ref.node)
        if caller is None:
            raise PeerLost(f"there is no link to {calls.name(self._ref)}")
        return caller
