"""A node's side of one stage's engine: the sequences that heads have opened there, by name and epoch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Unpack

from swarmcpp.core import TILE_ROWS, Clock, GenerateRequest
from swarmcpp.errors import EngineFailed, NotReady, QueueFull, StageLost, SwarmError, WireError, revive
from swarmcpp.kv.keys import KEY_BYTES
from swarmcpp.supervisor.books import (
    Computed,
    ComputeDone,
    GuessDone,
    Placing,
    StageSequence,
    Underway,
    Waiting,
    next_of,
)
from swarmcpp.supervisor.incarnation import Incarnation
from swarmcpp.supervisor.process import EngineProcess, ProcessOptions
from swarmcpp.wire.codec import Buffer, RowEncoding
from swarmcpp.wire.engine import (
    BlocksStored,
    Cancel,
    EngineOptions,
    FromEngine,
    Guess,
    Guessed,
    GuessPart,
    Place,
    Placed,
    Ran,
    Run,
    RunPart,
    ToEngine,
)
from swarmcpp.wire.peers import SEQUENCE_BYTES, PassPart

IDLE_S = 120.0
"""A sequence that was not used for so long is closed: its head is gone."""

MAX_UNDER_WAY = 1024
"""Messages that the engine may still have to answer: more than any number of heads has a use for, and far below what
the link to the engine holds."""

MAX_BYTES_UNDER_WAY = 256 << 20
"""Of rows in such messages: 32 full passes of the widest common models."""


class StageSupervisor(EngineProcess):
    """Keeps the engine of one stage alive, and the books of its sequences. Every method runs on the event loop of
    `start`.

    Answers as `contract.StageCaller` does, for this stage alone. A sequence is used thus: `open`, then `resume` (also
    with 0 tokens, also when it was open before), then any number of `run` and `store`, then `close_sequence`. When the
    engine dies all sequences are forgotten, and what waits fails with StageLost (EngineFailed, once it is given up).
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        on_pass: Callable[[int, float], None] = lambda _rows, _seconds: None,
        on_stored: Callable[[Sequence[bytes]], None] = lambda _keys: None,
        clock: Clock = time.monotonic,
        **how: Unpack[ProcessOptions],
    ) -> None:
        """`options.stage` must be set. `on_pass` is told rows and seconds of the calls of the engine that can be
        compared: one row of each of some neighbours, or prompts of a tile or more. `on_stored` is told the keys of a
        chain of which some blocks have just come into the arena."""
        super().__init__(options, **how)
        self._on_pass = on_pass
        self._on_stored = on_stored
        self._clock = clock
        self._sequences: dict[bytes, StageSequence] = {}
        self._waiting = Waiting()
        self._runs = 0

    @property
    def slots(self) -> int:
        """Sequences that can be open at one time."""
        return self.status.slots or self._options.slots

    @property
    def free(self) -> int:
        """Sequences that can be opened now; those that are idle for IDLE_S count as free."""
        return self.slots - sum(not self._is_idle(opened) for opened in self._sequences.values())

    # -- what heads ask --------------------------------------------------------------------------------------------

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """See `contract.StageCaller`. Raises QueueFull, NotReady, EngineFailed, StageLost (a later epoch is open), and
        WireError for more than a sequence holds. A `request` must have been checked (see `wire.checks`)."""
        self._engine()
        self._check_open(sequence, keys, n_tokens)
        self._sweep()
        opened = self._sequences.get(sequence)
        if opened is None:
            if len(self._sequences) >= self.slots:
                raise QueueFull(f"all {self.slots} sequences of this stage are in use; try again later", retry_after=1)
            self._serial += 1
            opened = self._sequences[sequence] = StageSequence(sequence, self._serial, self._clock())
        elif epoch < opened.epoch:
            raise StageLost(f"epoch {epoch} of a sequence that is open in epoch {opened.epoch}")
        self._end_lease(opened)
        opened.epoch, opened.request, opened.placed = epoch, request, False
        opened.keys, opened.last_used = tuple(keys), self._clock()
        held = 0
        if self.cache:
            opened.lease = self.cache.lease_keys(opened.keys, n_tokens)
            held = len(opened.lease.refs) * self._options.prefix_block_tokens
        # The logits after the last token are wanted, so that one is computed.
        opened.offered = min(max(opened.length, held), n_tokens - 1)
        return opened.offered

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """See `contract.StageCaller`; at most what `open` answered. Raises StageLost, QueueFull, EngineFailed,
        WireError."""
        opened = self._find(sequence, epoch)
        if not 0 <= n_tokens <= opened.offered:
            raise WireError(f"{n_tokens} tokens to resume where {opened.offered} were offered")
        self._check_room(0)
        lease = None
        if self.cache and n_tokens:
            # As many as are read and no more: what is told of them later is told of the last one.
            count = -(-n_tokens // self._options.prefix_block_tokens)
            lease = self.cache.lease_keys(opened.keys[:count], n_tokens)
        self._end_lease(opened)
        refs = lease.refs if lease else ()
        try:
            self._send(Place(serial=opened.serial, tokens=n_tokens, blocks=refs, request=opened.request))
        except SwarmError:
            if lease and self.cache:
                self.cache.release(lease)
            raise
        placing = Placing(opened, lease, asyncio.get_running_loop().create_future())
        self._waiting.placing.setdefault(opened.serial, deque()).append(placing)
        opened.placed = True
        if not n_tokens:
            # Nothing can be missing. The engine answers after the passes before it, and the rows of this sequence need
            # not wait for that: they come behind. Should it refuse, they are refused, too.
            placing.future.add_done_callback(lambda future: future.cancelled() or future.exception())
            return 0
        return await placing.future

    def begin(
        self, parts: Sequence[PassPart], encoding: RowEncoding, rows: Buffer, reply: RowEncoding, done: ComputeDone
    ) -> None:
        """Compute rows of all parts here, then call `done`; those that come out are encoded as `reply`.

        Reaches the engine in the order of the calls, which is that of the ends of all that succeed; any number may be
        under way. `done` is told StageLost, WireError (rows that are not finite came out, too), DecodeFailed, NotReady
        (this node ends) and EngineFailed.
        Raises StageLost, WireError, QueueFull (too much under way), NotReady, EngineFailed.
        """
        now, spans, wanted = self._clock(), [], []
        for part in parts:
            opened = self._find(part.sequence, part.epoch, now)
            if not opened.placed:
                raise StageLost("a sequence that was opened and not resumed; resume it first")
            spans.append((opened, part.start, part.count))
            what = (part.outputs, part.place, part.guesses, part.follows)
            wanted.append(RunPart(opened.serial, part.start, part.count, *what))
        n_bytes = rows.nbytes if isinstance(rows, memoryview) else len(rows)
        self._check_room(n_bytes)
        run = self._runs + 1
        self._send(Run(run=run, parts=tuple(wanted), encoding=encoding, reply=reply), rows)
        self._runs = run
        self._waiting.passes[run] = Underway(spans, n_bytes, now, done)
        self._waiting.n_bytes += n_bytes
        for opened, start, _ in spans:
            opened.under_way += 1
            opened.length = min(opened.length, start)
            opened.exact = opened.exact and encoding == "f32"

    async def run(self, parts: Sequence[PassPart], encoding: RowEncoding, rows: Buffer, reply: RowEncoding) -> Computed:
        """`begin`, waited for. Raises what `begin` tells."""
        future: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()

        def done(result: Computed | SwarmError) -> None:
            if future.done():
                return
            if isinstance(result, SwarmError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.begin(parts, encoding, rows, reply, done)
        return await future

    @property
    def guesses(self) -> bool:
        """Whether its engine has a draft model beside the stage."""
        return bool(self._options.draft_path)

    def guess(self, parts: Sequence[GuessPart], done: GuessDone) -> None:
        """Let the draft model guess, after the passes that are under way; `done` is not called for parts that say that
        requests have ended. Raises StageLost, QueueFull, NotReady, EngineFailed."""
        self._check_room(0)
        self._send(Guess(tuple(parts)))
        if any(part.count for part in parts):
            self._waiting.guessing.append(done)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """See `contract.StageCaller`. Returns when the blocks are there. Raises StageLost, QueueFull, EngineFailed,
        WireError."""
        opened = self._find(sequence, epoch)
        self._check_keys(keys)
        if self.cache is None:
            return
        self._check_room(0)
        incarnation = self._engine()
        full = opened.length // self._options.prefix_block_tokens
        grant = self.cache.grant_keys(keys[:full], exact=opened.exact)
        if not grant.grants:
            return
        try:
            self._grant(incarnation, opened.serial, grant)
        except EngineFailed as error:
            raise self._deaf() from error
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.storing.setdefault(opened.serial, deque()).append(future)
        await future
        if self.cache and (held := self.cache.held_keys(keys)):
            self._on_stored(keys[:held])

    async def close_sequence(self, sequence: bytes) -> None:
        """Give the sequence back. Unknown ones are ignored."""
        opened = self._sequences.get(sequence)
        if opened:
            self._close(opened)

    # -- sequences -------------------------------------------------------------------------------------------------

    def _engine(self) -> Incarnation:
        incarnation = self._incarnation
        if incarnation and self.status.state == "ready":
            if not incarnation.link.ended.done():
                return incarnation
            # Its end is seen before its exit: who is told so now need not find out by asking for more.
            raise NotReady("the engine of this stage has died and is started again")
        detail = self.status.detail or "the engine of this stage is starting"
        raise EngineFailed(detail) if self.status.state == "failed" else NotReady(detail)

    def _find(self, sequence: bytes, epoch: int, now: float | None = None) -> StageSequence:
        opened = self._sequences.get(sequence)
        if opened is None or opened.epoch != epoch:
            state = f"open in epoch {opened.epoch}" if opened else "not open here"
            raise StageLost(f"a sequence that is {state} was asked for in epoch {epoch}; open it again")
        opened.last_used = self._clock() if now is None else now
        return opened

    def _check_open(self, sequence: bytes, keys: Sequence[bytes], n_tokens: int) -> None:
        if len(sequence) != SEQUENCE_BYTES:
            raise WireError(f"a sequence's name of {len(sequence)} bytes, not {SEQUENCE_BYTES}")
        if not 0 < n_tokens < self.status.ctx_size:
            raise WireError(f"{n_tokens} tokens do not fit into a sequence of {self.status.ctx_size} with an answer")
        self._check_keys(keys)

    def _check_keys(self, keys: Sequence[bytes]) -> None:
        most = self.status.ctx_size // max(1, self._options.prefix_block_tokens)
        if len(keys) > most or any(len(key) != KEY_BYTES for key in keys):
            raise WireError(f"{len(keys)} keys of blocks; at most {most} of {KEY_BYTES} bytes each are right")

    def _check_room(self, n_bytes: int) -> None:
        total = n_bytes + self._waiting.n_bytes
        if self._waiting.count >= MAX_UNDER_WAY or total > MAX_BYTES_UNDER_WAY:
            raise QueueFull(
                f"{self._waiting.count} messages with {total} bytes of rows wait for this stage, where {MAX_UNDER_WAY} "
                f"and {MAX_BYTES_UNDER_WAY} are the limits; send fewer at a time",
                retry_after=1,
            )

    def _is_idle(self, opened: StageSequence) -> bool:
        return not opened.under_way and self._clock() - opened.last_used >= IDLE_S

    def _sweep(self) -> None:
        for opened in list(self._sequences.values()):
            if self._is_idle(opened):
                self._close(opened)

    def _close(self, opened: StageSequence) -> None:
        self._end_lease(opened)
        if self._sequences.get(opened.name) is opened:
            del self._sequences[opened.name]
        with contextlib.suppress(StageLost, NotReady, EngineFailed):
            self._send(Cancel(serial=opened.serial))

    def _end_lease(self, opened: StageSequence) -> None:
        if opened.lease and self.cache:
            self.cache.release(opened.lease)
        opened.lease = None

    def _send(self, message: ToEngine, frame: Buffer | None = None) -> None:
        incarnation = self._engine()
        try:
            incarnation.link.send(message, frame)
        except EngineFailed as error:
            raise self._deaf() from error

    def _deaf(self) -> StageLost:
        """The engine has just died, which is noticed a moment later, or reads no more."""
        if self._incarnation:
            with contextlib.suppress(ProcessLookupError):
                self._incarnation.process.kill()
        return StageLost("the engine of this stage does not read its messages; open the sequence again")

    # -- messages --------------------------------------------------------------------------------------------------

    def _handle(self, incarnation: Incarnation, message: FromEngine, frame: bytes | None) -> None:
        match message:
            case Ran():
                self._on_ran(message, frame)
            case Placed():
                self._on_placed(message)
            case Guessed(tokens=tokens):
                if self._waiting.guessing:
                    self._waiting.guessing.popleft()(tokens)
            case BlocksStored():
                self._enter(incarnation, message)
                future = next_of(self._waiting.storing, message.serial)
                if future and not future.done():
                    future.set_result(None)

    def _on_ran(self, ran: Ran, frame: bytes | None) -> None:
        found = self._waiting.passes.pop(ran.run, None)
        if found is None:
            return
        self._waiting.n_bytes -= found.n_bytes
        now = self._clock()
        for opened, start, count in found.spans:
            opened.under_way -= 1
            opened.last_used = now
            opened.length = min(opened.length, start) if ran.code else start + count
        if ran.code:
            found.done(revive(ran.code, ran.message))
            return
        # First of all: the next stage waits for it.
        found.done(Computed(ran.tokens, frame, ran.seconds, max(0.0, now - found.begun - ran.seconds)))
        self._deaths = 0
        rows = sum(count for _, _, count in found.spans)
        # The end of a prompt has fewer rows for the output head than as many streams that decode.
        if ran.neighbours and (rows == len(found.spans) or rows >= TILE_ROWS):
            self._on_pass(rows, ran.seconds)

    def _on_placed(self, placed: Placed) -> None:
        found = next_of(self._waiting.placing, placed.serial)
        if found is None:
            return
        opened = found.opened
        if found.lease and self.cache:
            told = placed.blocks or placed.bad_blocks
            used = placed.blocks * self._options.prefix_block_tokens if told else None
            self.cache.release(found.lease, used)
        opened.length = placed.tokens
        if placed.code:
            self._close(opened)
        if found.future.done():
            return
        if placed.code:
            found.future.set_exception(revive(placed.code, placed.message))
        else:
            found.future.set_result(placed.tokens)

    # -- deaths ----------------------------------------------------------------------------------------------------

    def _serve(self, incarnation: Incarnation) -> None:
        """Nothing waits: whoever had a sequence opens it again."""

    def _gone(self) -> None:
        for opened in self._sequences.values():
            self._end_lease(opened)
        self._sequences.clear()
        for placing in (each for queue in self._waiting.placing.values() for each in queue):
            if placing.lease and self.cache:
                self.cache.release(placing.lease)
                placing.lease = None

    def _count_death(self, limit: int, reason: str) -> None:
        self._fail_all(StageLost(f"the engine of this stage died ({reason}); open the sequence again"))

    def _fail_all(self, error: SwarmError) -> None:
        waiting, self._waiting = self._waiting, Waiting()
        for each in waiting.passes.values():
            each.done(error)
        for future in waiting.futures():
            if not future.done():
                future.set_exception(error)
        for guessed in waiting.guessing:
            guessed(())
