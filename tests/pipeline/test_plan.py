"""Micro-batches: the pure part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.pipeline.plan import cut, regroup

SLOTS = st.sets(st.integers(0, 63), max_size=40).map(sorted)


@given(st.lists(st.tuples(SLOTS, st.integers(1, 8)), min_size=1, max_size=12))
def test_everybody_is_in_one_group_and_groups_are_even(history: list[tuple[list[int], int]]) -> None:
    groups: list[list[int]] = []
    for members, wanted in history:
        groups = regroup(groups, members, wanted)
        assert len(groups) == min(wanted, len(members))
        assert [slot for group in groups for slot in group] == members, "each is an interval of them"
        if groups:
            sizes = [len(group) for group in groups]
            assert max(sizes) - min(sizes) <= 1


@given(SLOTS.filter(bool), st.integers(1, 8))
def test_a_new_cut_takes_neighbours(members: list[int], wanted: int) -> None:
    groups = regroup([], members, wanted)
    assert [slot for group in groups for slot in group] == members
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(4, 40), st.integers(2, 4), st.data())
def test_one_who_leaves_and_one_who_comes_move_nobody(count: int, wanted: int, data: st.DataObject) -> None:
    groups = regroup([], range(count), wanted)
    gone = data.draw(st.sampled_from(groups))
    # From an even cut, one of the largest can go without making it uneven.
    if len(gone) < max(map(len, groups)):
        return
    left = gone[0]
    after = regroup(groups, [slot for slot in range(count) if slot != left], wanted)
    assert after == [[slot for slot in group if slot != left] for group in groups if group != [left]]
    assert sorted(map(len, regroup(after, range(count), wanted))) == sorted(map(len, groups))


def test_a_new_one_joins_its_neighbours() -> None:
    assert regroup([[0, 1], [3]], [0, 1, 2, 3], 2) == [[0, 1], [2, 3]]
    assert regroup([[0], [2, 3]], [0, 1, 2, 3], 2) == [[0, 1], [2, 3]]
    assert regroup([[0, 2], [3, 4]], [0, 1, 2, 3, 4], 2) == [[0, 1, 2], [3, 4]]
    assert regroup([[1, 2], [3, 4]], [0, 1, 2, 3, 4], 2) == [[0, 1, 2], [3, 4]]
    assert regroup([[0, 1], [2, 3]], [0, 1, 2, 3, 4, 5], 2) == [[0, 1, 2], [3, 4, 5]], "uneven otherwise"


def test_another_number_of_groups_cuts_anew() -> None:
    assert regroup([[0], [1, 2, 3]], [0, 1, 2, 3], 2) == [[0, 1], [2, 3]]
    assert regroup([[0, 1], [2, 3]], [0, 1, 2, 3, 4, 5], 3) == [[0, 1], [2, 3], [4, 5]]
    assert regroup([[0, 1], [2, 3]], [0, 1, 2, 3], 1) == [[0, 1, 2, 3]]


@given(st.integers(1, 50), st.data())
def test_cuts_are_even(count: int, data: st.DataObject) -> None:
    pieces = cut(range(count), data.draw(st.integers(1, count)))
    assert [member for piece in pieces for member in piece] == list(range(count))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
