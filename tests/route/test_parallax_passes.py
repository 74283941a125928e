"""Measured pass times, and what they say about micro-batches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.route.passes import MAX_POINTS, Curve, PassTimes, micro_batches, pass_s, sound_curve
from swarmcpp.route.replicas import EXPIRY_S
from swarmcpp.testing import FakeClock

CURVE: Curve = ((1, 0.045), (4, 0.069), (8, 0.107))
curves = st.lists(st.tuples(st.integers(1, 512), st.floats(1e-6, 10.0)), min_size=1, max_size=12).map(sound_curve)


def test_between_measured_rows_it_is_linear_and_outside_it_has_the_usual_shape() -> None:
    assert pass_s(CURVE, 1, 24) == 0.045
    assert pass_s(CURVE, 8, 24) == 0.107
    assert pass_s(CURVE, 6, 24) == pytest.approx((0.069 + 0.107) / 2)
    assert pass_s(CURVE, 16, 24) == pytest.approx(0.107 * (1 + 15 * 0.2) / (1 + 7 * 0.2))
    assert pass_s(CURVE[1:], 1, 24) == pytest.approx(0.069 / (1 + 3 * 0.2))


def test_unknown_is_slow_and_never_free() -> None:
    assert pass_s((), 1, 24) == pass_s((), 64, 24) == pytest.approx(24 * 0.025)
    assert pass_s((), 128, 24) == pytest.approx(2 * 24 * 0.025)


@given(st.one_of(st.just(()), curves), st.integers(1, 2000), st.integers(0, 2000))
def test_more_rows_never_take_less_time(curve: Curve, rows: int, more: int) -> None:
    assert 0 < pass_s(curve, rows, 8) <= pass_s(curve, rows + more, 8) * (1 + 1e-9)


@given(st.lists(st.tuples(st.integers(-5, 2**40), st.floats()), max_size=40))
def test_a_curve_from_anywhere_is_made_sound(points: list[tuple[int, float]]) -> None:
    curve = sound_curve(points)
    assert len(curve) <= MAX_POINTS
    assert list(curve) == sorted(curve)
    assert [seconds for _, seconds in curve] == sorted(seconds for _, seconds in curve)
    assert all(1 <= rows <= 512 and 0 < seconds < math.inf for rows, seconds in curve)
    assert sound_curve(curve) == curve


def test_a_disturbed_sample_is_corrected_by_those_of_more_rows() -> None:
    assert sound_curve([(1, 0.045), (4, 0.5), (8, 0.107)]) == ((1, 0.045), (4, 0.107), (8, 0.107))


def test_pass_times_by_rows() -> None:
    clock = FakeClock()
    times = PassTimes(clock)
    times.add(1, 9.0)
    assert times.curve() == ()
    for seconds in (0.040, 0.060):
        times.add(1, seconds)
    times.add(8, 0.120)
    assert times.curve() == ((1, pytest.approx(0.050)), (8, pytest.approx(0.120)))
    # Recent ones count more.
    clock.advance(60)
    times.add(1, 0.080)
    assert times.curve()[0][1] == pytest.approx((0.5 * 0.100 + 0.080) / (0.5 * 2 + 1))


def test_rows_in_between_count_for_the_next_power_of_two() -> None:
    times = PassTimes(FakeClock())
    for _ in range(2):
        times.add(6, 0.100)
    assert times.curve() == ((8, pytest.approx(0.100 * (1 + 7 * 0.2) / (1 + 5 * 0.2))),)
    assert pass_s(times.curve(), 6, 24) == pytest.approx(0.100)
    times.add(5000, 10.0)
    assert times.curve()[-1][0] == 512


def test_rows_in_between_count_only_while_the_power_of_two_is_unknown() -> None:
    """Kernels work in tiles: 7 rows may take longer than 8."""
    times = PassTimes(FakeClock())
    times.add(8, 9.0)
    times.add(8, 0.058)
    for _ in range(5):
        times.add(7, 0.077)
    assert times.curve() == ((8, pytest.approx(0.058)),)


def test_pass_times_expire_and_the_next_is_cold_again() -> None:
    clock = FakeClock()
    times = PassTimes(clock)
    for _ in range(2):
        times.add(1, 0.05)
    clock.advance(EXPIRY_S / 2)
    times.add(4, 0.07)
    clock.advance(EXPIRY_S / 2 + 1)
    assert times.curve() == ((4, pytest.approx(0.07)),)
    clock.advance(EXPIRY_S)
    assert times.curve() == ()
    times.add(1, 5.0)
    assert times.curve() == ()
    times.add(1, 0.05)
    assert times.curve() == ((1, pytest.approx(0.05)),)


def test_what_is_no_time_is_ignored() -> None:
    times = PassTimes(FakeClock())
    times.add(1, 0.05)
    for rows, seconds in ((1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf), (0, 1.0), (-3, 1.0)):
        times.add(rows, seconds)
    assert times.curve() == ()


def test_a_curve_has_a_point_for_each_power_of_two() -> None:
    times = PassTimes(FakeClock())
    for rows in (1, *range(1000)):
        times.add(rows, 0.001 * (rows + 1))
    assert len(times.curve()) == MAX_POINTS


def cycle_s(count: int, streams: int, chain: list[Curve], rtt_s: float) -> float:
    times = [pass_s(curve, math.ceil(streams / count), 0) for curve in chain]
    return max(count * max(times), sum(times) + rtt_s)


@given(st.integers(1, 80), st.lists(curves, min_size=1, max_size=5), st.floats(0, 2), st.integers(1, 20))
def test_no_other_number_of_micro_batches_is_faster(streams: int, chain: list[Curve], rtt_s: float, most: int) -> None:
    count = micro_batches(streams, chain, rtt_s, most)
    assert 1 <= count <= min(streams, most)
    own = cycle_s(count, streams, chain, rtt_s)
    for other in range(1, min(streams, most) + 1):
        rival = cycle_s(other, streams, chain, rtt_s)
        assert own < rival if other < count else own <= rival


def test_micro_batches_follow_the_measured_times() -> None:
    # 8 rows cost nearly as much as 16: two stages keep each other busy with halves of 32, and 16 stay whole.
    dear_halves = ((1, 0.04), (8, 0.100), (16, 0.105), (32, 0.200))
    assert micro_batches(32, [dear_halves] * 2, 0.0, 8) == 2
    assert micro_batches(16, [dear_halves] * 2, 0.0, 8) == 2
    # At 20 ms of delay more of them in flight pay only where rows are what costs.
    by_row = tuple((rows, 0.001 + 0.002 * rows) for rows in (1, 2, 4, 8, 16, 32))
    assert micro_batches(16, [by_row] * 2, 0.020, 8) > 2
    assert micro_batches(1, [by_row] * 2, 0.020, 8) == 1


def test_without_measured_times_there_are_as_many_as_stages() -> None:
    assert micro_batches(16, [CURVE, ()], 0.0, 8) == 2
    assert micro_batches(1, [(), (), ()], 0.0, 8) == 1
    assert micro_batches(16, [(), (), ()], 0.0, 2) == 2
    assert micro_batches(0, [()], 0.0, 0) == 1
