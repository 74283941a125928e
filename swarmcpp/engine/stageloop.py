"""The loop of a stage's engine: it computes the Runs that its node sends, in their order, and decides nothing.

Single-threaded and synchronous, like engine/loop.py. What is asked for wrongly is answered with a code and hurts no
other sequence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarmcpp.core import Clock, Sampled, SamplerLike, Token
from swarmcpp.engine.backend import FloatRows, OpenArena, StageBackend, opens
from swarmcpp.engine.modeldrafter import Guesser
from swarmcpp.engine.speculation import drawn_tokens
from swarmcpp.errors import DecodeFailed, QueueFull, StageLost, SwarmError, WireError
from swarmcpp.telemetry import diag
from swarmcpp.wire.codec import Buffer
from swarmcpp.wire.engine import (
    BlocksStored,
    Cancel,
    Guess,
    Guessed,
    Place,
    Placed,
    Ran,
    Run,
    RunPart,
    StageLink,
    Stop,
    StoreBlocks,
    ToEngine,
    UseArena,
)

logger = logging.getLogger(__name__)

IDLE_POLL_S = 5.0
"""How long an idle engine sleeps in its inbox before it checks its invariants again."""

MAX_FAILURES = 3
"""Calls of llama.cpp that fail one after another before its context is given up, and the engine with it."""


@dataclass(slots=True)
class StageSequence:
    """A head's sequence. `length` tokens are in the KV of `slot`."""

    slot: int
    length: int = 0
    place: int = -1
    """The slot that its head wants for it."""
    sampler: SamplerLike | None = None
    drawn: tuple[int, int] = (-1, -1)
    """The position of the token that was drawn last, and its id."""

    def holds(self, part: RunPart) -> bool:
        """Whether the guess that a part is built on is right, if it is on one."""
        return part.follows < 0 or self.drawn == (part.start, part.follows)


