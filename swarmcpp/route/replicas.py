"""Which replica of a model finishes a request first. Pure: the same replicas give the same choice, in any order.

The estimate of one replica is the sum of

    wait    = max(0, ahead - slots + 1) * EXPECTED_TOKENS * t(slots) / slots
    prompt  = (prompt - warm) / prefill rate, or less where shipping the missing KV to it is cheaper
    backlog = prompt tokens of others that it has to compute first / prefill rate
    answer  = expected tokens * t(streams)
    rtt     = one round trip

with `ahead` the requests that it has already (running, waiting, and on their way from this node) and `streams` those
that decode beside this one, itself included. `wait` is the time until enough requests have left: `slots` of them run
side by side, each as long as a typical answer.

A decode step of b streams takes t(b) = t1 + (b - 1) * t_row, with t_row = ROW_SHARE * t1: the weights are read once for
all rows, the rest grows with them. A node tells tokens/s of all its streams together, r at b streams, so
t1 = b / r / (1 + (b - 1) * ROW_SHARE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarmcpp.core import TILE_ROWS, Clock
from swarmcpp.peers import Load, NodeId
from swarmcpp.telemetry import RateEma

EXPECTED_TOKENS: Final = 256
"""Tokens of a typical answer: few clients know how long theirs will be, and most set max_tokens far above it."""

ROW_SHARE: Final = 0.2
"""Of a step's time for one stream, what each further one adds. Measured (0.5B, Q8_0, two cores) at 1, 2, 4 and 8
streams: 22, 40, 58 and 75 tokens/s, so 45, 50, 69 and 107 ms a step."""

SLOW_PASS_S: Final = 0.025
"""A layer's time for one pass over it where no rate at all is known: a decode step, or a tile of a prompt."""

TIE_SHARE: Final = 0.1
TIE_S: Final = 0.05
"""What a peer must win by, the larger of the two: measured rates of equal machines differ by as much."""

LEAST_TPS: Final = 1e-3
"""A lower rate is taken for unknown, which keeps every estimate finite whatever a peer tells."""

