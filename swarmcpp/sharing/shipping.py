"""Ship, compute, or both: how blocks of a prompt come soonest, from peers or the local engine. Pure functions."""

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

SPLIT_GAIN: Final = 0.85
"""A split must take at most this share of the better of shipping and computing all: two estimates must hold for it."""

SPLIT_BLOCKS: Final = 4
"""Fewest blocks of either part of a split: less is not worth a request to the engine, or to a peer."""

EXACT_ENOUGH_S: Final = 0.15
"""Up to this time blocks travel exactly as they were computed; beyond it, as Q8_0 when that is faster: at 1 Gbit half
the bytes are worth their rounding from here on."""

CODEC_BYTES_PER_S: Final = 300e6
"""F16 bytes that one core quantises in a second, and another turns back, while frames travel."""

SLACK: Final = 1.5
LONGEST_S: Final = 60.0
"""No fetch takes longer, however much there is to ship."""

_GRACE_S = 0.1
"""For a peer to look up and read its first blocks."""

_FRONT_S = 0.1
"""To hand a front to the engine, and its blocks to the arena."""

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
    anyway. Rates of 0 are unknown. `can_split`: the engine may compute the first blocks while others come.
    """

    n_blocks: int
    block_bytes: int
    block_tokens: int
    prefill_tps: float = 0.0
    queue_s: float = 0.0
    limit_s: float = LONGEST_S
    own_bytes_per_s: float = math.inf
    can_split: bool = False

    @property
    def token_s(self) -> float:
        """Seconds to compute one token here."""
        return 1 / (self.prefill_tps if self.prefill_tps > 0 else ASSUMED_PREFILL_TPS)

    def compute_s(self, n_blocks: int) -> float:
        """Seconds that the local engine, once it is free, takes for some blocks."""
        return n_blocks * self.block_tokens * self.token_s


@dataclass(frozen=True, slots=True)
class ShipPlan:
    """How many blocks to ship (0: compute, `reason` says why), how, and the estimates in seconds and bytes/s.

    The `first` blocks before those are computed here meanwhile; `front_s` until then, the wait for the engine included.
    """

    n_blocks: int
    encoding: Encoding
    wire_block_bytes: int
    ship_s: float
    compute_s: float
    bytes_per_s: float
    rtt_s: float
    reason: str = ""
    first: int = 0
    front_s: float = 0.0

    def finish_s(self, what: Shipment) -> float:
        """Seconds until all blocks of `what` are there, when what is not shipped is computed."""
        rest_s = what.compute_s(what.n_blocks - self.first - self.n_blocks)
        return max(self.ship_s if self.n_blocks else 0.0, self.front_s, what.queue_s) + rest_s


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

    Where it may be split, the engine computes the first m of n blocks and the others are shipped meanwhile, if that
    takes at most 0.85 of the better of the plan above and of computing all:

    split(n)   = max(queue + 0.1 s + compute(m), ship(n - m)), either part of 4 blocks or more

    m is that for which max(queue + 0.1 s + compute(m), ship(n - m) / 0.9) is least: links vary, and what has not come
    when the engine is done must then be computed too. The first blocks are cheaper than the mean, of which the prefill
    rate is, so the engine rather ends early than late.
    """
    rtt, rate = _link(what, sources)
    plan = _whole(what, rtt, rate, wire)
    if what.can_split and (split := _best_split(what, rtt, rate, wire)):
        sooner = SPLIT_GAIN * min(plan.finish_s(what), what.queue_s + what.compute_s(what.n_blocks))
        if split.finish_s(what) <= sooner:
            return split
    return plan


def plan_copy(what: Shipment, sources: Sequence[Source], wire: KvWire) -> ShipPlan:
    """The plan for blocks that nobody waits for: all that there is time for are shipped, whatever computing them takes.

    Under "auto" exactly: an answer that goes on from exact KV has the text that it would have had.
    """
    return _plan(what, *_link(what, sources), "q8_0" if wire == "q8_0" and can_quantise(what.block_bytes) else "f16")


def _link(what: Shipment, sources: Sequence[Source]) -> tuple[float, float]:
    """(round trip in seconds, bytes/s) of all sources together."""
    rtt = max((source.rtt_s for source in sources), default=0.0)
    return rtt, max(1.0, min(sum(source.bytes_per_s for source in sources), what.own_bytes_per_s))


def _whole(what: Shipment, rtt: float, rate: float, wire: KvWire) -> ShipPlan:
    """Ship all that there is time for, or nothing."""
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


