"""How long passes are waited for: who is next to a silent stage gives up first."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.route.patience import LEAST_S, MOST_S, STAGES, UNKNOWN_S, expected_s, hop_s, limit_s


def test_limits_follow_what_is_expected() -> None:
    curve = ((1, 0.1), (8, 0.2))
    assert expected_s([curve, curve], 8) == 0.4
    assert expected_s([curve, ()], 1) is None
    assert limit_s(None, 0) == UNKNOWN_S
    assert limit_s(0.001, 0) == LEAST_S
    assert limit_s(2.0, 0) == 16.0
    assert limit_s(2.0, STAGES) == 32.0
    assert limit_s(1e9, 2) == MOST_S


def given_up_at(limit: float, taken: list[float], stages: int) -> list[float]:
    """When each gives up a pass through `stages` that began at 0, if no answer comes: the head, then the hops to the
    stages after the first `taken`, which took so long each."""
    times, now, left = [limit], 0.0, limit
    for number, seconds in enumerate([0.0, *taken]):
        now, left = now + seconds, left - seconds
        if left <= 0:
            break
        left = hop_s(left, stages - number)
        times.append(now + left)
    return times


@given(st.one_of(st.none(), st.floats(0.0, 500.0)), st.lists(st.floats(0.0, 30.0), max_size=63), st.data())
def test_the_hop_to_a_silent_stage_gives_up_before_all_before_it(
    expected: float | None, taken: list[float], data: st.DataObject
) -> None:
    """Whatever is expected, and however long the stages before it took."""
    stages = data.draw(st.integers(len(taken) + 1, 64))
    times = given_up_at(limit_s(expected, stages), taken, stages)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)


@pytest.mark.parametrize("stages", [1, 2, 8, 64])
def test_there_is_time_for_the_news_to_come_back(stages: int) -> None:
    """A tenth of a second for each hop at least, where each stage that answers does so at once."""
    times = given_up_at(limit_s(0.0, stages), [0.0] * (stages - 1), stages)
    assert all(before - after > 0.1 for before, after in pairwise(times))
    assert times[-1] >= 2.5
