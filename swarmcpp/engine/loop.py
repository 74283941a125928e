"""The engine loop: receive, then plan, run and commit one step, as long as there is work.

Single-threaded and synchronous. It reaches the model through `core.Backend` and its node through `wire.EngineLink`, so
the same loop runs under a fake model, in a benchmark without HTTP, and in a worker process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from swarmcpp.core import Backend, Clock, EngineStats, FinishReason, Rows, StepPlan
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
        self._steps = 0
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
        """One step: plan, run, commit."""
        self._admit()
        plan = self._scheduler.plan([view for slot in self._slots if (view := slot.view())])
        if plan.rows and self._run(plan):
            self._commit(plan)

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

    def _run(self, plan: StepPlan) -> bool:
        """Compute `plan`; False when the node aborted it, with the KV as it was before."""
        rows, prompts = self._rows(plan)
        self._steps += 1
        begun = self._clock()
        self._abort.begin(self._steps, prompts)
        try:
            self._backend.decode(rows)
        except DecodeAborted:
            for part in rows:
                self._backend.truncate(part.slot, part.start)
            return False
        finally:
            self._abort.end()
        seconds = self._clock() - begun
        self._scheduler = self._scheduler.learned(plan, seconds)
        if plan.decode and seconds > 0:
            rate = len(plan.decode) / seconds
            self._decode_tps += 0.2 * (rate - self._decode_tps) if self._decode_tps else rate
        return True

    def _rows(self, plan: StepPlan) -> tuple[list[Rows], list[int]]:
        """The batch of a plan, decode rows first, and the serials of its prompts."""
        rows: list[Rows] = []
        prompts: list[int] = []
        for row in plan.decode:
            running = self._running(row.slot)
            rows.append(Rows(row.slot, running.n_past, running.tokens[running.n_past :], output=True))
        for chunk in plan.prefill:
            running = self._running(chunk.slot)
            tokens = running.tokens[chunk.start : chunk.start + chunk.count]
            rows.append(Rows(chunk.slot, chunk.start, tokens, output=chunk.last))
            prompts.append(running.serial)
        return rows, prompts

    def _commit(self, plan: StepPlan) -> None:
        """Advance every slot of the step, sample where logits were asked for, and report."""
        for row in plan.decode:
            self._running(row.slot).n_past += 1
        for chunk in plan.prefill:
            self._running(chunk.slot).n_past += chunk.count
        ends = [row.slot for row in plan.decode] + [chunk.slot for chunk in plan.prefill if chunk.last]
        self._report([self._sample(self._slots[index]) for index in ends])

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
            steps=self._steps,
        )

    def check_integrity(self) -> None:
        """Compare every slot's books with llama.cpp's. Raises SwarmError when they differ."""
        for slot in self._slots:
            expected = slot.running.n_past if slot.running else 0
            held = self._backend.length(slot.index)
            if held != expected:
                raise SwarmError(f"slot {slot.index} holds {held} tokens in llama.cpp and {expected} in its books")
