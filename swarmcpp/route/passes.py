"""How long a pass of n rows through a stage takes as measured, and into how many micro-batches to cut one. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from swarmcpp.core import MAX_ROWS, TILE_ROWS, Clock
from swarmcpp.route.replicas import EXPIRY_S, HALF_LIFE_S, ROW_SHARE, SLOW_PASS_S
from swarmcpp.telemetry import RateEma

Curve = tuple[tuple[int, float], ...]
"""Measured (rows, seconds of one pass), rows rising and seconds never falling; empty: not measured."""

MAX_POINTS: Final = MAX_ROWS.bit_length()
"""Points of a curve: 1, 2, 4, ... 512 rows."""


def pass_s(curve: Curve, rows: int, n_layers: int) -> float:
    """Seconds of one pass of `rows` rows through `n_layers` layers whose measured times are `curve`.

    Between two points it is linear. Outside of them it has the shape of replicas.py, seconds = a * (1 + (rows - 1) *
    ROW_SHARE), through the nearest point. Nothing measured: SLOW_PASS_S a layer for every TILE_ROWS rows or part.
    Rises with `rows` and is never 0.
    """
    if not curve:
        return SLOW_PASS_S * n_layers * max(1.0, rows / TILE_ROWS)
    at = bisect_left(curve, (rows,))
    if at == len(curve) or (at == 0 and curve[0][0] != rows):
        nearest, seconds = curve[min(at, len(curve) - 1)]
        return seconds * _shape(rows) / _shape(nearest)
    high, high_s = curve[at]
    if high == rows:
        return high_s
    low, low_s = curve[at - 1]
    return low_s + (high_s - low_s) * (rows - low) / (high - low)


def sound_curve(points: Iterable[tuple[int, float]]) -> Curve:
    """The curve that `points` tell, which may be anything: only finite seconds above 0, and at most MAX_POINTS.

    Where fewer rows seem to take longer, they take what more rows take: other work on a machine makes single samples
    slower, never faster.
    """
    sound = {rows: seconds for rows, seconds in points if 1 <= rows <= MAX_ROWS and 0 < seconds < math.inf}
    curve: list[tuple[int, float]] = []
    for rows in sorted(sound, reverse=True):
        curve.append((rows, min(sound[rows], curve[-1][1]) if curve else sound[rows]))
    return tuple(reversed(curve[-MAX_POINTS:]))


def _shape(rows: int) -> float:
    return 1 + (rows - 1) * ROW_SHARE


class PassTimes:
    """Seconds of the passes of one stage by their rows, as moving averages, for powers of two; EXPIRY_S after its last
    sample a row count is unknown again. Only while it is, what passes of fewer rows took stands for it, scaled along
    `_shape`: kernels work in tiles, and may need longer for 7 rows than for 8 (measured: 77 and 58 ms).

    The first sample is dropped, also after EXPIRY_S without any: it pays for weights that are not in memory yet.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passes: dict[int, RateEma] = {}
        self._near: dict[int, RateEma] = {}
        """Of fewer rows than a power of two."""
        self._at = -math.inf

    def add(self, rows: int, seconds: float) -> None:
        """Add a pass that ended now. What is not a time is ignored."""
        if rows < 1 or not 0 < seconds < math.inf:
            return
        now = self._clock()
        cold = now - self._at > EXPIRY_S
        self._at = now
        if cold:
            return
        bucket = min(1 << (rows - 1).bit_length(), MAX_ROWS)
        exact = self._passes.setdefault(bucket, self._ema())
        if rows == bucket:
            exact.add(1, seconds)
        else:
            near = self._near.setdefault(bucket, self._ema())
            near.add(1, seconds * _shape(bucket) / _shape(rows))

    def _ema(self) -> RateEma:
        return RateEma(half_life_s=HALF_LIFE_S, expiry_s=EXPIRY_S, clock=self._clock)

    def curve(self) -> Curve:
        """What is known now; empty: nothing."""
        rates = {
            rows: ema.rate() or (self._near[rows].rate() if rows in self._near else None)
            for rows, ema in self._passes.items()
        }
        return sound_curve((rows, 1 / rate) for rows, rate in rates.items() if rate)


def micro_batches(streams: int, curves: Sequence[Curve], rtt_s: float, most: int) -> int:
    """Into how many micro-batches, all in flight at once, to cut a decode batch of `streams` rows; at least 1.

    `curves` are those of the stages of the chain, `rtt_s` is the sum of the delays of the links around it. With M
    micro-batches of n = ceil(streams / M) rows, all streams have a token after

        max(M * max of t(s, n), sum of t(s, n) + rtt_s)

    seconds: the slowest stage computes all of them one after the other, and each goes round once. The M up to `most`
    with the shortest cycle, the smallest of those. Unless every curve is known: as many as there are stages.
    """
    most = max(1, min(most, streams))
    if not all(curves):
        return max(1, min(len(curves), most))

    def cycle_s(count: int) -> float:
        times = [pass_s(curve, -(-streams // count), 0) for curve in curves]
        return max(count * max(times), sum(times) + rtt_s)

    return min(range(1, most + 1), key=cycle_s) if curves else 1
