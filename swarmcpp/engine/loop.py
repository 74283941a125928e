"""The engine loop: receive, then plan, run and commit one step, as long as there is work.

Single-threaded and synchronous. It reaches the model through `core.Backend` and its node through `wire.EngineLink`, so
the same loop runs under a fake model, in a benchmark without HTTP, and in a worker process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from swarmcpp.core import Backend, Chunk, Clock, EngineStats, FinishReason, Rows
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.engine.scheduler import Scheduler
from swarmcpp.engine.slots import Running, Slot, Waiting
from swarmcpp.errors import DecodeAborted, PromptTooLong, SwarmError
from swarmcpp.wire import Cancel, EngineLink, Refused, StepOut, Stop, Submit, ToEngine, TokenOut

logger = logging.getLogger(__name__)

IDLE_POLL_S = 5.0
"""How long an idle engine sleeps in its inbox before it checks its invariants again."""


class Engine:
    """Owner of the slots and of everything that waits for one."""

    def __init__(
        self, backend: Backend, link: EngineLink, scheduler: Scheduler, abort: AbortFlag, clock: Clock
    ) -> None:
        self._backend = backend
        self._link = link
        self._scheduler = scheduler
        self._abort = abort
        self._clock = clock
        self._slots = [Slot(index) for index in range(backend.n_slots)]
        self._waiting: deque[Waiting] = deque()
        self._refused: list[Refused] = []
        self._calls = 0
        self._decode_tps = 0.0
        self.stopped = False

    # -- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Work until Stop arrives."""
        while not self.stopped:
            self.receive(0.0 if self.busy else IDLE_POLL_S)
            if self.busy:
                self.step()
            else:
                self.check_integrity()

    def step(self) -> None:
        """One step: plan, then run and commit each call."""
        self._admit()
        plan = self._scheduler.plan([view for slot in self._slots if (view := slot.view())])
        if plan.decode and self._run(plan.decode, decode=True):
            self._commit(plan.decode)
        for group in plan.prefill:
            if self._run(group, decode=False):
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
        if self._refused:
            self._report(())

    def handle(self, message: ToEngine) -> None:
        """Apply one message from the node."""
        match message:
            case Submit():
                self._submit(message)
            case Cancel(serial=serial):
                self._cancel(serial)
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
        self._waiting.append(Waiting(message.serial, request, self._clock()))

    def _cancel(self, serial: int) -> None:
        self._waiting = deque(waiting for waiting in self._waiting if waiting.serial != serial)
        for slot in self._slots:
            if slot.running and slot.running.serial == serial:
                self._release(slot)

    def _admit(self) -> None:
        free = [slot for slot in self._slots if not slot.running]
        count = self._scheduler.admissions(len(free), len(self._slots) - len(free), len(self._waiting))
        for slot in free[:count]:
            waiting = self._waiting.popleft()
            request = waiting.request
            now = self._clock()
            slot.running = Running(
                serial=waiting.serial,
                request=request,
                sampler=self._backend.sampler(request),
                tokens=[*request.prompt, *request.generated],
                queue_s=now - waiting.arrived_s,
                admitted_s=now,
            )

    def _release(self, slot: Slot) -> None:
        if slot.running:
            slot.running.sampler.close()
            slot.running = None
            self._backend.truncate(slot.index, 0)

    # -- a step --------------------------------------------------------------------------------------------------

    def _run(self, chunks: Sequence[Chunk], *, decode: bool) -> bool:
        """Compute `chunks` in one call; False when the node aborted it, with the KV as it was before."""
        rows = [
            Rows(
                chunk.slot,
                chunk.start,
                self._running(chunk.slot).tokens[chunk.start : chunk.start + chunk.count],
                chunk.last,
            )
            for chunk in chunks
        ]
        self._calls += 1
        begun = self._clock()
        # Nobody may abort a decode call: it is short, and most of it is others' work.
        self._abort.begin(self._calls, [] if decode else [self._running(chunk.slot).serial for chunk in chunks])
        try:
            self._backend.decode(rows)
        except DecodeAborted:
            for chunk in chunks:
                self._backend.truncate(chunk.slot, chunk.start)
            return False
        finally:
            self._abort.end()
        self._learn(chunks, self._clock() - begun, decode=decode)
        return True

    def _learn(self, chunks: Sequence[Chunk], seconds: float, *, decode: bool) -> None:
        self._scheduler = self._scheduler.learned(chunks, seconds, decode=decode)
        if decode and seconds > 0:
            rate = len(chunks) / seconds
            self._decode_tps += 0.2 * (rate - self._decode_tps) if self._decode_tps else rate

    def _commit(self, chunks: Sequence[Chunk]) -> None:
        """Advance the slots of a call, sample where logits were asked for, and report."""
        for chunk in chunks:
            self._running(chunk.slot).n_past += chunk.count
        self._report([self._sample(self._slots[chunk.slot]) for chunk in chunks if chunk.last])

    def _sample(self, slot: Slot) -> TokenOut:
        running = self._running(slot.index)
        token = self._backend.sample(running.sampler, slot.index)
        running.tokens.append(token)
        running.sampled += 1
        finish = self._finish(running, token)
        first = running.sampled == 1
        out = TokenOut(
            serial=running.serial,
            token=token,
            finish=finish,
            queue_s=running.queue_s if first else 0.0,
            prefill_s=self._clock() - running.admitted_s if first else 0.0,
        )
        if finish:
            self._release(slot)
        return out

    def _finish(self, running: Running, token: int) -> FinishReason | None:
        request = running.request
        if token in self._backend.eog_tokens and not request.sampling.ignore_eos:
            return "stop"
        if len(request.generated) + running.sampled >= request.max_tokens:
            return "length"
        return "length" if len(running.tokens) >= self._backend.n_ctx else None

    def _running(self, index: int) -> Running:
        running = self._slots[index].running
        if running is None:
            raise SwarmError(f"slot {index} is planned but free")
        return running

    # -- reports -------------------------------------------------------------------------------------------------

    def _report(self, tokens: Sequence[TokenOut]) -> None:
        refused, self._refused = tuple(self._refused), []
        if tokens or refused:
            self._link.send(StepOut(tokens=tuple(tokens), stats=self.stats(), refused=refused))

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
            expected = slot.running.n_past if slot.running else 0
            held = self._backend.length(slot.index)
            if held != expected:
                raise SwarmError(f"slot {slot.index} holds {held} tokens in llama.cpp and {expected} in its books")
