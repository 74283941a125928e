"""How a prompt is split between the engine, which computes its beginning, and peers, who send the blocks after it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.sharing.shipping import SLACK, SPLIT_BLOCKS, SPLIT_GAIN, KvWire, Shipment, ShipPlan, Source, decide

FIVE_MBIT = 625_000.0


def shipment(**changes: float) -> Shipment:
    """A prompt of 2048 tokens for a 0.5B model on two cores."""
    fields: dict[str, float] = {
        "n_blocks": 32,
        "block_bytes": 768 << 10,
        "block_tokens": 64,
        "prefill_tps": 110.0,
        "can_split": True,
    }
    return Shipment(**{**fields, **changes})  # type: ignore[arg-type]


def plan_for(bytes_per_s: float, wire: KvWire = "auto", **changes: float) -> ShipPlan:
    return decide(shipment(**changes), [Source(0.001, bytes_per_s)], wire)


def test_a_link_as_slow_as_the_engine_takes_half() -> None:
    plan = plan_for(FIVE_MBIT)
    assert plan.first + plan.n_blocks == 32 and plan.encoding == "q8_0"
    assert 14 <= plan.first <= 20
    assert plan.finish_s(shipment()) < 0.6 * 32 * 64 / 110


def test_where_one_is_much_faster_it_does_all() -> None:
    assert plan_for(100 * FIVE_MBIT).first == 0
    assert plan_for(100 * FIVE_MBIT).n_blocks == 32
    assert plan_for(FIVE_MBIT / 20).reason == "computing-is-faster"


def test_few_blocks_and_an_engine_that_may_not_are_not_split() -> None:
    assert plan_for(FIVE_MBIT, n_blocks=2 * SPLIT_BLOCKS - 1).first == 0
    whole = plan_for(FIVE_MBIT, can_split=False)
    assert (whole.first, whole.n_blocks, whole.reason) == (0, 0, "computing-is-faster")


def test_a_busy_engine_gets_less() -> None:
    fronts = [plan_for(FIVE_MBIT, queue_s=queue_s).first for queue_s in (0.0, 2.0, 4.0)]
    assert fronts == sorted(fronts, reverse=True)
    assert fronts[0] > fronts[-1] > 0


@pytest.mark.parametrize("wire", ["f16", "q8_0"])
def test_the_encoding_can_be_fixed(wire: KvWire) -> None:
    assert plan_for(FIVE_MBIT, wire).encoding == wire
    assert plan_for(FIVE_MBIT, wire).first > 0


SHIPMENTS = st.builds(
    Shipment,
    n_blocks=st.integers(1, 512),
    block_bytes=st.sampled_from([64, 66, 4096, 768 << 10, 4 << 20]),
    block_tokens=st.sampled_from([16, 64]),
    prefill_tps=st.just(0.0) | st.floats(1e-3, 1e5),
    queue_s=st.floats(0, 20),
    limit_s=st.floats(0, 100),
    can_split=st.just(True),
)
SOURCES = st.lists(st.builds(Source, st.floats(0, 1), st.floats(1, 1e10)), min_size=1, max_size=4)
WIRES = st.sampled_from(["auto", "f16", "q8_0"])


@given(what=SHIPMENTS, sources=SOURCES, wire=WIRES)
def test_a_split_is_always_within_bounds_and_better_than_either(
    what: Shipment, sources: list[Source], wire: KvWire
) -> None:
    plan = decide(what, sources, wire)
    assert plan == decide(what, sources, wire)
    unsplit = decide(
        Shipment(what.n_blocks, what.block_bytes, what.block_tokens, what.prefill_tps, what.queue_s, what.limit_s),
        sources,
        wire,
    )
    if not plan.first:
        assert plan == unsplit
        return
    assert plan.first >= SPLIT_BLOCKS and plan.n_blocks >= SPLIT_BLOCKS
    assert plan.first + plan.n_blocks <= what.n_blocks
    assert plan.reason == ""
    fit_s = what.limit_s / SLACK * (1 + 1e-9)
    assert plan.ship_s <= fit_s and plan.front_s <= fit_s
    best_s = min(unsplit.finish_s(what), what.queue_s + what.n_blocks * what.block_tokens * what.token_s)
    assert plan.finish_s(what) <= SPLIT_GAIN * best_s * (1 + 1e-9)


@given(
    blocks=st.integers(8, 256),
    tps=st.floats(20, 2000),
    mbit=st.floats(0.5, 200),
    queue_s=st.floats(0, 5),
)
def test_no_other_front_would_end_sooner(blocks: int, tps: float, mbit: float, queue_s: float) -> None:
    """With a margin for the link: a tenth of what it is thought to take."""
    rate = mbit * 125_000
    plan = decide(shipment(n_blocks=blocks, prefill_tps=tps, queue_s=queue_s), [Source(0.0, rate)], "f16")
    if not plan.first or plan.first + plan.n_blocks < blocks:
        return
    front_each, ship_each = 64 / tps, (768 << 10) / rate

    def ends_s(front: int) -> float:
        return max(plan.front_s + (front - plan.first) * front_each, (blocks - front) * ship_each / 0.9)

    longest = 60 / SLACK
    possible = [
        front
        for front in range(SPLIT_BLOCKS, blocks - SPLIT_BLOCKS + 1)
        if (blocks - front) * ship_each <= longest and queue_s + 0.1 + front * front_each <= longest
    ]
    assert math.isclose(ends_s(plan.first), min(map(ends_s, possible)), rel_tol=1e-9)
