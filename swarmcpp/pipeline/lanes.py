"""A lane: all requests of a head that run through one chain of stages, and the passes that are on their way there."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Protocol

from swarmcpp.core import Chunk, Clock, Token
from swarmcpp.engine.scheduler import Policy, Scheduler, SlotView
from swarmcpp.engine.sequence import gap
from swarmcpp.engine.speculation import Plan
from swarmcpp.errors import PeerTimeout, StageFailed, StageLost
from swarmcpp.llama.rows import encode_rows
from swarmcpp.pipeline.contract import Pass, Passed, StageRef
from swarmcpp.pipeline.flights import Flight, follows
from swarmcpp.pipeline.plan import regroup
from swarmcpp.pipeline.runs import Broken, Chain, ModelFacts, PipelinePolicy, Run, Surroundings
from swarmcpp.pipeline.windows import Windows
from swarmcpp.route.patience import FADING, expected_s, limit_s
from swarmcpp.telemetry import diag
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import PassPart

logger = logging.getLogger(__name__)

RECOUNT_S = 2.0
"""For so long a number of micro-batches stays, unless that of streams changes: each cut costs a wait."""

TELL_WITHIN_S = 0.02
"""Readers get their tokens when the first stage has computed the next pass, as its core has nothing to do then, but no
later than this."""

SENT_S = 0.001
"""After this time what was just sent has left. ZeroMQ's thread gets the core only when the loop's has nothing to do."""


class LaneWatch(Protocol):
    """What a lane tells the head."""

    def answered(self, run: Run) -> None:
        """The first token since `run` was opened came: the KV of all tokens before it is there."""
        ...

    def grown(self, run: Run, n_tokens: int) -> None:
        """The KV of the first `n_tokens` of `run` is there, and with it that of another block."""
        ...

    def ended(self, run: Run) -> None:
        """`run` had its last token and has left."""
        ...

    def lost(self, lane: Lane) -> None:
        """Nobody may join `lane` any more."""
        ...

    def measured(self, rows: int, seconds: float, wall_s: float, *, decode: bool) -> None:
        """A pass of `rows` rows took its slowest stage `seconds`, and the head `wall_s` more than passes before."""
        ...


class Lane:
    """Plans and sends the passes of one chain, and hands out what comes back. Used on the event loop's thread."""

    def __init__(
        self,
        chain: Chain,
        facts: ModelFacts,
        policy: PipelinePolicy,
        around: Surroundings,
        watch: LaneWatch,
        clock: Clock,
    ) -> None:
        self.chain = chain
        self._first, self._onward = around.caller(chain[0]), chain[1:]
        self.runs: dict[int, Run] = {}
        """By place."""
        self.groups: list[list[int]] = []
        """Places of each micro-batch."""
        self.broken = False
        self._facts = facts
        self._around = around
        self._watch = watch
        self._clock = clock
        self._persistent = policy.persistent
        self._copy_every = policy.copy_every
        self._encodings: tuple[RowEncoding, RowEncoding] = ("f32", "f32")
        self._window = len(chain) + 1 if policy.persistent else 1
        # A decode row waits behind every chunk that is on its way to the slowest stage.
        budget_s = policy.prefill_budget_s / self._window
        self._scheduler = Scheduler(Policy(policy.prefill_chunk_tokens, budget_s))
        self._windows = Windows(policy, facts, around.guess, clock)
        self._planned: deque[tuple[Chunk, ...]] = deque()
        self._untold: list[Run] = []
        """Runs with tokens that their readers do not have yet."""
        self._telling: asyncio.TimerHandle | None = None
        self._decodes: set[Flight] = set()
        self._prefills = 0
        self._before_first = 0
        """Passes of prompts that the first stage has not computed yet."""
        self._waiting_s = 0.0
        self._longest_s = 0.0
        """What passes took lately; see route/patience.py."""
        self._expected: dict[int, float | None] = {}
        """By rows, until when the clock says so: each asks all that is known of all stages."""
        self._expected_until = 0.0
        self._prompts_turn = False
        self._counted = (0, 1, 0.0)
        """Streams, micro-batches for them, and when that was."""
        self._last_landed = {True: 0.0, False: 0.0}

    @property
    def in_flight(self) -> int:
        """Passes on their way."""
        return len(self._decodes) + self._prefills

    def join(self, run: Run) -> None:
        """Let an opened run compute here."""
        if not self.runs:
            # Not while somebody computes: how rows are rounded on the way must not change within an answer.
            self._encodings = self._around.encodings(self.chain)
        # The lowest free one, as stages number sequences too, so that neighbours here are mostly neighbours there.
        run.place = next(slot for slot in count() if slot not in self.runs)
        self.runs[run.place] = run
        self.pump()

    def leave(self, run: Run) -> None:
        """Forget a run; passes with rows of it go on, and what they bring is not for it."""
        self._windows.forget(run)
        if self.runs.get(run.place) is run:
            del self.runs[run.place]
            self._planned = deque(
                left for group in self._planned if (left := tuple(each for each in group if each.slot != run.place))
            )
            run.place = -1
            self.pump()

    def pump(self) -> None:
        """Send every pass that can be sent now."""
        if self.broken:
            return
        due = self._due()
        if not self._persistent:
            self._pump_one(due)
            return
        for group in due:
            self._send_decode(group)
        while chunk := self._further():
            self._send((chunk,), decode=True)
        while self._may_prefill() and (chunks := self._next_chunks()):
            self._send(chunks, decode=False)

    def _may_prefill(self) -> bool:
        """Whether prompt rows go out now. A few wait for the first stage to be done with those before: what comes
        meanwhile goes along with them, as one pass of many rows is faster than several of few."""
        if self._prefills >= self._window:
            return False
        if not self._before_first or self._planned:
            return True
        return sum(run.remaining for run in self.runs.values()) >= self._scheduler.policy.prefill_chunk_tokens

    def _pump_one(self, due: Sequence[Sequence[Chunk]]) -> None:
        """One pass, of prompts and of decode rows in turn, when none is on its way, nor waits for its guesses."""
        if self.in_flight or any(run.flying for run in self.runs.values()):
            return
        chunks = () if due and not self._prompts_turn else self._next_chunks()
        if chunks:
            self._send(chunks, decode=False)
        elif due:
            self._send_decode(due[0])
        self._prompts_turn = not chunks

    # -- what to send ----------------------------------------------------------------------------------------------

    def _due(self) -> list[list[Chunk]]:
        """Decode rows of micro-batches that are wholly back."""
        self._close_gap()
        members = sorted(slot for slot, run in self.runs.items() if run.decoding)
        wanted = self._micro_batches(len(members))
        self.groups = regroup(self.groups, members, wanted)
        ready = [group for group in self.groups if not any(self.runs[slot].flying for slot in group)]
        # What is void still flies, and makes nobody wait.
        room = max(0, wanted - sum(1 for flight in self._decodes if self._live(flight)))
        return [[Chunk(slot, self.runs[slot].n_past, 1, last=True) for slot in group] for group in ready[:room]]

    def _close_gap(self) -> None:
        """Give the last decoding run the lowest free place, if that is before it; the stages move its KV."""
        free = gap(self.runs)
        if free is None or not self.runs[last := max(self.runs)].worth_a_move:
            return
        # Whoever had that place before may still be in a group.
        self.groups = [[free if place == last else place for place in group if place != free] for group in self.groups]
        run = self.runs[free] = self.runs.pop(last)
        run.place = free

    def _micro_batches(self, streams: int) -> int:
        if not self._persistent or streams < 2:
            return 1
        known, wanted, until = self._counted
        now = self._clock()
        if streams != known or now >= until:
            curves = [self._around.pass_times(stage) for stage in self.chain]
            wanted = self._around.micro_batches(streams, curves, self._around.rtt(self.chain), streams)
            self._counted = (streams, wanted, now + RECOUNT_S)
            diag(logger, "micro-batches", streams=streams, count=wanted)
        return self._counted[1]

    def _next_chunks(self) -> tuple[Chunk, ...]:
        """Prompt rows of the next pass; none when all is planned."""
        if not self._planned:
            views = [view for run in self.runs.values() if run.remaining and (view := run.view(run.place))]
            if not views:
                return ()
            plan = self._prompt_scheduler(views).plan(views)
            self._planned.extend(plan.prefill)
            for group in plan.prefill:
                for chunk in group:
                    self.runs[chunk.slot].n_past += chunk.count
        return self._planned.popleft() if self._planned else ()

    def _prompt_scheduler(self, views: Sequence[SlotView]) -> Scheduler:
        """The first chunks and the last ones are short: while the last stage waits for those, and all others after
        these, the chain is not full. In between longer ones are faster."""
        policy = self._scheduler.policy
        left = sum(view.remaining for view in views)
        if len(self.chain) == 1 or (self.in_flight and left > policy.prefill_chunk_tokens):
            return self._scheduler
        return replace(self._scheduler, policy=replace(policy, prefill_chunk_tokens=policy.tile))

    # -- a pass ----------------------------------------------------------------------------------------------------

    def _send_decode(self, chunks: Sequence[Chunk]) -> None:
        """Send a micro-batch, with as many guesses as pay. Until a model has made them its runs count as on their
        way."""
        plan = self._windows.plan(chunks, self.runs, len(self.groups), self._scheduler.cost)
        waiting = [(self.runs[chunk.slot], self.runs[chunk.slot].stamp, chunk) for chunk in chunks]
        if self._windows.ask(plan, lambda: self._guessed(waiting, plan)):
            for run, _, _ in waiting:
                run.flying += 1
            return
        self._send_widened(chunks, plan)

    def _guessed(self, waiting: Sequence[tuple[Run, tuple[int, int], Chunk]], plan: Plan | None) -> None:
        """Guesses have come for a micro-batch, or will not come. Of one that is not what it was another is made."""
        same = not self.broken
        for run, stamp, chunk in waiting:
            if run.stamp == stamp:
                run.flying -= 1
            same = same and run.stamp == stamp and self.runs.get(chunk.slot) is run
        if same:
            self._send_widened([chunk for _, _, chunk in waiting], plan)
        self.pump()

    def _send_widened(self, chunks: Sequence[Chunk], plan: Plan | None) -> None:
        for group in self._windows.widened(chunks, plan):
            self._send(group, decode=True)

    def _further(self) -> Chunk | None:
        """A window of guesses that need not wait for the one before. Where there are other streams, their rows fill the
        chain."""
        alone = self._persistent and [len(group) for group in self.groups] == [1]
        return self._windows.further(self.runs[self.groups[0][0]], self._scheduler.cost) if alone else None

    def _send(self, chunks: Sequence[Chunk], *, decode: bool) -> None:
        parts = tuple((self.runs[chunk.slot], self.runs[chunk.slot].stamp, chunk) for chunk in chunks)
        rows = sum(chunk.count for chunk in chunks)
        expected = self._expected_s(rows)
        self._waiting_s += expected or 0.0
        known = None if expected is None else max(self._waiting_s, self._longest_s)
        limit = limit_s(known, len(self.chain))
        loop = asyncio.get_running_loop()
        flight = Flight(parts, decode, self._clock(), expected or 0.0, loop.create_future(), alone=not self.in_flight)
        if decode:
            self._decodes.add(flight)
        else:
            self._prefills += 1
            self._before_first += 1
        flight.timer = loop.call_later(limit, self._give_up, flight, limit)
        for run, _, chunk in parts:
            run.passes.add(flight.over)
            if decode:
                run.sent(chunk)
        try:
            self._first.begin(self._pass(parts, limit), partial(self._ended, flight), partial(self._computed, flight))
        except Exception as error:
            logger.exception("a pass could not be begun")
            failure = self._failed(self.chain[0], "internal", f"could not be asked: {error}")
            loop.call_soon(self._ended, flight, failure)

    def _give_up(self, flight: Flight, limit_s: float) -> None:
        # Each hop gives up sooner and names the next one; so it is the first stage that is silent.
        what = f"did not end a pass within {limit_s:g} s"
        self._ended(flight, self._failed(self.chain[0], PeerTimeout.code, what))

    def _pass(self, parts: Sequence[tuple[Run, tuple[int, int], Chunk]], limit: float) -> Pass:
        tokens = [token for run, _, chunk in parts for token in run.rows(chunk)]
        wanted = tuple(
            PassPart(
                run.sequence,
                stamp[0],
                chunk.start,
                chunk.count,
                chunk.outputs,
                chunk.slot,
                chunk.guesses,
                chunk.follows,
            )
            for run, stamp, chunk in parts
        )
        first, onward = self._encodings
        return Pass(wanted, first, encode_rows(self._around.embed(tokens), first), self._onward, onward, limit)

    def _expected_s(self, rows: int) -> float | None:
        """Seconds that a pass of `rows` rows takes, as of RECOUNT_S ago at most; None when some are not measured."""
        now = self._clock()
        if now >= self._expected_until:
            self._expected.clear()
            self._expected_until = now + RECOUNT_S
        if rows not in self._expected:
            computing = expected_s([self._around.pass_times(stage) for stage in self.chain], rows)
            self._expected[rows] = None if computing is None else computing + self._around.rtt(self.chain)
        return self._expected[rows]

    def _ended(self, flight: Flight, result: Passed | StageFailed) -> None:
        """Take what came of a pass, and send what can be sent now; only the first end of a pass counts."""
        if flight.over.done():
            return
        if flight.timer:
            flight.timer.cancel()
        flight.over.set_result(None)
        self._tell()
        self._leave_first(flight)
        self._landed(flight)
        try:
            if isinstance(result, Passed):
                tokens = self._checked_tokens(flight, result)
                now = self._clock()
                self._commit(flight, tokens, now)
                # Before anything else: the stages wait for it.
                self.pump()
                self._learn(flight, result, now)
            else:
                self._fail(flight, result)
        except StageFailed as error:
            self._fail(flight, error)
        except Exception as error:
            logger.exception("a pass failed")
            self._fail(flight, self._failed(self.chain[0], "internal", f"failed a pass: {error}"))
        self.pump()
        self._tell_soon()

    def _checked_tokens(self, flight: Flight, passed: Passed) -> dict[int, tuple[Token, ...]]:
        """The tokens of each part (by its index) that asked for some. Raises StageFailed."""
        wanted = [index for index, (_, _, chunk) in enumerate(flight.parts) if chunk.last]
        told = [token.id for tokens in passed.tokens for token in tokens]
        sound = len(passed.tokens) == len(wanted) and all(0 <= each < self._facts.n_vocab for each in told)
        # The rows behind a token are of what was guessed: it must be that, unless it is the last one.
        chunks = [flight.parts[index][2] for index in wanted]
        if not sound or not all(map(follows, passed.tokens, chunks)):
            raise self._failed(self.chain[-1], "wire", "answered a pass with tokens that cannot be")
        return dict(zip(wanted, passed.tokens, strict=True))

    def _computed(self, flight: Flight) -> None:
        """This node has nothing to compute for a pass any more."""
        self._leave_first(flight)
        if any(run.remaining for run in self.runs.values()):
            self.pump()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = asyncio.get_running_loop().call_later(SENT_S, self._tell)

    def _leave_first(self, flight: Flight) -> None:
        if not flight.past_first:
            flight.past_first = True
            self._before_first -= not flight.decode

    def _tell(self) -> None:
        """Hand readers what they do not have yet."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        untold, self._untold = self._untold, []
        for run in untold:
            run.hand_out()

    def _tell_soon(self) -> None:
        """Let readers have their tokens soon (see TELL_WITHIN_S); first and last ones at once."""
        if not self._untold:
            return
        loop = asyncio.get_running_loop()
        urgent = not self.in_flight or any(run.is_waited_for for run in self._untold)
        if urgent:
            loop.call_soon(self._tell)
        elif self._telling is None:
            self._telling = loop.call_later(TELL_WITHIN_S, self._tell)

    @staticmethod
    def _failed(stage: StageRef, reason: str, what: str) -> StageFailed:
        return StageFailed(f"{stage.node} {what}", node=stage.node, reason=reason)

    def _landed(self, flight: Flight) -> None:
        if flight.decode:
            self._decodes.discard(flight)
        else:
            self._prefills -= 1
        self._waiting_s = self._waiting_s - flight.expected_s if self.in_flight else 0.0
        for run, stamp, _ in flight.parts:
            run.passes.discard(flight.over)
            if flight.decode and run.stamp == stamp:
                run.flying -= 1

    def _live(self, flight: Flight) -> list[tuple[int, Run]]:
        """Runs that a pass was for and that still wait for it, with their part's index."""
        return [
            (index, run)
            for index, (run, stamp, _) in enumerate(flight.parts)
            if self.runs.get(run.place) is run and run.stamp == stamp
        ]

    def _learn(self, flight: Flight, passed: Passed, now: float) -> None:
        took = now - flight.begun
        self._longest_s = max(took, FADING * self._longest_s)
        seconds = min(took, max((time.compute_s for time in passed.times), default=took))
        wall_s = now - max(flight.begun, self._last_landed[flight.decode])
        self._last_landed[flight.decode] = now
        self._scheduler = self._scheduler.learned([part[2] for part in flight.parts], seconds, decode=flight.decode)
        if flight.decode and (flight.alone or len(self.groups) > 1):
            # Behind another one it takes what that takes, too.
            self._windows.learn(flight.rows, took)
        self._watch.measured(flight.rows, seconds, wall_s, decode=flight.decode)
        diag(logger, "pipeline pass", rows=flight.rows, parts=len(flight.parts), ms=round(1000 * took, 3))

    def _commit(self, flight: Flight, tokens: dict[int, tuple[Token, ...]], now: float) -> None:
        """Give the runs the tokens of a pass."""
        for index, run in self._live(flight):
            if index not in tokens:
                chunk = flight.parts[index][2]
                self._grow(run, chunk.start, chunk.start + chunk.count)
                continue
            if not tokens[index]:
                raise self._failed(self.chain[-1], "wire", "answered a pass without a token that was due")
            first, before = not run.decoding, len(run.tokens)
            part = run.accept(tokens[index], self._facts.eog_tokens, self._facts.ctx_size, now)
            if flight.decode:
                # Of the guesses only those stay that were right; the next pass has stages forget the others.
                part = self._windows.verified(run, part)
            run.untold.append(part)
            self._untold.append(run)
            if part.finish:
                self._windows.forget(run)
                del self.runs[run.place]
                run.place = -1
                self._watch.ended(run)
            elif first:
                self._watch.answered(run)
            else:
                self._grow(run, before - 1, len(run.tokens) - 1)

    def _grow(self, run: Run, before: int, after: int) -> None:
        every = self._copy_every if self._encodings == ("f32", "f32") else 0
        if every and after // every > before // every:
            self._watch.grown(run, after)

    def _fail(self, flight: Flight, error: StageFailed) -> None:
        """Send all runs elsewhere, unless nobody waits for the pass that failed.

        A stage that lost the KV of one has mostly lost that of all, as its engine was started again.
        """
        own = [run for _, run in self._live(flight)]
        if not own:
            return
        if error.reason != StageLost.code:
            self.broken = True
            self._watch.lost(self)
        for run in list(self.runs.values()):
            self._windows.forget(run)
            run.tell(Broken(error, run in own))
            run.place = -1
        self.runs.clear()
        self._planned.clear()
