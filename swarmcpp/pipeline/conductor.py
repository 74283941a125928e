"""The head of a pipeline: admits requests, finds a chain of stages for each, and another one when that fails.

It looks like `LocalReplica`: a place where requests run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from swarmcpp.core import Clock, EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import NotReady, PeerLost, QueueFull, StageFailed
from swarmcpp.peers import Load
from swarmcpp.pipeline.finding import PATIENCE_S, ChainFinder
from swarmcpp.pipeline.lanes import Lane
from swarmcpp.pipeline.opening import close_all, open_all, store_all
from swarmcpp.pipeline.runs import Broken, Chain, ModelFacts, PipelinePolicy, Run, Surroundings
from swarmcpp.supervisor.runner import Fetch, admitted, deadline
from swarmcpp.telemetry import RateEma, diag
from swarmcpp.wire.peers import SEQUENCE_BYTES

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Between two looks for a chain, or for a free sequence."""

MAX_FAILURES = 5
"""Failures in a row, without a token in between, after which a request is given up."""

CLOSING_S = 2.0
"""What the end of a head waits for its sequences to be closed; stages sweep the rest."""


class Conductor:
    """Runs requests through chains of stages. Used on the event loop's thread; nothing blocks it."""

    def __init__(
        self,
        facts: ModelFacts,
        policy: PipelinePolicy,
        around: Surroundings,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pause` waits so many seconds, or less when what `routes` knows has changed."""
        self._facts = facts
        self._policy = policy
        self._around = around
        self._clock = clock
        self._pause = pause
        self._finder = ChainFinder(facts, around.routes, clock)
        self._serial = 0
        self._runs: dict[int, Run] = {}
        self._lanes: dict[Chain, Lane] = {}
        self._seats = asyncio.Semaphore(policy.slots)
        self._line = asyncio.Lock()
        self._in_line = 0
        """Requests that found a stage full and wait in line for it."""
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._decode = RateEma(half_life_s=10.0, expiry_s=600.0, clock=clock)
        self._prefill = RateEma(half_life_s=10.0, expiry_s=600.0, clock=clock)

    # -- as a replica ----------------------------------------------------------------------------------------------

    @property
    def ctx_size(self) -> int:
        """Tokens of a sequence."""
        return self._facts.ctx_size

    @property
    def slots(self) -> int:
        """Requests that run side by side."""
        return self._policy.slots

    @property
    def ahead(self) -> int:
        """Requests that run or wait."""
        return len(self._runs)

    @property
    def usable(self) -> bool:
        """Whether requests can be submitted, if only for stages that are about to come back."""
        try:
            self._finder.check()
        except NotReady:
            return False
        return True

    @property
    def stats(self) -> EngineStats:
        """Counts and rates now; busy slots are requests that are open on stages."""
        streams = sum(len(lane.runs) for lane in self._lanes.values())
        rates = self._prefill.rate() or 0.0, self._decode.rate() or 0.0
        return EngineStats(self.slots, streams, max(0, self.ahead - streams), *rates)

    def load(self, ttft_s: float = 0.0) -> Load:
        """How busy it is."""
        stats = self.stats
        backlog = sum(len(run.tokens) for run in self._runs.values() if not run.sampled)
        return Load(stats.slots_busy, stats.waiting, stats.prefill_tps, stats.decode_tps, ttft_s, backlog)

    def chain(self, request_id: str) -> Chain:
        """The stages that a request runs on; none when it waits for them, or is not there."""
        return next((run.ran for run in self._runs.values() if run.request.id == request_id), ())

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """See `Runner`."""
        self._finder.check()
        return admitted(request, self, self._policy.queue_size)

    async def close(self) -> None:
        """End all requests, and close what is open on stages as far as they answer soon."""
        self._closed = True
        for run in self._runs.values():
            run.tell(Broken(StageFailed("this node ends"), own=True))
            self._give_back(run)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- a request -------------------------------------------------------------------------------------------------

    async def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        """Run an admitted request; closing the generator ends its work on all stages. `fetch` is not used: stages have
        arenas of their own.

        Raises StageFailed, NotReady, and Cancelled when `request.deadline_s` has passed.
        """
        self._serial += 1
        run = Run(
            serial=self._serial,
            request=request,
            tokens=[*request.prompt, *request.generated],
            sequence=os.urandom(SEQUENCE_BYTES),
            arrived_s=self._clock(),
        )
        self._runs[run.serial] = run
        try:
            async with deadline(request.deadline_s):
                await self._seats.acquire()
                run.seated = True
                await self._place(run)
                while True:
                    got = await run.parts.get()
                    if isinstance(got, Broken):
                        self._note(run, got.error, own=got.own)
                        await self._place(run)
                        continue
                    run.failures = run.broken_links = 0
                    yield got
                    if got.finish:
                        return
        finally:
            self._runs.pop(run.serial, None)
            self._unseat(run)
            self._give_back(run)

    def _unseat(self, run: Run) -> None:
        if run.seated:
            run.seated = False
            self._seats.release()

    def _give_back(self, run: Run, keys: Sequence[bytes] = ()) -> None:
        """Let go of the sequence of `run` on all stages, after the blocks of `keys` were stored."""
        chain, run.chain = run.chain, ()
        if lane := self._lanes.get(chain):
            lane.leave(run)
        if not chain:
            return
        passes, epoch = list(run.passes), run.epoch

        async def close() -> None:
            # A pass that comes to a stage after the close would fail for the others in it.
            if passes:
                await asyncio.wait(passes)
            if keys:
                await store_all(chain, self._around.caller, run.sequence, epoch, keys)
            await close_all(chain, self._around.caller, run.sequence)

        self.spawn(close())

    # -- finding stages --------------------------------------------------------------------------------------------

    async def _place(self, run: Run) -> None:
        """Open a run on a chain, or wait for one. Raises StageFailed and NotReady when that took too much."""
        patient_until: float | None = None
        while True:
            again = max(run.failures, min(run.broken_links, MAX_FAILURES))
            if again > 1:
                # A chain that fails at once must not use up all tries within a moment.
                await self._pause(POLL_S * 2 ** (again - 2))
            try:
                return self._join(run, await self._opened(run))
            except (NotReady, StageFailed) as error:
                if isinstance(error, StageFailed):
                    self._note(run, error, own=error.reason != NotReady.code)
                    if error.reason != NotReady.code or self._finder.has_other():
                        continue
                now = self._clock()
                patient_until = now + PATIENCE_S if patient_until is None else patient_until
                if now >= patient_until:
                    raise
                await self._pause(POLL_S)

    def _join(self, run: Run, position: int) -> None:
        """Let a run compute that is open, and whose first `position` tokens all stages hold."""
        if run.cause is not None:
            node, reason = run.cause.node, run.cause.reason
            run.cause = None
            diag(logger, "pipeline failover", request=run.request.id, node=node, reason=reason, resumed_at=position)
        run.placed(position, self._clock())
        run.ran = run.chain
        lane = self._lanes.get(run.chain)
        if lane is None:
            # Those that nobody uses any more; the last one stays, with what it has learned.
            self._lanes = {chain: each for chain, each in self._lanes.items() if each.runs}
            lane = Lane(run.chain, self._facts, self._policy, self._around, self, self._clock)
            self._lanes[run.chain] = lane
        lane.join(run)

    async def _opened(self, run: Run) -> int:
        """Open a run; while a stage is full, wait in order of arrival. The tokens that all stages hold."""
        if not self._in_line:
            try:
                return await self._open(run)
            except QueueFull:
                pass
        self._in_line += 1
        try:
            async with self._line:
                while True:
                    try:
                        return await self._open(run)
                    except QueueFull:
                        await self._pause(POLL_S)
        finally:
            self._in_line -= 1

    async def _open(self, run: Run) -> int:
        if self._closed:
            raise StageFailed("this node ends")
        chain = self._finder.find(run, self.stats.slots_busy)
        left = tuple(stage for stage in run.chain if stage not in chain)
        if left:
            self.spawn(close_all(left, self._around.caller, run.sequence))
        run.chain = chain
        # Each try has its own: a stage that answered an earlier one refuses what is still on its way from then.
        run.epoch += 1
        request = replace(run.request, generated=tuple(run.tokens[len(run.request.prompt) :]))
        keys = self._around.keys(run.tokens, request.cache_salt)
        return await open_all(chain, self._around.caller, run.sequence, run.epoch, keys, request)

    def _note(self, run: Run, error: StageFailed, *, own: bool) -> None:
        """Remember a failure. Raises it when it is one too many for `run`, or the head ends."""
        run.cause = error
        self._finder.failed(error)
        if own and error.reason == PeerLost.code:
            # Two stages may not have found each other yet, or are about to again.
            run.broken_since = run.broken_since if run.broken_links else self._clock()
            run.broken_links += 1
        elif own:
            run.failures += 1
        too_long = run.broken_links > 1 and self._clock() - run.broken_since >= PATIENCE_S
        if self._closed or run.failures >= MAX_FAILURES or too_long:
            raise error

    # -- lanes.LaneWatch -------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task that ends with the head."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a task of the pipeline failed", exc_info=error)

    def answered(self, run: Run) -> None:
        """See `LaneWatch`."""
        if keys := self._new_keys(run, len(run.tokens) - 1):
            self.spawn(store_all(run.chain, self._around.caller, run.sequence, run.epoch, keys))

    def grown(self, run: Run, n_tokens: int) -> None:
        """See `LaneWatch`."""
        if self._around.copies(run.chain) and (keys := self._new_keys(run, n_tokens)):
            self.spawn(store_all(run.chain, self._around.caller, run.sequence, run.epoch, keys))

    def ended(self, run: Run) -> None:
        """See `LaneWatch`."""
        # Before its reader takes the last token: whoever waits need not wait for that.
        self._unseat(run)
        self._give_back(run, self._new_keys(run, len(run.tokens) - 1))

    def lost(self, lane: Lane) -> None:
        """See `LaneWatch`."""
        if self._lanes.get(lane.chain) is lane:
            del self._lanes[lane.chain]

    def measured(self, rows: int, seconds: float, wall_s: float, *, decode: bool) -> None:
        """See `LaneWatch`."""
        if decode:
            self._decode.add(rows, wall_s)
        else:
            self._prefill.add(rows, seconds)

    def _new_keys(self, run: Run, n_tokens: int) -> list[bytes]:
        """Keys of the full blocks of the first `n_tokens`, whose KV is there (that of the newest token never is), if
        some are not stored yet."""
        keys = self._around.keys(run.tokens[:n_tokens], run.request.cache_salt)
        known, run.stored = run.stored, len(keys)
        return keys if len(keys) > known else []
