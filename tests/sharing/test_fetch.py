"""Fetching blocks from peers: when it is worth it, what it checks, and what happens when peers lie, stall or die."""

from __future__ import annotations

import asyncio
import logging
import math
import time

import pytest
from blake3 import blake3
from block_peers import BLOCK_BYTES, NAN, Answer, Swarm, block_id, key, payload, query
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import QueueFull
from swarmcpp.sharing.fetch import FetchResult, fetch_copy, fetch_prefix
from swarmcpp.sharing.fetchcontext import FetchSettings
from swarmcpp.sharing.shipping import MIN_GAIN, KvWire, Progress, Shipment, Source, decide, overtaken, wire_bytes
from swarmcpp.wire.peers import Blocks, FetchBlocks, Pong, Reply


async def fetch(swarm: Swarm, n: int, settings: FetchSettings | None = None, **changes: object) -> FetchResult:
    async with asyncio.timeout(20):
        result = await fetch_prefix(swarm.context(settings), query(n, **changes), swarm.store)
    have = changes.get("have", 0)
    assert isinstance(have, int)
    assert swarm.stored == {i: payload(i) for i in range(have, have + result.blocks)}
    assert len(result.sources) == result.blocks
    return result


# -- whether to ship -------------------------------------------------------------------------------------------------

MIB = 1 << 20


def shipment(**changes: float) -> Shipment:
    fields: dict[str, float] = {"n_blocks": 32, "block_bytes": 768 << 10, "block_tokens": 64, "prefill_tps": 110.0}
    return Shipment(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mbit", "blocks", "encoding"), [(2000, 32, "f16"), (1000, 32, "q8_0"), (20, 32, "q8_0"), (5, 0, "q8_0")]
)
def test_a_link_decides_between_exact_small_and_computing(mbit: int, blocks: int, encoding: str) -> None:
    plan = decide(shipment(), [Source(0.001, mbit * 125_000)], "auto")
    assert (plan.n_blocks, plan.encoding) == (blocks, encoding)


def test_the_encoding_can_be_fixed_but_not_where_it_does_not_fit() -> None:
    slow, fast = [Source(0.001, 12.5e6)], [Source(0.001, 1e9)]
    assert decide(shipment(), slow, "f16").encoding == "f16"
    assert decide(shipment(), fast, "q8_0").encoding == "q8_0"
    assert decide(shipment(block_bytes=(768 << 10) + 2), slow, "q8_0").encoding == "f16"


def test_sources_add_up_to_what_this_node_can_receive() -> None:
    two = [Source(0.001, 12.5e6)] * 2
    assert decide(shipment(), two, "f16").bytes_per_s == 25e6
    assert decide(shipment(own_bytes_per_s=15e6), two, "f16").bytes_per_s == 15e6


def test_a_deadline_leaves_a_part_and_a_queue_makes_shipping_cheaper() -> None:
    source = [Source(0.0, 12.5e6)]
    plan = decide(shipment(limit_s=0.6), source, "f16")
    assert 0 < plan.n_blocks < 32 and plan.ship_s <= 0.4 + 1e-9
    assert decide(shipment(limit_s=0.0), source, "auto").reason == "no-time"
    slow = [Source(0.0, 0.625e6)]
    assert decide(shipment(), slow, "auto").reason == "computing-is-faster"
    assert decide(shipment(queue_s=30.0), slow, "auto").n_blocks == 32


@given(
    n=st.integers(1, 512),
    block=st.sampled_from([64, 4096, 768 << 10, 4 << 20]),
    tps=st.floats(0, 1e5),
    rates=st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1e10)), min_size=1, max_size=4),
    limit=st.floats(0, 100),
    wire=st.sampled_from(["auto", "f16", "q8_0"]),
)
def test_a_plan_always_wins_and_fits(
    n: int, block: int, tps: float, rates: list[tuple[float, float]], limit: float, wire: str
) -> None:
    what = Shipment(n, block, 64, tps, limit_s=limit)
    plan = decide(what, [Source(rtt, rate) for rtt, rate in rates], wire)  # type: ignore[arg-type]
    assert 0 <= plan.n_blocks <= n
    assert plan.wire_block_bytes == wire_bytes(block, plan.encoding) <= block
    assert bool(plan.n_blocks) != bool(plan.reason)
    if plan.n_blocks:
        assert plan.ship_s <= MIN_GAIN * plan.n_blocks * 64 / (tps or 100) * (1 + 1e-9)
        assert plan.ship_s <= limit + 1e-9


