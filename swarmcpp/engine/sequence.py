"""A request that runs, in a slot or on the stages of a chain: its tokens, and why it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from swarmcpp.core import TILE_ROWS, Chunk, FinishReason, GenerateRequest, Token, TokenPart
from swarmcpp.engine.prefix import Tier
from swarmcpp.engine.scheduler import SlotView

WORTH_A_MOVE: Final = 16
"""Tokens that an answer may still have for a move of its KV to pay."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request. `tokens` is its prompt and what was generated; the first `n_past` are in the KV, or rows of them are
    on their way there."""

    serial: int
    request: GenerateRequest
    tokens: list[int]
    n_past: int = 0
    decoding: bool = False
    """A token has come since it began, or was begun again: one row after another from now on."""
    sampled: int = 0
    """Tokens that were sampled, beside those that came with the request."""
    cached: int = 0
    """Tokens that were in the KV at its beginning, which `tier` had."""
    tier: Tier = ""
    bad_blocks: bool = False
    queue_s: float = 0.0
    begun_s: float = 0.0
    assumed: list[int] = field(default_factory=list)
    """Guesses that are taken to follow `tokens`, whose rows are on their way."""

    @property
    def remaining(self) -> int:
        """Prompt rows that are not planned yet."""
        return 0 if self.decoding else len(self.tokens) - self.n_past

    @property
    def to_come(self) -> int:
        """Tokens that its answer may still have."""
        return self.request.max_tokens - len(self.request.generated) - self.sampled

    @property
    def worth_a_move(self) -> bool:
        """Whether its KV may be moved to where passes are faster: a move costs milliseconds once."""
        return self.decoding and self.to_come >= WORTH_A_MOVE

    def view(self, place: int) -> SlotView | None:
        """What the scheduler may know of it, as number `place`; None while nothing is to be planned for it."""
        if not self.decoding and not self.remaining:
            return None
        tile_end = len(self.request.prompt) // TILE_ROWS * TILE_ROWS
        return SlotView(place, self.serial, self.n_past, self.remaining, tile_end)

    def rows(self, chunk: Chunk) -> list[int]:
        """The tokens of a chunk of it."""
        first = (chunk.follows,) if chunk.follows >= 0 else ()
        end = chunk.start + chunk.count - len(chunk.guesses) - len(first)
        return [*self.tokens[chunk.start : end], *first, *chunk.guesses]

    def accept(self, tokens: Sequence[Token], eog_tokens: Collection[int], n_ctx: int, now: float) -> TokenPart:
        """Take the next tokens, up to one that ends it; what its reader is told of them."""
        first, finish, taken = not self.sampled, None, 0
        while finish is None and taken < len(tokens):
            self.tokens.append(tokens[taken].id)
            self.sampled += 1
            finish = self._finish(tokens[taken].id, eog_tokens, n_ctx)
            taken += 1
        self.decoding = True
        if not first:
            return TokenPart(tuple(tokens[:taken]), finish)
        report = (self.cached, self.tier, self.bad_blocks, self.queue_s, now - self.begun_s)
        return TokenPart(tuple(tokens[:taken]), finish, *report)

    def _finish(self, token: int, eog_tokens: Collection[int], n_ctx: int) -> FinishReason | None:
        if token in eog_tokens and not self.request.sampling.ignore_eos:
            return "stop"
        return "length" if self.to_come <= 0 or len(self.tokens) >= n_ctx else None


def gap(taken: Collection[int], first: int = 0) -> int | None:
    """The lowest number from `first` that is free while a higher one is taken.

    llama.cpp computes neighbouring sequences together, so each gap between those that run reads all weights once more.
    """
    free = next(number for number in count(first) if number not in taken)
    return free if free < max(taken, default=0) else None
