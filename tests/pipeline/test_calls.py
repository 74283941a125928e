"""What is checked where stages ask one another."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import Limits
from swarmcpp.errors import WireError
from swarmcpp.pipeline import calls
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.contract import Pass, StageRef
from swarmcpp.route.patience import MOST_S
from swarmcpp.wire.peers import MAX_FRAMES, MAX_MESSAGE, Hop, PassPart, RunStage, decode, encode

NODES = ("1" * 16, "2" * 16, "3" * 16)
REF = StageRef(NODES[0], b"f" * 32, 2, 5, 9)
BOUNDS = StageBounds(Limits(ctx_size=100, n_vocab=50), 32)
NEXT = tuple(StageRef(NODES[n % 3], b"f" * 32, 5 + n, 6 + n, 9) for n in range(4))

NUMBERS = st.one_of(st.integers(-2, 10), st.integers(-(2**63), 2**63 - 1), st.integers(90, 110))
SMALL = st.integers(0, 12)
PARTS = st.builds(PassPart, st.binary(min_size=16, max_size=16), NUMBERS, NUMBERS, NUMBERS, st.integers(-1, 2))
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=14)
HOPS = st.builds(Hop, st.sampled_from(NODES), SMALL, SMALL)


def chain_from(cuts: list[int]) -> tuple[Hop, ...]:
    ends = [*sorted(set(cuts)), 9]
    return tuple(Hop(NODES[0], first, last) for first, last in zip([5, *ends], ends, strict=False))


def good_parts(counts: list[int]) -> tuple[PassPart, ...]:
    return tuple(PassPart(n.to_bytes(16), n, n, count, (n + 1) % 2) for n, count in enumerate(counts))


@given(
    st.one_of(
        st.lists(PARTS, min_size=1, max_size=5).map(tuple),
        COUNTS.map(good_parts),
    ),
    st.one_of(st.lists(HOPS, max_size=5).map(tuple), st.lists(st.integers(6, 8), max_size=3).map(chain_from)),
    st.sampled_from(["f32", "q8_0"]),
    st.sampled_from([0, 0, 0, -1, 1]),
    st.integers(1, 5),
)
def test_a_pass_that_is_taken_is_within_all_bounds(
    parts: tuple[PassPart, ...], onward: tuple[Hop, ...], encoding: Any, wrong: int, pieces: int
) -> None:
    message = RunStage(REF.fingerprint, calls.hop(REF), parts, encoding, onward, limit_s=1.0)
    size = max(0, min(512, sum(part.count for part in parts)) * calls.row_bytes(32, encoding) + wrong)
    rows = memoryview(bytes(n % 251 for n in range(size)))
    step = -(-size // pieces) or 1
    payload = [rows[start : start + step] for start in range(0, size, step)]
    try:
        work = calls.checked_pass(message, payload, REF, BOUNDS)
    except WireError:
        return
    assert wrong == 0
    assert bytes(work.rows) == rows
    assert 1 <= work.n_rows <= 512
    assert len({part.sequence for part in work.parts}) == len(work.parts)
    assert all(part.start >= 0 and part.count >= 1 and part.start + part.count <= 100 for part in work.parts)
    assert all(0 <= part.epoch < 2**31 and part.outputs in (0, 1) for part in work.parts)
    ranges = [(REF.first, REF.last), *((each.first, each.last) for each in work.onward)]
    assert [first for first, _ in ranges[1:]] + [9] == [last for _, last in ranges]


@given(COUNTS, st.lists(st.integers(6, 8), max_size=3))
def test_a_pass_survives_the_way_to_a_peer(counts: list[int], cuts: list[int]) -> None:
    onward = tuple(StageRef(each.node, REF.fingerprint, each.first, each.last, 9) for each in chain_from(cuts))
    parts = tuple(PassPart(n.to_bytes(16), n, n, count, (n + 1) % 2) for n, count in enumerate(counts))
    work = Pass(parts, "q8_0", bytes(34 * sum(counts)), onward, "f32")
    message = decode(encode(calls.run_message(REF, work, work.limit_s)))
    assert isinstance(message, RunStage)
    assert calls.checked_pass(message, calls.frames(work.rows), REF, BOUNDS) == work


def test_rows_are_cut_into_frames_that_a_peer_takes() -> None:
    rows = bytes(512 * 8192 * 4)
    pieces = calls.frames(rows)
    assert [len(piece) for piece in pieces] == [MAX_MESSAGE] * 4
    assert len(pieces) <= MAX_FRAMES
    assert b"".join(pieces) == rows
    assert calls.frames(b"") == []


@pytest.mark.parametrize("limit_s", [0.0, -1.0, math.nan, math.inf, MOST_S * 1.01])
def test_a_limit_of_time_that_is_none_is_refused(limit_s: float) -> None:
    work = Pass((PassPart(b"s" * 16, 0, 0, 1, 1),), "f32", bytes(128), NEXT)
    with pytest.raises(WireError, match="limit_s"):
        calls.checked_pass(calls.run_message(REF, work, limit_s), [memoryview(work.rows)], REF, BOUNDS)
