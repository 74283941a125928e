"""A draft model for chains of stages: an engine of the head's node has it, and is asked while the stages wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Final

from swarmcpp.core import Clock, DrafterName
from swarmcpp.engine.drafting import NOTHING, Draft
from swarmcpp.engine.scheduler import CostModel
from swarmcpp.engine.sequence import Generation
from swarmcpp.supervisor.books import GuessDone
from swarmcpp.wire.engine import GuessPart

AskGuesses = Callable[[Sequence[GuessPart], GuessDone], bool]
"""Asks an engine of this node; False when none has a draft model now, and then `done` is not called."""

LIMIT_S: Final = 2.0
"""After so long guesses are not waited for any more."""

ABSENT_S: Final = 1.0
"""So long nobody is asked after an engine did not answer: it is started again meanwhile."""


class AskedDrafter:
    """What a draft model in another process guesses: `ask`, then `draft` once that is done. Satisfies `Drafter`; used
    on the event loop's thread."""

    name: DrafterName = "draft"
    free = False

    def __init__(self, ask: AskGuesses, n_vocab: int, clock: Clock) -> None:
        self._ask = ask
        self._n_vocab = n_vocab
        """Of the target: a draft's vocabulary may be filled up further."""
        self._clock = clock
        self._cost = CostModel()
        """Seconds of a guess for so many sequences, the way to the engine and back among them."""
        self._told: dict[int, int] = {}
        """Tokens of each generation that the engine knows."""
        self._begun: set[int] = set()
        """Serials that an engine may know, also if it did not answer."""
        self._came: dict[int, tuple[int, tuple[int, ...]]] = {}
        """For each generation, after how many tokens it was asked for, and the guesses."""
        self._absent_until = 0.0

    def seconds(self, count: int, gamma: int) -> float:
        """See `Drafter`."""
        return math.inf if self._clock() < self._absent_until else gamma * self._cost.decode_cost(count)

    def draft(self, asked: Sequence[tuple[Generation, int]]) -> list[Draft]:
        """See `Drafter`: what has come for exactly these tokens."""
        return [self._found(generation, most) for generation, most in asked]

    def _found(self, generation: Generation, most: int) -> Draft:
        length, guesses = self._came.get(generation.serial, (0, ()))
        return Draft(guesses[:most]) if length == len(generation.tokens) and not generation.assumed else NOTHING

    def ask(self, asked: Sequence[tuple[Generation, int]], done: Callable[[], None]) -> bool:
        """Call `done` when guesses have come, or will not come; False if there is nobody to ask."""
        begun, gamma = self._clock(), max(count for _, count in asked)
        lengths = [(generation.serial, len(generation.tokens)) for generation, _ in asked]
        over = asyncio.get_running_loop().create_future()

        def came(guesses: tuple[tuple[int, ...] | None, ...]) -> None:
            if over.done():
                return
            over.set_result(None)
            timer.cancel()
            if not guesses:
                self._lost()
            for (serial, length), found in zip(lengths, guesses, strict=False):
                if found is None:
                    # It was started again, or is another one.
                    self._told.pop(serial, None)
                elif serial in self._begun:
                    self._came[serial] = (length, tuple(takewhile(lambda token: 0 <= token < self._n_vocab, found)))
            if any(guesses):
                self._cost = self._cost.after_decode(len(asked), (self._clock() - begun) / gamma)
            done()

        timer = asyncio.get_running_loop().call_later(LIMIT_S, came, ())
        if self._ask([self._part(generation, count) for generation, count in asked], came):
            self._told |= dict(lengths)
            self._begun.update(self._told)
            return True
        timer.cancel()
        self._lost()
        return False

    def _lost(self) -> None:
        self._told.clear()
        self._absent_until = self._clock() + ABSENT_S

    def _part(self, generation: Generation, count: int) -> GuessPart:
        told, request = self._told.get(generation.serial), generation.request
        if told is not None:
            return GuessPart(generation.serial, told, tuple(generation.tokens[told:]), count)
        start = len(request.prompt) + len(request.generated)
        return GuessPart(
            generation.serial, start, tuple(generation.tokens[start:]), count, replace(request, prediction=())
        )

    def forget(self, generation: Generation) -> None:
        """See `Drafter`."""
        serial = generation.serial
        self._came.pop(serial, None)
        self._told.pop(serial, None)
        if serial in self._begun:
            self._begun.remove(serial)
            self._ask([GuessPart(serial, 0, (), 0)], lambda _guesses: None)