def fetch_limit_s(estimate_s: float, shortest_s: float) -> float:
    """Seconds that a whole fetch may take: 1 + 1.5 x its estimate, at least `shortest_s`, at most 60."""
    return min(LONGEST_S, max(shortest_s, 1 + SLACK * estimate_s))


def _each_s(what: Shipment, rate: float, encoding: Encoding) -> float:
    """Seconds that one block takes on the link."""
    each_s = wire_bytes(what.block_bytes, encoding) / rate
    return max(each_s, what.block_bytes / CODEC_BYTES_PER_S) if encoding == "q8_0" else each_s


def _room_s(what: Shipment) -> float:
    """Seconds that an estimate may be."""
    return min(what.limit_s, LONGEST_S) / SLACK


def _plan(what: Shipment, rtt: float, rate: float, encoding: Encoding) -> ShipPlan:
    each_s = _each_s(what, rate, encoding)
    n = max(0, min(what.n_blocks, math.floor((_room_s(what) - rtt) / each_s)))
    frame = wire_bytes(what.block_bytes, encoding)
    plan = ShipPlan(n, encoding, frame, rtt + n * each_s, what.compute_s(n), rate, rtt)
    return plan if n else _with_no_blocks(plan, "no-time")


def _best_split(what: Shipment, rtt: float, rate: float, wire: KvWire) -> ShipPlan | None:
    """The split in the encoding that `wire` asks for, or in the better one."""
    exact = _split(what, rtt, rate, "f16")
    if wire == "f16" or not can_quantise(what.block_bytes):
        return exact
    small = _split(what, rtt, rate, "q8_0")
    if wire == "q8_0":
        return small
    if exact is None or small is None:
        return exact or small
    return exact if exact.finish_s(what) <= max(EXACT_ENOUGH_S, small.finish_s(what)) else small


def _split(what: Shipment, rtt: float, rate: float, encoding: Encoding) -> ShipPlan | None:
    """The best split in one encoding; None when there is no room for one."""
    ship_each_s, compute_each_s = _each_s(what, rate, encoding), what.compute_s(1)
    begin_s = what.queue_s + _FRONT_S
    shippable = max(0, math.floor((_room_s(what) - rtt) / ship_each_s))
    computable = max(0, math.floor((_room_s(what) - begin_s) / compute_each_s))
    n = min(what.n_blocks, shippable + computable)
    fewest, most = max(SPLIT_BLOCKS, n - shippable), min(n - SPLIT_BLOCKS, computable)
    if fewest > most:
        return None

    def ends_s(front: int) -> float:
        return max(begin_s + front * compute_each_s, (rtt + (n - front) * ship_each_s) / MIN_GAIN)

    # One part grows with the front and the other shrinks: the best is next to where they meet.
    meet = ((rtt + n * ship_each_s) / MIN_GAIN - begin_s) / (compute_each_s + ship_each_s / MIN_GAIN)
    near = (min(most, max(fewest, front)) for front in (math.floor(meet), math.floor(meet) + 1))
    first = min(near, key=ends_s)
    back = n - first
    return ShipPlan(
        n_blocks=back,
        encoding=encoding,
        wire_block_bytes=wire_bytes(what.block_bytes, encoding),
        ship_s=rtt + back * ship_each_s,
        compute_s=what.compute_s(back),
        bytes_per_s=rate,
        rtt_s=rtt,
        first=first,
        front_s=begin_s + first * compute_each_s,
    )


def _with_no_blocks(plan: ShipPlan, reason: str) -> ShipPlan:
    return replace(plan, n_blocks=0, reason=reason)


def overtaken(plan: ShipPlan, what: Shipment, progress: Progress) -> bool:
    """Whether a fetch under way should stop, because computing what it has not brought would now be faster.

    rate now = (received + one request per peer) / (elapsed - rtt - 0.1 s)

    A request that is under way counts as received, since most of it may be, so a link that keeps its rate is never
    stopped. When nothing at all has come for as long as computing the rest takes, it stops too: then waiting has cost
    at most as much again.
    """
    compute_s = what.compute_s(progress.unusable_blocks) + max(0.0, what.queue_s - progress.elapsed_s)
    on_the_way = progress.received_bytes + progress.credit_bytes
    rate = on_the_way / max(1e-3, progress.elapsed_s - plan.rtt_s - _GRACE_S)
    ship_s = progress.missing_blocks * plan.wire_block_bytes / max(1.0, rate)
    return ship_s > compute_s or progress.silent_s > max(compute_s, plan.rtt_s + _GRACE_S)
