"""Where a new request finds the beginning of its prompt: pure functions of what the slots hold.

Reuse is by whole blocks. With blocks of whole tiles (64 tokens) a prompt is then computed with the same kernels with
and without the cache, and its answer is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

OVERWRITE_SHARE = 0.5
"""A free slot is taken over when the request keeps at least this share of what it holds; else it is copied from, so
that two conversations with one system prompt do not throw each other out."""

Tier = Literal["", "slot", "arena"]


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes that compare fast, 4 each."""
    return array("i", tokens).tobytes()


def common_blocks(a: bytes, b: bytes, block_tokens: int) -> int:
    """Whole blocks that two packed token sequences have in common from the start."""
    step = 4 * block_tokens
    low, high = 0, min(len(a), len(b)) // step
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * step] == b[: middle * step]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class Held:
    """What a slot holds. `tokens` (packed) are or will be in its KV, `n_past` of them now; `salt` isolates tenants,
    and None from everybody."""

    slot: int
    tokens: bytes
    n_past: int
    salt: str | None
    busy: bool
    last_used: int

    @property
    def growing(self) -> bool:
        """Its prompt is being prefilled: more of `tokens` will be there soon."""
        return self.busy and 4 * self.n_past < len(self.tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    """A slot for a request, and how its first `tokens` get there.

    tier "": they do not; "slot" with `source` None: they are there; "slot": copy them from slot `source`; "arena": load
    them from the arena's blocks.
    """

    slot: int
    tier: Tier = ""
    tokens: int = 0
    source: int | None = None


def place(tokens: bytes, salt: str, stored: int, slots: Sequence[Held], block_tokens: int) -> Placement | None:
    """The best placement of a request, or None: wait, for no slot is free or another request is just computing more
    of this one's beginning than can be had now.

    `tokens` is its packed prompt, `stored` the blocks of it that the arena has. At least one token is left to compute,
    since its logits are needed. Block size 0 means that nothing is reused.
    """
    free = [held for held in slots if not held.busy]
    if not free:
        return None
    if not block_tokens:
        return Placement(min(held.slot for held in free))
    usable = (len(tokens) // 4 - 1) // block_tokens
    stored = min(stored, usable)

    def shared(held: Held) -> int:
        return min(usable, common_blocks(tokens, held.tokens, block_tokens)) if held.salt == salt else 0

    now = {held.slot: min(shared(held), held.n_past // block_tokens) for held in slots}
    best = max(slots, key=lambda held: (now[held.slot], not held.busy, -held.slot))
    blocks = max(now[best.slot], stored)
    if any(held.growing and shared(held) > blocks for held in slots):
        return None
    if not blocks:
        return Placement(_emptiest(free).slot)
    if now[best.slot] < stored:
        return Placement(_emptiest(free).slot, "arena", stored * block_tokens)
    kept = blocks * block_tokens
    if not best.busy and (len(free) == 1 or kept >= OVERWRITE_SHARE * best.n_past):
        return Placement(best.slot, "slot", kept)
    others = [held for held in free if held.slot != best.slot]
    return Placement(_emptiest(others).slot, "slot", kept, source=best.slot)


def _emptiest(free: Sequence[Held]) -> Held:
    """The free slot that is missed least: an empty one, else the one that was used longest ago."""
    return min(free, key=lambda held: (held.n_past > 0, held.last_used, held.slot))
