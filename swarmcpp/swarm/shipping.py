"""Ship or compute: whether blocks of a prompt come sooner from peers or from the local engine. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

Encoding = Literal["f16", "q8_0"]
KvWire = Literal["auto", "f16", "q8_0"]

ASSUMED_PREFILL_TPS: Final = 100.0
"""Tokens/s of an engine that has not computed a prompt yet: a 0.5B model on two cores, and more than larger ones do."""

MIN_GAIN: Final = 0.9
"""Shipping must take at most this share of the time to compute: rates are estimates, and computing is certain."""

EXACT_ENOUGH_S: Final = 0.25
"""Up to this time blocks travel exactly as they were computed; beyond it, as Q8_0 when that is faster."""

CODEC_BYTES_PER_S: Final = 300e6
"""F16 bytes that one core quantises in a second, and another turns back, while frames travel."""

SLACK: Final = 1.5
LONGEST_S: Final = 60.0
"""No fetch takes longer, however much there is to ship."""

_GRACE_S = 0.1
"""For a peer to look up and read its first blocks."""

_Q8_0_BLOCK = 32
"""Values that share a scale in Q8_0: 34 bytes for 64 of F16."""


@dataclass(frozen=True, slots=True)
class Source:
    """A peer that can send: round trip in seconds, rate in bytes/s (above 0)."""

    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Shipment:
    """What could be shipped, and what else would happen.

    `limit_s` is the time until the request's deadline; `queue_s` the time that the local engine is busy with others
    anyway. Rates of 0 are unknown.
    """

    n_blocks: int
    block_bytes: int
    block_tokens: int
    prefill_tps: float = 0.0
    queue_s: float = 0.0
    limit_s: float = LONGEST_S
    own_bytes_per_s: float = math.inf

    @property
    def token_s(self) -> float:
        """Seconds to compute one token here."""
        return 1 / (self.prefill_tps if self.prefill_tps > 0 else ASSUMED_PREFILL_TPS)


@dataclass(frozen=True, slots=True)
class ShipPlan:
    """How many blocks to ship (0: compute, `reason` says why), how, and the estimates in seconds and bytes/s."""

    n_blocks: int
    encoding: Encoding
    wire_block_bytes: int
    ship_s: float
    compute_s: float
    bytes_per_s: float
    rtt_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """A fetch under way: `unusable_blocks` are not part of the leading run yet, `missing_blocks` have not arrived.

    `credit_bytes` is one request under way of each peer; `silent_s` the time since anything arrived.
    """

    elapsed_s: float
    silent_s: float
    received_bytes: int
    credit_bytes: int
    unusable_blocks: int
    missing_blocks: int


def wire_bytes(block_bytes: int, encoding: Encoding) -> int:
    """Bytes of one block's frame."""
    return block_bytes if encoding == "f16" else block_bytes // (2 * _Q8_0_BLOCK) * (_Q8_0_BLOCK + 2)


def can_quantise(block_bytes: int) -> bool:
    """Whether a block divides into Q8_0's groups of 32 values."""
    return block_bytes % (2 * _Q8_0_BLOCK) == 0


def decide(what: Shipment, sources: Sequence[Source], wire: KvWire) -> ShipPlan:
    """The plan for blocks that all of `sources` send parts of.

    ship(n)    = rtt + n x frame bytes / rate, and for Q8_0 at least rtt + n x block bytes / codec rate
    rate       = the sum over the sources, at most what this node is known to receive at
    compute(n) = n x tokens of a block / prefill rate

    The n blocks are all, or as many as take limit / 1.5. They are shipped if ship(n) - queue <= 0.9 x compute(n):
    while the engine is busy with others, shipping delays nothing.
    """
    rtt = max((source.rtt_s for source in sources), default=0.0)
    rate = max(1.0, min(sum(source.bytes_per_s for source in sources), what.own_bytes_per_s))
    plan = _plan(what, rtt, rate, "f16")
    if can_quantise(what.block_bytes) and wire != "f16":
        small = _plan(what, rtt, rate, "q8_0")
        sooner = small.n_blocks > plan.n_blocks or small.ship_s < plan.ship_s
        if wire == "q8_0" or (plan.ship_s > EXACT_ENOUGH_S and sooner):
            plan = small
    if plan.n_blocks == 0:
        return plan
    if plan.ship_s - what.queue_s > MIN_GAIN * plan.compute_s:
        return _with_no_blocks(plan, "computing-is-faster")
    return plan


def fetch_limit_s(ship_s: float, shortest_s: float) -> float:
    """Seconds that a whole fetch may take: 1 + 1.5 x its estimate, at least `shortest_s`, at most 60."""
    return min(LONGEST_S, max(shortest_s, 1 + SLACK * ship_s))


def _plan(what: Shipment, rtt: float, rate: float, encoding: Encoding) -> ShipPlan:
    frame = wire_bytes(what.block_bytes, encoding)
    each_s = frame / rate
    if encoding == "q8_0":
        each_s = max(each_s, what.block_bytes / CODEC_BYTES_PER_S)
    room_s = min(what.limit_s, LONGEST_S) / SLACK - rtt
    n = max(0, min(what.n_blocks, math.floor(room_s / each_s)))
    plan = ShipPlan(n, encoding, frame, rtt + n * each_s, n * what.block_tokens * what.token_s, rate, rtt)
    return plan if n else _with_no_blocks(plan, "no-time")


def _with_no_blocks(plan: ShipPlan, reason: str) -> ShipPlan:
    return replace(plan, n_blocks=0, reason=reason)


def overtaken(plan: ShipPlan, what: Shipment, progress: Progress) -> bool:
    """Whether a fetch under way should stop, because computing what it has not brought would now be faster.

    rate now = (received + one request per peer) / (elapsed - rtt - 0.1 s)

    A request that is under way counts as received, since most of it may be, so a link that keeps its rate is never
    stopped. When nothing at all has come for as long as computing the rest takes, it stops too: then waiting has cost
    at most as much again.
    """
    compute_s = progress.unusable_blocks * what.block_tokens * what.token_s + max(
        0.0, what.queue_s - progress.elapsed_s
    )
    on_the_way = progress.received_bytes + progress.credit_bytes
    rate = on_the_way / max(1e-3, progress.elapsed_s - plan.rtt_s - _GRACE_S)
    ship_s = progress.missing_blocks * plan.wire_block_bytes / max(1.0, rate)
    return ship_s > compute_s or progress.silent_s > max(compute_s, plan.rtt_s + _GRACE_S)