@given(share=st.floats(0.0, 1.0), mbit=st.floats(30, 10_000), rtt=st.floats(0, 0.2))
def test_a_link_that_keeps_its_rate_is_never_stopped(share: float, mbit: float, rtt: float) -> None:
    what, rate = shipment(), mbit * 125_000
    plan = decide(what, [Source(rtt, rate)], "f16")
    if not plan.n_blocks:
        return
    elapsed = rtt + share * (plan.ship_s - rtt)
    group = max(1, int(min(4 * MIB, max(MIB, rate / 4)) // plan.wire_block_bytes))
    came = math.floor(max(0.0, (elapsed - rtt) * rate / plan.wire_block_bytes) / group + 1e-9) * group
    left = 32 - min(came, 32)
    silent = elapsed - (rtt + came * plan.wire_block_bytes / rate if came else 0)
    size = min(group, left) * plan.wire_block_bytes
    progress = Progress(elapsed, silent, came * plan.wire_block_bytes, size, left, left)
    assert left == 0 or not overtaken(plan, what, progress)


# -- fetching --------------------------------------------------------------------------------------------------------


async def test_missing_blocks_arrive_in_order_and_exact(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    swarm = Swarm()
    swarm.join("a", 40)
    result = await fetch(swarm, 40, have=3)
    assert (result.blocks, result.reason, result.encoding) == (37, "", "f16")
    assert result.bytes == 37 * BLOCK_BYTES and swarm.exact == {True}
    assert swarm.trust.told == [("ok", "a")]
    assert "DIAG: cross-node prefix HIT peer=a blocks=37 tokens=2368" in caplog.text
    assert "DIAG: served PrefixKvFetch" in caplog.text and "hit=true" in caplog.text


async def test_only_the_run_that_trusted_peers_hold() -> None:
    swarm = Swarm()
    swarm.join("a", 5)
    doubtful = swarm.join("b", 9)
    swarm.trust.scores["b"] = 0.4
    assert (await fetch(swarm, 20)).blocks == 5
    assert not doubtful.asked


async def test_the_switch_turns_it_off() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 5)
    swarm.trust.scores["a"] = 1.0
    assert (await fetch(swarm, 5, FetchSettings(trust_min=2.0))).reason == "off"
    assert not peer.asked


async def test_nobody_to_ask(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    swarm = Swarm()
    swarm.claims["gone"] = 5
    assert (await fetch(swarm, 5)).reason == "no-holder"
    assert "DIAG: cross-node prefix MISS reason=no-holder" in caplog.text


async def test_quantised_blocks_are_said_to_be_inexact() -> None:
    swarm = Swarm()
    swarm.join("a", 20)
    result = await fetch(swarm, 20, FetchSettings(kv_wire="q8_0"))
    assert result.blocks == 20 and result.encoding == "q8_0" and swarm.exact == {False}
    assert result.bytes == 20 * BLOCK_BYTES * 34 // 64


async def test_a_slow_link_is_not_asked_at_all() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 40, rate=50_000)
    assert (await fetch(swarm, 40)).reason == "computing-is-faster"
    assert not peer.asked


async def test_two_holders_share_the_work_and_teach_what_both_bring() -> None:
    swarm = Swarm()
    a, b = swarm.join("a", 200), swarm.join("b", 200)
    result = await fetch(swarm, 200)
    assert result.blocks == 200
    assert set(result.sources) == {"a", "b"}
    asked = [block for peer in (a, b) for message in peer.asked for block in message.ids]
    assert sorted(asked) == sorted(block_id(key(i)) for i in range(200))


async def test_a_holder_that_dies_in_the_middle_is_replaced() -> None:
    swarm = Swarm()
    swarm.join("a", 300).dies_after = 2
    swarm.join("b", 300)
    result = await fetch(swarm, 300)
    assert result.blocks == 300 and result.reason == ""
    assert ("late", "a") not in swarm.trust.told and ("wrong", "a") not in swarm.trust.told


async def test_a_lone_holder_that_dies_leaves_what_it_sent() -> None:
    swarm = Swarm()
    swarm.join("a", 600).dies_after = 2
    result = await fetch(swarm, 600)
    assert 0 < result.blocks < 600 and result.reason == "holders-failed"


async def test_what_only_a_slow_peer_has_is_asked_of_it() -> None:
    swarm = Swarm()
    swarm.join("a", 10)
    slow = swarm.join("b", 12, rate=5e6)
    assert (await fetch(swarm, 12)).blocks == 12
    assert sum(len(message.ids) for message in slow.asked) == 2


async def test_full_store_ends_it() -> None:
    swarm = Swarm(room=4)
    swarm.join("a", 100)
    result = await fetch(swarm, 100)
    assert (result.blocks, result.reason) == (4, "store-full")


# -- liars -----------------------------------------------------------------------------------------------------------


def resealed(frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return Blocks(tuple(blake3(frame).digest() for frame in frames)), frames


def wrong_bytes(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return reply, [*frames[:-1], memoryview(bytes(len(frames[-1])))]


def half_a_block(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return resealed([frame[: len(frame) // 2] for frame in frames])


def too_large(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return resealed([memoryview(bytes(frame) * 2) for frame in frames])


def too_many(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return resealed([*frames, frames[0]])


def no_digests(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return Blocks(()), frames


def another_message(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return Pong(), frames


def not_finite(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
    return resealed([memoryview(NAN * (BLOCK_BYTES // 2)) for _ in frames])


LIES = [wrong_bytes, half_a_block, too_large, too_many, no_digests, another_message, not_finite]


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_alone_is_a_clean_miss(lie: Answer) -> None:
    swarm = Swarm()
    swarm.join("liar", 30).bend = lie
    result = await fetch(swarm, 30)
    assert result.blocks == 0 and result.reason == "holders-failed"
    assert swarm.trust.told == [("wrong", "liar")]


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_beside_an_honest_peer_changes_nothing(lie: Answer) -> None:
    swarm = Swarm()
    liar = swarm.join("liar", 100)
    liar.bend = lie
    swarm.trust.scores["liar"] = 0.9
    swarm.join("honest", 100)
    result = await fetch(swarm, 100)
    assert result.blocks == 100 and set(result.sources) == {"honest"}
    assert sorted(swarm.trust.told) == [("ok", "honest"), ("wrong", "liar")]


async def test_a_bad_frame_in_q8_0_is_a_lie_too() -> None:
    swarm = Swarm()
    swarm.join("liar", 30).bend = half_a_block
    await fetch(swarm, 30, FetchSettings(kv_wire="q8_0"))
    assert swarm.trust.told == [("wrong", "liar")]


async def test_a_holder_without_what_it_said_is_forgiven_once() -> None:
    swarm = Swarm()
    swarm.join("a", 4, claim=30)
    swarm.join("b", 30)
    swarm.trust.scores["a"] = 0.9
    result = await fetch(swarm, 30)
    assert result.blocks == 30
    assert all(each == "a" for each, _ids in swarm.dropped)
    assert not any(what == "wrong" for what, _peer in swarm.trust.told)


async def test_a_holder_that_has_nothing_of_it_is_left_and_late() -> None:
    swarm = Swarm()
    swarm.join("a", 0, claim=300)
    swarm.join("b", 300)
    assert (await fetch(swarm, 300)).blocks == 300
    assert ("late", "a") in swarm.trust.told and len(swarm.dropped) == 2


# -- slowness --------------------------------------------------------------------------------------------------------


async def test_a_peer_that_never_answers_costs_less_than_computing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    swarm = Swarm()
    peer = swarm.join("a", 30)
    peer.silent = True
    result = await fetch(swarm, 30)
    assert result.blocks == 0 and result.reason in ("overtaken", "holders-failed")
    assert result.seconds < 3.5
    assert swarm.trust.told == [("late", "a")]
    assert "cross-node prefix MISS" in caplog.text
    assert swarm.links.bytes_per_s("a") < 1e6


async def test_a_late_peer_times_out_and_another_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    swarm = Swarm()
    swarm.join("a", 100).silent = True
    swarm.join("b", 100)
    result = await fetch(swarm, 100, FetchSettings(request_s=0.3, server_s=0.2))
    assert result.blocks == 100
    assert ("late", "a") in swarm.trust.told and ("ok", "b") in swarm.trust.told
    assert "DIAG: prefix-probe: fetch timed out peer=a ms=300" in caplog.text


async def test_a_link_that_slows_down_is_left_and_what_came_is_used() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 200, rate=5e6)

    def slow_down(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
        peer.bytes_per_s = 0.05e6
        return reply, frames

    peer.bend = slow_down
    result = await fetch(swarm, 200, FetchSettings(fetch_s=60.0), prefill_tps=400.0)
    assert result.reason == "overtaken"
    assert 0 < result.blocks < 50
    assert result.seconds < 0.7 * 200 * 64 / 400
    assert swarm.links.bytes_per_s("a") < 1e6


async def test_the_deadline_of_the_request_holds() -> None:
    swarm = Swarm()
    swarm.join("a", 200).silent = True
    result = await fetch(swarm, 200, deadline_s=0.5, prefill_tps=1.0)
    assert result.reason == "timed-out" and result.seconds < 0.8


async def test_a_busy_peer_is_no_bad_peer() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 30)

    def refuse(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
        raise QueueFull("no time", retry_after=1.0)

    peer.bend = refuse
    assert (await fetch(swarm, 30)).reason == "holders-failed"
    assert swarm.trust.told == []


async def test_cancelling_cancels_what_was_asked() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 300)
    peer.silent = True
    task = asyncio.create_task(fetch(swarm, 300))
    until = time.monotonic() + 60
    while not peer.asked and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0)
    asked = len(peer.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asked and peer.cancelled == asked
    assert swarm.trust.told == []


# -- copies that nobody waits for ------------------------------------------------------------------------------------


async def copy(swarm: Swarm, n: int, settings: FetchSettings | None = None) -> FetchResult:
    """Blocks from "a", as fast as they can be computed."""
    fast = query(n, prefill_tps=1e9)
    async with asyncio.timeout(20):
        return await fetch_copy(swarm.context(settings), fast, "a", swarm.store)


@pytest.mark.parametrize(("wire", "encoding"), [("auto", "f16"), ("f16", "f16"), ("q8_0", "q8_0")])
async def test_a_copy_comes_whatever_computing_would_cost(wire: KvWire, encoding: str) -> None:
    swarm = Swarm()
    swarm.join("a", 20, rate=1e6)
    result = await copy(swarm, 20, FetchSettings(kv_wire=wire))
    assert (result.blocks, result.reason, result.encoding) == (20, "", encoding)
    assert swarm.stored == {i: payload(i) for i in range(20)}
    assert swarm.trust.told == [("ok", "a")]


async def test_a_copy_that_slows_down_goes_on() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 20, rate=1e6)

    def slow_down(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
        peer.bytes_per_s = 0.2e6
        return reply, frames

    peer.bend = slow_down
    assert (await copy(swarm, 20, FetchSettings(fetch_s=60.0, request_s=60.0))).blocks == 20


async def test_a_copy_is_taken_of_its_source_alone_and_only_if_that_is_trusted() -> None:
    swarm = Swarm()
    swarm.join("a", 5)
    other = swarm.join("b", 20)
    assert (await copy(swarm, 20)).blocks == 5
    assert other.asked == []
    swarm.trust.scores["a"] = 0.4
    assert (await copy(swarm, 20)).reason == "no-holder"


async def test_who_is_late_with_a_copy_costs_nobody_anything() -> None:
    swarm = Swarm()
    peer = swarm.join("a", 0)
    peer.silent = True
    assert (await copy(swarm, 300, FetchSettings(request_s=0.3, server_s=0.2))).blocks == 0
    peer.silent = False
    assert (await copy(swarm, 300)).blocks == 0
    assert len(peer.asked) > 3
    assert swarm.trust.told == []


async def test_a_liar_is_known_by_its_copies_too() -> None:
    swarm = Swarm()
    swarm.join("a", 20).bend = wrong_bytes
    assert (await copy(swarm, 20)).blocks == 0
    assert swarm.trust.told == [("wrong", "a")]
