"""Passes of a lane on their way, and what may come back of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from swarmcpp.core import Chunk, Token
from swarmcpp.pipeline.runs import Run


@dataclass(slots=True, eq=False)
class Flight:
    """A pass on its way: each run with its stamp and rows."""

    parts: tuple[tuple[Run, tuple[int, int], Chunk], ...]
    decode: bool
    begun: float
    expected_s: float
    over: asyncio.Future[None]
    alone: bool
    """Nothing else was on its way when it began."""
    timer: asyncio.TimerHandle | None = None
    past_first: bool = False
    """The first stage has computed it, if that is on this node."""

    @property
    def rows(self) -> int:
        """Rows of all its parts."""
        return sum(chunk.count for _, _, chunk in self.parts)


def follows(tokens: Sequence[Token], chunk: Chunk) -> bool:
    """Whether tokens can be what came of a chunk: its guesses as far as they go, then one more."""
    ids = tuple(token.id for token in tokens)
    return len(ids) <= chunk.outputs and ids[:-1] == chunk.guesses[: max(0, len(ids) - 1)]