class StageLoop:
    """Owner of a stage's sequences. `block_tokens` 0: its KV can neither be stored nor moved.

    For `poll_s` after a pass it watches for the next one without sleeping, if the last one came as soon. In a chain
    each stage waits for the others between the passes of one stream, and a core that has gone to sleep takes as long to
    wake up as the message took to come. llama.cpp's threads wait in the same way (`--poll`).
    """

    def __init__(
        self,
        backend: StageBackend,
        link: StageLink,
        clock: Clock,
        *,
        block_tokens: int = 0,
        poll_s: float = 0.0,
        open_arena: OpenArena = lambda _message: None,
        guesser: Guesser | None = None,
    ) -> None:
        self._backend = backend
        self._guesser = guesser
        self._open_arena = open_arena
        self._link = link
        self._clock = clock
        self._block_tokens = block_tokens
        self._poll_s = poll_s
        self._answered = -math.inf
        """When the last pass was answered."""
        self._gap_s = math.inf
        """How long after an answer the last pass came."""
        self._sequences: dict[int, StageSequence] = {}
        """By serial."""
        self._arena = False
        self._failures = 0
        self.stopped = False

    def serve(self) -> None:
        """Work until Stop arrives. Raises DecodeFailed when the context seems to be of no more use."""
        while not self.stopped:
            message = self._link.receive(IDLE_POLL_S, self._watch_s())
            if message is None:
                self._gap_s = math.inf
                self.check_integrity()
            else:
                self.handle(message, self._link.frame)

    def _watch_s(self) -> float:
        """How long to watch for the next pass from now on."""
        return max(0.0, self._answered + self._poll_s - self._clock()) if self._gap_s <= self._poll_s else 0.0

    def handle(self, message: ToEngine, frame: Buffer | None = None) -> None:
        """Apply one message from the node."""
        match message:
            case Run():
                self._answer_run(message, frame)
            case Place():
                self._answer_place(message)
            case Guess():
                self._answer_guess(message)
            case StoreBlocks():
                self._store(message)
            case Cancel(serial=serial):
                self._free(serial)
            case UseArena():
                self._arena = opens(self._open_arena, message)
            case Stop():
                self.stopped = True
            case _:
                logger.warning("ignoring a %s message at a stage", type(message).__name__)

    def _answer_guess(self, message: Guess) -> None:
        wanted = sum(part.count > 0 for part in message.parts)
        answer = self._guesser.answer(message) if self._guesser else Guessed((None,) * wanted) if wanted else None
        if answer:
            self._link.send(answer)

    # -- sequences -----------------------------------------------------------------------------------------------

    def _answer_place(self, message: Place) -> None:
        try:
            self._link.send(self._place(message))
        except (QueueFull, WireError) as error:
            self._free(message.serial)
            self._link.send(Placed(serial=message.serial, code=error.code, message=str(error)))

    def _place(self, message: Place) -> Placed:
        request, n_ctx = message.request, self._backend.n_ctx
        used = max(message.tokens, len(request.prompt) + len(request.generated) if request else 0)
        if message.tokens < 0 or used >= n_ctx:
            raise WireError(f"{used} tokens do not fit into a sequence of {n_ctx} with an answer")
        found = self._sequences.get(message.serial)
        if found is None:
            found = self._sequences[message.serial] = StageSequence(self._free_slot())
        loaded, bad = 0, False
        if found.length < message.tokens:
            # Blocks that cannot be reached are not damaged, which loading them in vain would say.
            blocks = message.blocks if self._arena else ()
            loaded = self._backend.load_blocks(found.slot, blocks) if blocks else 0
            bad = loaded < len(blocks)
            # Without blocks what it has is still a beginning.
            found.length = loaded * self._block_tokens if blocks else found.length
        self._cut(found, min(found.length, message.tokens))
        self._close_sampler(found)
        if request and self._backend.is_tail:
            found.sampler = self._backend.sampler(request)
        return Placed(serial=message.serial, tokens=found.length, blocks=loaded, bad_blocks=bad)

    def _free_slot(self) -> int:
        taken = {sequence.slot for sequence in self._sequences.values()}
        for slot in range(self._backend.n_slots):
            if slot not in taken:
                return slot
        raise QueueFull(f"all {self._backend.n_slots} sequences of this stage are in use", retry_after=1.0)

    def _free(self, serial: int) -> None:
        sequence = self._sequences.pop(serial, None)
        if sequence:
            self._close_sampler(sequence)
            self._cut(sequence, 0)

    def _close_sampler(self, sequence: StageSequence) -> None:
        if sequence.sampler:
            sequence.sampler.close()
            sequence.sampler = None

    def _cut(self, sequence: StageSequence, length: int) -> None:
        self._backend.truncate(sequence.slot, length)
        sequence.length = length

    def _settle(self, parts: Sequence[RunPart], sequences: Sequence[StageSequence]) -> None:
        """Bring sequences to the places that their head wants them at, but not those that are at theirs away."""
        for part, sequence in zip(parts, sequences, strict=True):
            sequence.place = part.place
        if all(sequence.place in (-1, sequence.slot) for sequence in sequences):
            return
        at = {sequence.slot: sequence for sequence in self._sequences.values()}
        for sequence in sequences:
            place = sequence.place
            if place == sequence.slot or not 0 <= place < self._backend.n_slots:
                continue
            other = at.get(place)
            if other is None or other.place != place:
                self._move(at, sequence, place)

    def _move(self, at: dict[int, StageSequence], sequence: StageSequence, target: int) -> None:
        """Move a sequence to a slot, and who has that to its own; neither, when KV cannot be moved."""
        source, other = sequence.slot, at.get(target)
        if sequence.length or (other is not None and other.length):
            if not self._block_tokens:
                return
            if other is not None and other.length:
                # Also when no slot is free, as in a stage whose sequences are all in use.
                self._backend.exchange(source, target)
            else:
                self._backend.copy_prefix(source, target, sequence.length)
                self._backend.truncate(source, 0)
        del at[source]
        if other is not None:
            other.slot, at[source] = source, other
        at[target], sequence.slot = sequence, target

    # -- runs ----------------------------------------------------------------------------------------------------

    def _answer_run(self, message: Run, frame: Buffer | None) -> None:
        begun = self._clock()
        self._gap_s = begun - self._answered
        try:
            tokens, rows, neighbours = self._run(message, frame)
        except (StageLost, WireError, DecodeFailed) as error:
            self._link.send(Ran(run=message.run, code=error.code, message=str(error)))
            self._answered = self._clock()
            if self._failures >= MAX_FAILURES:
                raise
            return
        seconds = self._clock() - begun
        count = sum(part.count for part in message.parts)
        self._link.send(Ran(run=message.run, tokens=tokens, seconds=seconds, neighbours=neighbours), rows)
        self._answered = self._clock()
        # After it: whoever reads the line takes longer than the message does.
        diag(logger, "stage pass", rows=count, parts=len(message.parts), ms=round(1000 * seconds, 3))

    def _run(self, message: Run, frame: Buffer | None) -> tuple[Sampled, Buffer | None, bool]:
        """Tokens, or the frame of rows that goes on; and whether the sequences were neighbours."""
        sequences = self._check(message.parts)
        count = sum(part.count for part in message.parts)
        rows = self._backend.decode_frame(b"" if frame is None else frame, count, message.encoding)
        for part, sequence in zip(message.parts, sequences, strict=True):
            if part.start != sequence.length:
                self._cut(sequence, part.start)
        self._settle(message.parts, sequences)
        slots = [sequence.slot for sequence in sequences]
        try:
            hidden = self._compute(slots, message.parts, rows)
            tokens, out = self._outcome(message, sequences, hidden)
        except (DecodeFailed, WireError):
            for part, sequence in zip(message.parts, sequences, strict=True):
                self._cut(sequence, part.start)
            raise
        for part, sequence in zip(message.parts, sequences, strict=True):
            sequence.length += part.count
        return tokens, out, max(slots) - min(slots) < len(slots)

    def _check(self, parts: Sequence[RunPart]) -> list[StageSequence]:
        """The sequences of the parts of a Run. Raises StageLost and WireError for what cannot be computed."""
        rows = sum(part.count for part in parts)
        if not 0 < rows <= self._backend.max_rows or any(part.count < 1 for part in parts):
            raise WireError(
                f"{rows} rows in {len(parts)} parts; a pass has 1 to {self._backend.max_rows}, no part none"
            )
        outputs = sum(part.outputs for part in parts)
        if outputs > self._backend.max_outputs:
            raise WireError(f"{outputs} outputs in a pass, which has at most {self._backend.max_outputs}")
        if len({part.serial for part in parts}) < len(parts):
            raise WireError("two parts of one sequence in a pass")
        found: list[StageSequence] = []
        for part in parts:
            sequence = self._sequences.get(part.serial)
            if sequence is None or part.start > sequence.length:
                length = sequence.length if sequence else 0
                raise StageLost(f"rows from position {part.start} of a sequence with {length} tokens; open it again")
            if not 0 <= part.start <= self._backend.n_ctx - part.count:
                raise WireError(
                    f"{part.count} rows from position {part.start}, where a sequence holds {self._backend.n_ctx}"
                )
            if not 0 <= part.outputs <= part.count or len(part.guesses) != max(0, part.outputs - 1):
                raise WireError(f"{part.outputs} outputs of {part.count} rows with {len(part.guesses)} guesses")
            if part.outputs and self._backend.is_tail and sequence.sampler is None:
                raise WireError("a token is wanted of a sequence that was opened without its request")
            found.append(sequence)
        return found

    def _compute(self, slots: Sequence[int], parts: Sequence[RunPart], rows: FloatRows) -> FloatRows:
        try:
            hidden = self._backend.compute(slots, parts, rows)
        except DecodeFailed:
            self._failures += 1
            raise
        self._failures = 0
        return hidden

    def _outcome(
        self, message: Run, sequences: Sequence[StageSequence], hidden: FloatRows
    ) -> tuple[Sampled, Buffer | None]:
        if not self._backend.is_tail:
            try:
                return (), self._backend.encode(hidden, message.reply)
            except WireError as error:
                # What came in was sound, so this stage made it so.
                raise DecodeFailed(f"this stage cannot send on what it computed: {error}") from error
        asked = [(part, each) for part, each in zip(message.parts, sequences, strict=True) if part.outputs]
        # Before anything is drawn: a pass that failed has not moved anybody's random numbers.
        if not all(self._backend.finite(each.slot) for part, each in asked if each.holds(part)):
            raise DecodeFailed("logits that are not finite came out of the last stage")
        return tuple(self._draw(part, each) for part, each in asked), None

    def _draw(self, part: RunPart, sequence: StageSequence) -> tuple[Token, ...]:
        sampler = sequence.sampler
        if sampler is None or not sequence.holds(part):
            return ()
        tokens = drawn_tokens(part.guesses, lambda at: self._backend.sample(sampler, sequence.slot, at))
        sequence.drawn = part.start + part.count - part.outputs + len(tokens), tokens[-1].id
        return tuple(tokens)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _store(self, message: StoreBlocks) -> None:
        """Write the granted blocks as far as the sequence holds them."""
        sequence = self._sequences.get(message.serial)
        full = sequence.length // self._block_tokens if sequence and self._block_tokens else 0
        grants = [(number, slot) for number, slot in message.grants if 0 <= number < full]
        written = self._backend.store_blocks(sequence.slot, grants) if sequence and grants else []
        self._link.send(BlocksStored(serial=message.serial, written=tuple(written)))

    def check_integrity(self) -> None:
        """Compare every sequence's books with llama.cpp's. Raises SwarmError when they differ."""
        books = {sequence.slot: sequence.length for sequence in self._sequences.values()}
        for slot in range(self._backend.n_slots):
            held = self._backend.length(slot)
            if held != books.get(slot, 0):
                raise SwarmError(f"slot {slot} holds {held} tokens in llama.cpp and {books.get(slot, 0)} in its books")
