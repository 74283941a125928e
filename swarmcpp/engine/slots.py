"""Slots: the sequences that one context holds at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from swarmcpp.core import GenerateRequest, SamplerLike
from swarmcpp.engine.scheduler import TILE_ROWS, SlotView


@dataclass(slots=True)
class Running:
    """A request in a slot. `tokens` is its prompt and what was generated; the first `n_past` are in the KV."""

    serial: int
    request: GenerateRequest
    sampler: SamplerLike
    tokens: list[int]
    queue_s: float
    admitted_s: float
    n_past: int = 0
    sampled: int = 0
    """Tokens that this engine sampled for the request."""

    @property
    def remaining(self) -> int:
        """Prompt tokens still to prefill; 0 once it decodes."""
        return 0 if self.sampled else len(self.tokens) - self.n_past


@dataclass(slots=True)
class Slot:
    """One sequence of the context, free or running."""

    index: int
    running: Running | None = None

    def view(self) -> SlotView | None:
        """What the scheduler may know; None when free."""
        if self.running is None:
            return None
        running = self.running
        tile_end = len(running.request.prompt) // TILE_ROWS * TILE_ROWS
        return SlotView(self.index, running.serial, running.n_past, running.remaining, tile_end)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has no slot yet."""

    serial: int
    request: GenerateRequest
    arrived_s: float