EXPIRY_S: Final = 600.0
HALF_LIFE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Prompt tokens/s, and answer tokens/s of a stream that decodes alone; 0: unknown."""

    prefill_tps: float = 0.0
    decode_tps: float = 0.0


@dataclass(frozen=True, slots=True)
class Replica:
    """What answers whole requests: this node's (`name` is empty), or a peer's."""

    node: NodeId
    name: str
    slots: int
    queue_size: int
    """Requests that may wait there; one more would be refused."""
    load: Load
    outstanding: int = 0
    """Requests that this node sent there and that `load` does not count yet."""
    outstanding_tokens: int = 0
    """Tokens of their prompts."""
    warm_tokens: int = 0
    """Tokens of the prompt whose KV it holds."""
    own_rates: Rates = Rates()
    """What this node measured there itself; goes before what the peer tells."""
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    """Of the link to it; 0: unknown. Not looked at for this node's own."""
    pipeline: bool = False
    """It is a head over stages of the swarm, not an engine with all layers."""

    @property
    def route(self) -> str:
        """As users see it: "local", or "peer" and the name."""
        return f"peer {self.name}" if self.name else "local"

    @property
    def ahead(self) -> int:
        """Requests that run or wait there, or are on their way."""
        return self.load.slots_busy + self.load.waiting + self.outstanding

    @property
    def full(self) -> bool:
        """Whether one more request would be refused."""
        return self.slots < 1 or self.ahead - self.slots >= self.queue_size


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to run a request, the seconds until its end as estimated, and the reason in words."""

    replica: Replica
    finish_s: float
    why: str


@dataclass(frozen=True, slots=True)
class _Estimate:
    replica: Replica
    wait_s: float
    backlog_s: float
    prompt_s: float
    answer_s: float
    shipped: bool

    @property
    def finish_s(self) -> float:
        return self.wait_s + self.backlog_s + self.prompt_s + self.answer_s + self.replica.rtt_s

    def __str__(self) -> str:
        shipped = " shipped" if self.shipped else ""
        return (
            f"{self.replica.route} {self.finish_s:.2f} s (wait {self.wait_s:.2f}, backlog {self.backlog_s:.2f}, "
            f"prompt {self.prompt_s:.2f}{shipped}, answer {self.answer_s:.2f}, rtt {self.replica.rtt_s:.3f})"
        )


def choose(
    replicas: Sequence[Replica],
    prompt_tokens: int,
    max_tokens: int,
    *,
    n_layers: int,
    token_bytes: int = 0,
    expected_tokens: int | None = None,
) -> Choice | None:
    """The replica that finishes first; None when all are full. Takes time linear in their number.

    `token_bytes` of KV a token travel when blocks are shipped; 0: they cannot be. Without `expected_tokens` an answer
    is expected to have EXPECTED_TOKENS, or `max_tokens` if that is less. This node's own replica wins near ties.
    """
    replicas = [replica for replica in replicas if not replica.full]
    if any(replica.pipeline and not replica.name for replica in replicas):
        # The head of a peer would use the same stages: their batches would only fall apart into those of two heads.
        replicas = [replica for replica in replicas if not (replica.pipeline and replica.name)]
    if not replicas:
        return None
    expected = min(max_tokens, EXPECTED_TOKENS if expected_tokens is None else expected_tokens)
    rates = _rates(replicas, n_layers)
    source = max(replicas, key=lambda each: (each.warm_tokens, _link_rate(each), -each.rtt_s, each.node))
    estimates = [
        _estimate(replica, rate, source, prompt_tokens, expected, token_bytes)
        for replica, rate in zip(replicas, rates, strict=True)
    ]
    ranked = sorted(estimates, key=lambda each: (each.finish_s, bool(each.replica.name), each.replica.node))
    best = ranked[0]
    local = next((each for each in ranked if not each.replica.name), best)
    chosen = local if local.finish_s - best.finish_s <= max(TIE_S, TIE_SHARE * best.finish_s) else best
    rival = next((each for each in ranked if each is not chosen), None)
    why = str(chosen) if rival is None else f"{chosen}; next {rival}"
    return Choice(chosen.replica, chosen.finish_s, why)


def single_stream_tps(load: Load, slots: int) -> float:
    """Answer tokens/s of one stream alone, from what a node tells of all its streams; 0: unknown. See the module."""
    streams = max(1, min(load.slots_busy, slots))
    return load.decode_tps / streams * (1 + (streams - 1) * ROW_SHARE)


def _rates(replicas: Sequence[Replica], n_layers: int) -> list[Rates]:
    """Of each replica: own samples, else what it tells, else the slowest that is known, else SLOW_PASS_S a layer."""
    told = [
        Rates(
            _known(replica.own_rates.prefill_tps) or _known(replica.load.prefill_tps),
            _known(replica.own_rates.decode_tps) or _known(single_stream_tps(replica.load, replica.slots)),
        )
        for replica in replicas
    ]
    pass_s = SLOW_PASS_S * max(1, n_layers)
    prefill = min((each.prefill_tps for each in told if each.prefill_tps), default=TILE_ROWS / pass_s)
    decode = min((each.decode_tps for each in told if each.decode_tps), default=1 / pass_s)
    return [Rates(each.prefill_tps or prefill, each.decode_tps or decode) for each in told]


def _known(tps: float) -> float:
    return tps if tps >= LEAST_TPS else 0.0


def _estimate(
    replica: Replica, rates: Rates, source: Replica, prompt_tokens: int, expected: int, token_bytes: int
) -> _Estimate:
    def step_s(streams: int) -> float:
        return (1 + (streams - 1) * ROW_SHARE) / rates.decode_tps

    leave_first = max(0, replica.ahead - replica.slots + 1)
    compute_s = (prompt_tokens - _warm(replica, prompt_tokens)) / rates.prefill_tps
    ship_s = _ship_s(replica, rates, source, prompt_tokens, token_bytes)
    return _Estimate(
        replica,
        wait_s=leave_first * EXPECTED_TOKENS * step_s(replica.slots) / replica.slots,
        backlog_s=(replica.load.backlog + replica.outstanding_tokens) / rates.prefill_tps,
        prompt_s=min(compute_s, ship_s),
        answer_s=expected * step_s(min(replica.slots, replica.ahead + 1)),
        shipped=ship_s < compute_s,
    )


def _ship_s(replica: Replica, rates: Rates, source: Replica, prompt_tokens: int, token_bytes: int) -> float:
    """Seconds for the prompt when what `source` holds beyond `replica` is shipped first; infinite where that cannot be.

    How fast two peers are linked is known to them alone: as fast as the slower of this node's own links to them, here.
    """
    missing = _warm(source, prompt_tokens) - _warm(replica, prompt_tokens)
    bytes_per_s = min(_link_rate(source), _link_rate(replica))
    if token_bytes <= 0 or bytes_per_s < 1:
        return math.inf
    rest_s = (prompt_tokens - _warm(source, prompt_tokens)) / rates.prefill_tps
    return source.rtt_s + replica.rtt_s + missing * token_bytes / bytes_per_s + rest_s


def _warm(replica: Replica, prompt_tokens: int) -> int:
    # The last token is always computed: its logits are wanted.
    return max(0, min(replica.warm_tokens, prompt_tokens - 1))


def _link_rate(replica: Replica) -> float:
    return replica.bytes_per_s if replica.name else math.inf


class DelegationRates:
    """Rates of peers as this node measured them on requests that it sent there.

    The first sample of a peer is dropped, also of one that was not heard of for `EXPIRY_S`: it pays for cold caches and
    weights that are not in memory yet. Bounded by the peers that were used within that time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._peers: dict[NodeId, _Samples] = {}

    def add(
        self, peer: NodeId, *, computed_tokens: int, prefill_s: float, tokens: int, decode_s: float, streams: int
    ) -> None:
        """Add a request that ended now: prompt tokens that were computed and the seconds for them, answer tokens after
        the first and the seconds for them, and the streams that decoded there, this one included."""
        now = self._clock()
        self._peers = {node: each for node, each in self._peers.items() if now - each.at <= EXPIRY_S}
        samples = self._peers.get(peer)
        if samples is None:
            self._peers[peer] = _Samples(self._clock)
            return
        samples.at = now
        samples.prefill.add(computed_tokens, prefill_s)
        # As many tokens as one stream alone would have had in that time.
        samples.decode.add(tokens * (1 + (max(1, streams) - 1) * ROW_SHARE), decode_s)

    def rates(self, peer: NodeId) -> Rates:
        """What is known of `peer`; zeros: nothing, or nothing recent."""
        samples = self._peers.get(peer)
        if samples is None:
            return Rates()
        return Rates(samples.prefill.rate() or 0.0, samples.decode.rate() or 0.0)


class _Samples:
    __slots__ = ("at", "decode", "prefill")

    def __init__(self, clock: Clock) -> None:
        self.at = clock()
        self.prefill = RateEma(half_life_s=HALF_LIFE_S, expiry_s=EXPIRY_S, clock=clock)
        self.decode = RateEma(half_life_s=HALF_LIFE_S, expiry_s=EXPIRY_S, clock=clock)
