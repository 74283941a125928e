"""Slots: the sequences that one context holds at the same time, and the requests that run in them."""

from __future__ import annotations

from dataclasses import dataclass

from swarmcpp.core import BlockRef, GenerateRequest, SamplerLike
from swarmcpp.engine.prefix import Held, pack
from swarmcpp.engine.scheduler import SlotView
from swarmcpp.engine.sequence import Generation


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has no slot yet. `tokens` is its prompt and what was generated before, packed."""

    serial: int
    request: GenerateRequest
    blocks: tuple[BlockRef, ...]
    tokens: bytes
    arrived_s: float


@dataclass(slots=True, eq=False, kw_only=True)
class Running(Generation):
    """A request in a slot."""

    sampler: SamplerLike


@dataclass(slots=True)
class Slot:
    """One sequence of the context. When free it keeps what its last request left, for the next one to go on from.

    `held` are the packed tokens that are in its KV or, while a prompt is prefilled, will be; `left` is how many a free
    slot's KV has of them; the arena knows of the first `stored` blocks.
    """

    index: int
    running: Running | None = None
    serial: int = 0
    """Of the request that filled it last."""
    held: bytes = b""
    left: int = 0
    salt: str | None = ""
    """None: nobody else may use what it holds."""
    last_used: int = 0
    stored: int = 0
    offered: bool = False
    """The node was just told of blocks that it may want; it is not free for others before the node could say so."""

    @property
    def busy(self) -> bool:
        """Whether its KV must stay."""
        return self.running is not None or self.offered

    @property
    def n_past(self) -> int:
        """Tokens in the KV."""
        return self.running.n_past if self.running else self.left

    def view(self) -> SlotView | None:
        """What the scheduler may know; None when free."""
        return self.running.view(self.index) if self.running else None

    def as_held(self) -> Held:
        """What the placement of other requests may know."""
        return Held(self.index, self.held, self.n_past, self.salt, self.busy, self.last_used)

    def take(self, other: Slot) -> None:
        """Take over the request of `other`, whose KV is here now and there no more."""
        self.running, other.running = other.running, None
        self.serial, other.serial = other.serial, 0
        self.held, other.held = other.held, b""
        self.salt, self.last_used, self.stored = other.salt, other.last_used, other.stored
        other.left = other.stored = 0
        self.offered, other.offered = other.offered, False

    def free(self, *, keep: bool) -> None:
        """End the running request; with `keep` its tokens stay for others."""
        if self.running is None:
            return
        self.running.sampler.close()
        self.left = self.running.n_past if keep else 0
        self.held = pack(self.running.tokens[: self.left])
        self.running = None
