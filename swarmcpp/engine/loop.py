"""The engine loop: receive, then plan, run and commit one step, as long as there is work.

Single-threaded and synchronous. It reaches the model through `WholeBackend` and its node through `EngineLink`, so the
same loop runs under a fake model, in a benchmark without HTTP, and in a worker process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from swarmcpp.core import Chunk, Clock, EngineStats, Rows
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.engine.backend import OpenArena, WholeBackend, opens
from swarmcpp.engine.prefix import Placement, pack, place
from swarmcpp.engine.scheduler import Scheduler
from swarmcpp.engine.sequence import gap
from swarmcpp.engine.slots import Running, Slot, Waiting
from swarmcpp.engine.speculation import NONE, Speculation, drawn_tokens
from swarmcpp.errors import DecodeAborted, PromptTooLong, SwarmError
from swarmcpp.telemetry import diag
from swarmcpp.wire.engine import (
    BlocksFull,
    BlocksStored,
    Cancel,
    EngineLink,
    Forget,
    Refused,
    StepOut,
    Stop,
    StoreBlocks,
    Submit,
    ToEngine,
    TokenOut,
    UseArena,
)

logger = logging.getLogger(__name__)

IDLE_POLL_S = 5.0
"""How long an idle engine sleeps in its inbox before it checks its invariants again."""

OFFER_S = 0.005
"""How long an engine that has nothing to compute leaves its node for an answer about blocks, before it lets the slot
that has them go. One that computes leaves it a step."""


class Engine:
    """Owner of the slots and of everything that waits for one.

    `block_tokens` is the unit in which beginnings of prompts are reused, 0 for not at all.
    """

    def __init__(
        self,
        backend: WholeBackend,
        link: EngineLink,
        scheduler: Scheduler,
        abort: AbortFlag,
        clock: Clock,
        *,
        block_tokens: int = 0,
        open_arena: OpenArena = lambda _message: None,
        speculation: Speculation = NONE,
    ) -> None:
        self._backend = backend
        self._speculation = speculation
        self._open_arena = open_arena
        self._link = link
        self._scheduler = scheduler
        self._abort = abort
        self._clock = clock
        self._block_tokens = block_tokens
        self._slots = [Slot(index) for index in range(backend.n_slots)]
        self._waiting: deque[Waiting] = deque()
        self._refused: list[Refused] = []
        self._batch: frozenset[int] = frozenset()
        """Serials that were first in line when nothing ran, one for each slot."""
        self._reported: tuple[int, int] = (0, 0)
        self._full: list[BlocksFull] = []
        self._calls = 0
        self._uses = 0
        self._decode_tps = 0.0
        self._arena = False
        self.stopped = False

    # -- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Work until Stop arrives."""
        while not self.stopped:
            running = any(slot.running for slot in self._slots)
            self.receive(0.0 if running else OFFER_S if self._waiting else IDLE_POLL_S)
            if self.busy:
                self.step()
            else:
                self.check_integrity()

    def step(self) -> None:
        """One step: plan, then run and commit each call."""
        offered = [slot for slot in self._slots if slot.offered]
        self._close_gap()
        self._admit()
        for slot in offered:
            slot.offered = False
        # The first tokens of long prompts are a long time away.
        self._report(())
        plan = self._scheduler.plan([view for slot in self._slots if (view := slot.view())])
        for group in self._speculation.widen(plan.decode, self._running, self._scheduler.cost):
            seconds = self._run(group, decode=True)
            if seconds is not None:
                self._pace(self._commit(group), seconds)
        for group in plan.prefill:
            if self._run(group, decode=False) is not None:
                self._commit(group)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting) or any(slot.running for slot in self._slots)

    def receive(self, timeout_s: float) -> None:
        """Take every message that is there, waiting up to `timeout_s` for the first."""
        message = self._link.receive(timeout_s)
        while message is not None:
            self.handle(message)
            message = self._link.receive(0.0)
        # After a cancel no step may follow that would tell of the free slot.
        self._report(())

    def handle(self, message: ToEngine) -> None:
        """Apply one message from the node."""
        match message:
            case Submit():
                self._submit(message)
            case Cancel(serial=serial):
                self._cancel(serial)
            case StoreBlocks():
                self._store(message)
            case Forget():
                self._forget()
            case UseArena():
                self._arena = opens(self._open_arena, message)
            case Stop():
                self.stopped = True
            case _:
                logger.warning("ignoring a %s message in mid-service", type(message).__name__)

    # -- admission -----------------------------------------------------------------------------------------------

    def _submit(self, message: Submit) -> None:
        request = message.request
        used = len(request.prompt) + len(request.generated)
        if not 0 < used < self._backend.n_ctx:
            error = PromptTooLong(f"{used} tokens do not fit into a slot of {self._backend.n_ctx}")
            self._refused.append(Refused(message.serial, error.code, str(error)))
            return
        tokens = pack((*request.prompt, *request.generated))
        # Blocks that cannot be reached are not damaged, which loading them in vain would say.
        blocks = message.blocks if self._arena else ()
        self._waiting.append(Waiting(message.serial, request, blocks, tokens, self._clock()))

    def _cancel(self, serial: int) -> None:
        self._waiting = deque(waiting for waiting in self._waiting if waiting.serial != serial)
        for slot in self._slots:
            if slot.running and slot.running.serial == serial:
                self._release(slot)

    def _admit(self) -> None:
        """Give slots to waiting requests, in order; one that waits for another's prefix keeps a slot free."""
        busy = sum(1 for slot in self._slots if slot.running)
        free = sum(1 for slot in self._slots if not slot.busy)
        count = self._scheduler.admissions(free, busy, len(self._waiting))
        chosen = list(self._waiting)[:count]
        if not busy:
            self._batch = frozenset(waiting.serial for waiting in list(self._waiting)[: len(self._slots)])
        elif not chosen:
            # A static batch runs. Those of it that wait for another's prefix or an offered slot still belong to it.
            chosen = [waiting for waiting in self._waiting if waiting.serial in self._batch]
        for waiting in chosen:
            held = [slot.as_held() for slot in self._slots]
            salt = waiting.request.cache_salt
            placement = place(waiting.tokens, salt, len(waiting.blocks), held, self._block_tokens)
            if placement is not None:
                self._waiting.remove(waiting)
                self._start(waiting, placement)

    def _start(self, waiting: Waiting, placement: Placement) -> None:
        slot = self._slots[placement.slot]
        cached = self._fetch(waiting, placement, slot)
        request = waiting.request
        now = self._clock()
        self._uses += 1
        slot.held, slot.salt, slot.last_used = waiting.tokens, request.cache_salt, self._uses
        slot.serial = waiting.serial
        slot.running = Running(
            serial=waiting.serial,
            request=request,
            sampler=self._backend.sampler(request),
            tokens=[*request.prompt, *request.generated],
            queue_s=now - waiting.arrived_s,
            begun_s=now,
            n_past=cached,
            cached=cached,
            tier=placement.tier if cached else "",
            bad_blocks=placement.tier == "arena" and cached < placement.tokens,
        )

    def _close_gap(self) -> None:
        """Move the last decoding slot into a gap between running slots."""
        busy = [slot.index for slot in self._slots if slot.running]
        free = gap(busy, min(busy)) if busy and self._block_tokens else None
        if free is None:
            return
        target, last = self._slots[free], self._slots[max(busy)]
        running = self._running(last.index)
        if target.offered or not running.worth_a_move:
            return
        self._backend.copy_prefix(last.index, target.index, running.n_past)
        self._backend.truncate(last.index, 0)
        target.take(last)

    def _fetch(self, waiting: Waiting, placement: Placement, slot: Slot) -> int:
        """Bring the cached beginning of a prompt into `slot`; tokens that are there now."""
        count, known = placement.tokens, len(waiting.blocks)
        if placement.tier == "arena":
            loaded = self._backend.load_blocks(slot.index, waiting.blocks[: count // self._block_tokens])
            slot.stored = loaded
            return loaded * self._block_tokens
        if placement.source is not None:
            source = self._slots[placement.source]
            self._backend.copy_prefix(source.index, slot.index, count)
            known = max(known, source.stored)
        elif placement.tier == "slot":
            known = max(known, slot.stored)
            self._backend.truncate(slot.index, count)
        else:
            self._backend.truncate(slot.index, 0)
        slot.stored = min(known, count // self._block_tokens) if self._block_tokens else 0
        return count

    def _release(self, slot: Slot) -> None:
        """End a slot's request. Its KV stays, since the next request may go on from it."""
        if slot.running:
            self._announce(slot)
            self._speculation.forget(slot.running)
            slot.free(keep=self._block_tokens > 0 and slot.salt is not None)
            self._backend.truncate(slot.index, slot.left)

    # -- a step --------------------------------------------------------------------------------------------------

    def _run(self, chunks: Sequence[Chunk], *, decode: bool) -> float | None:
        """Compute `chunks` in one call; its seconds, or None when the node aborted it, with the KV as it was before."""
        rows = [Rows(chunk.slot, chunk.start, self._running(chunk.slot).rows(chunk), chunk.outputs) for chunk in chunks]
        self._calls += 1
        begun = self._clock()
        # Nobody may abort a decode call: it is short, and most of it is others' work.
        self._abort.begin(self._calls, [] if decode else [self._running(chunk.slot).serial for chunk in chunks])
        try:
            self._backend.decode(rows)
        except DecodeAborted:
            for chunk in chunks:
                self._backend.truncate(chunk.slot, chunk.start)
            return None
        finally:
            self._abort.end()
        seconds = self._clock() - begun
        self._scheduler = self._scheduler.learned(chunks, seconds, decode=decode)
        event = "BatchGenerate" if decode else "chunk fused"
        rows_of = sum(chunk.count for chunk in chunks)
        diag(logger, event, batch_size=len(chunks), rows=rows_of, ms=round(1000 * seconds, 3))
        return seconds

    def _pace(self, tokens: int, seconds: float) -> None:
        if seconds > 0:
            rate = tokens / seconds
            self._decode_tps += 0.2 * (rate - self._decode_tps) if self._decode_tps else rate

    def _commit(self, chunks: Sequence[Chunk]) -> int:
        """Advance the slots of a call, sample where logits were asked for, and report; how many tokens came."""
        for chunk in chunks:
            self._running(chunk.slot).n_past += chunk.count
        told = [self._sample(chunk) for chunk in chunks if chunk.last]
        self._report(told)
        return sum(len(each.part.tokens) for each in told)

    def _sample(self, chunk: Chunk) -> TokenOut:
        slot, backend = self._slots[chunk.slot], self._backend
        running = self._running(slot.index)
        first = not running.sampled
        drawn = drawn_tokens(chunk.guesses, lambda output: backend.sample(running.sampler, slot.index, output))
        part = running.accept(drawn, backend.eog_tokens, backend.n_ctx, self._clock())
        part = self._speculation.verified(running, part)
        # Of the guesses only those stay that were right; the token behind them has no row yet.
        running.n_past -= chunk.outputs - len(part.tokens)
        if first:
            self._announce(slot)
        if part.finish:
            self._release(slot)
        elif len(part.tokens) < chunk.outputs:
            backend.truncate(slot.index, running.n_past)
        return TokenOut(running.serial, part)

    def _running(self, index: int) -> Running:
        running = self._slots[index].running
        if running is None:
            raise SwarmError(f"slot {index} is planned but free")
        return running

    # -- blocks --------------------------------------------------------------------------------------------------

    def _announce(self, slot: Slot) -> None:
        """Offer the node the full blocks that its arena may not have; it answers with StoreBlocks."""
        running = slot.running
        if not self._arena or running is None or slot.salt is None:
            return
        full = running.n_past // self._block_tokens
        if full > slot.stored:
            tokens = tuple(running.tokens[: full * self._block_tokens])
            self._full.append(BlocksFull(running.serial, slot.salt, tokens, slot.stored))
            slot.stored = full
            slot.offered = True

    def _forget(self) -> None:
        self._full.clear()
        self._waiting = deque(replace(waiting, blocks=()) for waiting in self._waiting)
        for slot in self._slots:
            # Without its serial it writes no blocks that were granted before.
            slot.salt, slot.serial, slot.offered = None, 0, False
            if slot.running is None:
                slot.held, slot.left, slot.stored = b"", 0, 0
                self._backend.truncate(slot.index, 0)

    def _store(self, message: StoreBlocks) -> None:
        """Write the granted blocks if a slot still holds them."""
        slot = next((slot for slot in self._slots if slot.serial == message.serial), None)
        last = max((number for number, _ in message.grants), default=-1)
        written: list[tuple[int, bytes]] = []
        if slot is not None and (last + 1) * self._block_tokens <= slot.n_past:
            written = self._backend.store_blocks(slot.index, message.grants)
            slot.offered = False
        self._link.send(BlocksStored(serial=message.serial, written=tuple(written)))

    # -- reports -------------------------------------------------------------------------------------------------

    def _report(self, tokens: Sequence[TokenOut]) -> None:
        """Send what is new: tokens, refusals, how many slots are busy and how many requests wait."""
        refused, self._refused = tuple(self._refused), []
        stats = self.stats()
        load = (stats.slots_busy, stats.waiting)
        if tokens or refused or load != self._reported:
            self._reported = load
            self._link.send(StepOut(tokens=tuple(tokens), stats=stats, refused=refused))
        # After the tokens: readers come first.
        full, self._full = self._full, []
        for message in full:
            self._link.send(message)

    def stats(self) -> EngineStats:
        """Counts and rates now."""
        row_s = self._scheduler.cost.prefill_row_s
        return EngineStats(
            slots=len(self._slots),
            slots_busy=sum(1 for slot in self._slots if slot.running),
            waiting=len(self._waiting),
            prefill_tps=1.0 / row_s if row_s else 0.0,
            decode_tps=self._decode_tps,
            calls=self._calls,
        )

    def check_integrity(self) -> None:
        """Compare every slot's books with llama.cpp's. Raises SwarmError when they differ."""
        for slot in self._slots:
            held = self._backend.length(slot.index)
            if held != slot.n_past:
                raise SwarmError(f"slot {slot.index} holds {held} tokens in llama.cpp and {slot.n_past} in its books")
