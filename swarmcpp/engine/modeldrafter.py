"""A model that guesses for another one: `drafting.Drafter` on a backend of its own. Used by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from swarmcpp.core import Clock, DrafterName, Rows, SamplerLike
from swarmcpp.engine.backend import WholeBackend
from swarmcpp.engine.drafting import Draft
from swarmcpp.engine.scheduler import CostModel
from swarmcpp.engine.sequence import Generation
from swarmcpp.wire.engine import Guess, Guessed, GuessPart

CATCH_UP: Final = 128
"""Rows of one round at most that bring a draft model up to where its target is; all others wait for them."""


@dataclass(slots=True)
class _Seat:
    """A generation in a slot of the draft model. `held` are the tokens in its KV, of which the first `sure` are those
    of the generation; `sampler` has drawn what the target has, up to `drawn` tokens."""

    slot: int
    sampler: SamplerLike
    drawn: int
    held: list[int] = field(default_factory=list)
    sure: int = 0

    def follow(self, tokens: Sequence[int]) -> int:
        """The first of `tokens` that is to be computed; the last one always is."""
        at, end = min(self.sure, len(tokens) - 1), min(len(self.held), len(tokens) - 1)
        while at < end and self.held[at] == tokens[at]:
            at += 1
        del self.held[at:]
        self.sampler.follow(tokens[self.drawn :])
        self.drawn = len(tokens)
        return at


class ModelDrafter:
    """Guesses what a smaller model says next. It draws with a copy of the target's sampler, so with the same random
    numbers: where both are of one mind, a seeded answer is guessed as well as a greedy one."""

    free = False

    def __init__(self, name: DrafterName, backend: WholeBackend, n_vocab: int, clock: Clock) -> None:
        self.name = name
        self._backend = backend
        self._n_vocab = n_vocab
        """Of the target."""
        self._clock = clock
        self._cost = CostModel()
        self._seats: dict[int, _Seat] = {}

    def seconds(self, count: int, gamma: int) -> float:
        """See `Drafter`."""
        return gamma * self._cost.decode_cost(count)

    def draft(self, asked: Sequence[tuple[Generation, int]]) -> list[Draft]:
        """See `Drafter`."""
        guesses: dict[int, list[int]] = {}
        rows, samplers = self._caught_up(asked)
        most = {generation.serial: count for generation, count in asked}
        by_slot = {seat.slot: (serial, seat) for serial, seat in self._seats.items()}
        while rows:
            begun = self._clock()
            self._backend.decode(rows)
            if sum(len(part.tokens) for part in rows) <= 2 * len(rows):
                # One that has much to read says nothing about those that guess.
                self._cost = self._cost.after_decode(len(rows), self._clock() - begun)
            wanted, rows = [part for part in rows if part.outputs], []
            for part in wanted:
                serial, seat = by_slot[part.slot]
                token = self._backend.sample(samplers[part.slot], part.slot).id
                said = guesses.setdefault(serial, [])
                if token >= self._n_vocab:
                    continue
                said.append(token)
                if len(said) < most[serial] and len(seat.held) + 1 < self._backend.n_ctx:
                    rows.append(Rows(part.slot, len(seat.held), [token], outputs=1))
                    seat.held.append(token)
        for sampler in samplers.values():
            sampler.close()
        return [Draft(tuple(guesses.get(generation.serial, ()))) for generation, _ in asked]

    def _caught_up(self, asked: Sequence[tuple[Generation, int]]) -> tuple[list[Rows], dict[int, SamplerLike]]:
        """The rows that are missing before the next guess, and a copy of the sampler for each slot that is to guess."""
        rows: list[Rows] = []
        samplers: dict[int, SamplerLike] = {}
        left = CATCH_UP
        for generation, count in asked:
            seat = self._seat(generation)
            if seat is None or not left or count < 1 or len(generation.tokens) >= self._backend.n_ctx:
                continue
            at = seat.follow(generation.tokens)
            self._backend.truncate(seat.slot, at)
            missing = generation.tokens[at : at + left]
            whole = at + len(missing) == len(generation.tokens)
            rows.append(Rows(seat.slot, at, missing, outputs=int(whole)))
            seat.held += missing
            seat.sure = len(seat.held)
            left -= len(missing)
            if whole:
                samplers[seat.slot] = seat.sampler.copy()
        return rows, samplers

    def _seat(self, generation: Generation) -> _Seat | None:
        seat = self._seats.get(generation.serial)
        if seat is None:
            taken = {each.slot for each in self._seats.values()}
            slot = next((slot for slot in range(self._backend.n_slots) if slot not in taken), None)
            if slot is None:
                return None
            sampler = self._backend.sampler(generation.request)
            drawn = len(generation.request.prompt) + len(generation.request.generated)
            seat = self._seats[generation.serial] = _Seat(slot, sampler, drawn)
        return seat

    def forget(self, generation: Generation) -> None:
        """See `Drafter`."""
        seat = self._seats.pop(generation.serial, None)
        if seat:
            seat.sampler.close()
            self._backend.truncate(seat.slot, 0)


class Guesser:
    """Answers a head's questions for guesses, which has the tokens and sends what is new. Used by one thread."""

    def __init__(self, drafter: ModelDrafter) -> None:
        self._drafter = drafter
        self._known: dict[int, Generation] = {}

    def answer(self, message: Guess) -> Guessed | None:
        """What to answer; None if nothing is wanted any more."""
        asked = [(self._followed(part), part.count) for part in message.parts if part.count]
        for part in message.parts:
            if not part.count:
                self._forget(part.serial)
        known = [(generation, count) for generation, count in asked if generation]
        drafts = iter(self._drafter.draft(known) if known else ())
        told = tuple(next(drafts).tokens if generation else None for generation, _ in asked)
        return Guessed(told) if told else None

    def _followed(self, part: GuessPart) -> Generation | None:
        """A request with all its tokens, if those before the new ones are known."""
        if part.request is not None:
            self._forget(part.serial)
            begun = [*part.request.prompt, *part.request.generated]
            self._known[part.serial] = Generation(part.serial, part.request, begun)
        found = self._known.get(part.serial)
        if found is None or len(found.tokens) != part.start:
            return None
        found.tokens += part.tokens
        return found

    def _forget(self, serial: int) -> None:
        found = self._known.pop(serial, None)
        if found:
            self._drafter.forget(found)
