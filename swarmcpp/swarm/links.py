"""What this node measured of its links: round trips and rates, and the price of what is not known."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from swarmcpp.core import Clock
from swarmcpp.errors import SwarmError, WireError
from swarmcpp.peers import NodeId, ObservedLatency
from swarmcpp.telemetry import RateEma
from swarmcpp.wire.peers import Caller, Ping, Pong

UNKNOWN_LINK_RTT_S: Final = 0.1
"""To a peer that is to be asked for something."""

UNKNOWN_BYTES_PER_S: Final = 125_000.0
"""1 Mbit/s. What has not been measured is priced as slow: a wrong guess then costs a chance, not a user's time."""

EXPIRY_S: Final = 600.0
HALF_LIFE_S: Final = 60.0
MAX_PEERS: Final = 1024
PROBE_BYTES: Final = 128 << 10
PROBE_TIMEOUT_S: Final = 2.0
PROBES: Final = 4
"""Of a quick link, whose shortest counts: what else a machine does for some milliseconds would make it look slow."""

SLOW_BYTES_PER_S: Final = 4e6
RETRY_S: Final = 30.0
"""A link that looks slower than 32 Mbit/s is measured again after this time: one stall must not count for long."""

_SHORTEST_S = 1e-6
"""No time that is measured is shorter; rates stay finite."""

_RTT_SAMPLES = 8
_MIN_SAMPLE_BYTES = 64 << 10
"""The time of a smaller transfer is mostly latency."""


@dataclass(slots=True)
class _Link:
    rate: RateEma
    rtts: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RTT_SAMPLES))
    """(when, seconds)."""
    heard: float = 0.0
    rated: float = -math.inf


class LinkBook:
    """Round trips (seconds) and rates (bytes/s towards this node) by peer, forgotten 600 s after their last sample."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._links: dict[NodeId, _Link] = {}
        self._peak = 0.0
        self._peak_at = -math.inf

    def add_rtt(self, peer: NodeId, seconds: float) -> None:
        """Note one round trip."""
        if math.isfinite(seconds) and seconds >= 0:
            self._link(peer).rtts.append((self.clock(), seconds))

    def add_transfer(self, peer: NodeId, n_bytes: int, seconds: float, *, fresh: bool = False) -> None:
        """Note that `n_bytes` took `seconds`, the round trip not counted. `fresh` forgets what was known before."""
        if not math.isfinite(seconds) or seconds <= 0 or n_bytes < 0:
            return
        link = self._link(peer)
        if fresh:
            link.rate = self._new_rate()
        link.rate.add(n_bytes, max(seconds, _SHORTEST_S))
        link.rated = self.clock()

    def add_total(self, n_bytes: int, seconds: float) -> None:
        """Note what came over all links together: the fastest of these says what this node's own side can take."""
        if not math.isfinite(seconds) or seconds <= 0 or n_bytes < _MIN_SAMPLE_BYTES:
            return
        now, rate = self.clock(), n_bytes / max(seconds, _SHORTEST_S)
        if rate >= self._peak or now - self._peak_at > EXPIRY_S:
            self._peak, self._peak_at = rate, now

    def rtt_s(self, peer: NodeId) -> float:
        """The smallest of the last round trips: the others also measured queues. 0.1 when there is none."""
        known = self._rtt(peer)
        return UNKNOWN_LINK_RTT_S if known is None else known

    def bytes_per_s(self, peer: NodeId) -> float:
        """The rate of a link, for a price: 125 kB/s when it is not known, and never 0."""
        rate = self._rate(peer)
        return UNKNOWN_BYTES_PER_S if rate is None else max(rate, 1.0)

    def own_bytes_per_s(self) -> float:
        """The most that this node is known to receive at: over one link, or over several together."""
        peak = self._peak if self.clock() - self._peak_at <= EXPIRY_S else 0.0
        return max(peak, UNKNOWN_BYTES_PER_S, *(self._rate(peer) or 0.0 for peer in self._links))

    def rate_known(self, peer: NodeId) -> bool:
        """Whether there is a rate that has not expired."""
        return self._rate(peer) is not None

    def wants_rate(self, peer: NodeId) -> bool:
        """Whether the rate should be measured: it is unknown, or was bad some time ago."""
        rate = self._rate(peer)
        return rate is None or (rate < SLOW_BYTES_PER_S and self.clock() - self._links[peer].rated > RETRY_S)

    def observed(self, n: int = 32) -> tuple[ObservedLatency, ...]:
        """The `n` nearest peers, nearest first; a rate that is not known is 0."""
        known = [(rtt, peer) for peer in self._links if (rtt := self._rtt(peer)) is not None]
        return tuple(ObservedLatency(peer, rtt, self._rate(peer) or 0.0) for rtt, peer in sorted(known)[:n])

    def forget(self, peer: NodeId) -> None:
        """The peer is gone."""
        self._links.pop(peer, None)

    def _link(self, peer: NodeId) -> _Link:
        link = self._links.get(peer)
        if link is None:
            if len(self._links) >= MAX_PEERS:
                del self._links[min(self._links, key=lambda each: self._links[each].heard)]
            link = self._links[peer] = _Link(self._new_rate())
        link.heard = self.clock()
        return link

    def _new_rate(self) -> RateEma:
        return RateEma(half_life_s=HALF_LIFE_S, expiry_s=EXPIRY_S, clock=self.clock)

    def _rtt(self, peer: NodeId) -> float | None:
        link, now = self._links.get(peer), self.clock()
        return min((rtt for at, rtt in link.rtts if now - at <= EXPIRY_S), default=None) if link else None

    def _rate(self, peer: NodeId) -> float | None:
        link = self._links.get(peer)
        return link.rate.rate() if link else None


async def probe(book: LinkBook, peer: NodeId, caller: Caller) -> bool:
    """Measure the round trip to `peer`, and the rate when that is wanted; within 4 s. Whether it answered well."""
    try:
        rtt = await _ping(book, caller, 0)
        book.add_rtt(peer, rtt)
        if book.wants_rate(peer):
            taken = await _ping(book, caller, PROBE_BYTES)
            if taken * SLOW_BYTES_PER_S < PROBE_BYTES:
                taken = min(taken, *[await _ping(book, caller, PROBE_BYTES) for _ in range(PROBES - 1)])
            # Round trips vary: what is left after subtracting one is never taken as less than a tenth.
            book.add_transfer(peer, PROBE_BYTES, max(taken - book.rtt_s(peer), taken / 10), fresh=True)
    except SwarmError:
        return False
    return True


async def _ping(book: LinkBook, caller: Caller, reply_bytes: int) -> float:
    begun = book.clock()
    reply, frames = await caller.ask(Ping(reply_bytes), timeout_s=PROBE_TIMEOUT_S)
    taken = book.clock() - begun
    if not isinstance(reply, Pong) or sum(len(frame) for frame in frames) != reply_bytes:
        raise WireError(f"the answer to a ping for {reply_bytes} bytes is not that")
    return taken
