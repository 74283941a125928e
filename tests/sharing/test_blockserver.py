"""Serving blocks: the leading run, within sizes and budget, and never at the cost of the local engine."""

from __future__ import annotations

import asyncio

import pytest
from blake3 import blake3
from block_peers import BLOCK_BYTES, ROOT, SteppedClock, block_id, key, make_server, payload, quantise
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import QueueFull, SnapshotError
from swarmcpp.kv.arena import Hashed
from swarmcpp.sharing.blockserver import (
    BUSY_BURST_S,
    BUSY_SHARE,
    MAX_REPLY_BYTES,
    SEND_BYTES_PER_S,
    BlockServer,
    Governor,
    TokenBucket,
)
from swarmcpp.wire.peers import MAX_FRAMES, MAX_IDS, FetchBlocks, ListBlocks


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


def wanted(*numbers: int, encoding: str = "f16", root: bytes = ROOT, budget_s: float = 2.0) -> FetchBlocks:
    return FetchBlocks(root, tuple(block_id(key(i)) for i in numbers), encoding, budget_s)


def large_server(clock: SteppedClock, block: bytes, *, busy: bool = False) -> BlockServer:
    # Hashed each time, as a cache does with what it reads.
    server = BlockServer(
        ROOT, lambda _key: Hashed.of(block), quantise, block_id, Governor(lambda: busy, clock, clock.sleep)
    )
    server.add(key(i) for i in range(100))
    return server


async def test_the_leading_run_with_digests(clock: SteppedClock) -> None:
    server = make_server(clock, 5)
    reply, frames = await server.answer(wanted(2, 3, 4, 5, 6))
    assert frames == [payload(2), payload(3), payload(4)]
    assert reply.digests == tuple(blake3(frame).digest() for frame in frames)
    assert (await server.answer(wanted(7, 1)))[1] == []
    assert (await server.answer(wanted(1, root=b"x" * 32)))[1] == []


async def test_quantised_on_request(clock: SteppedClock) -> None:
    reply, frames = await make_server(clock, 2).answer(wanted(0, 1, encoding="q8_0"))
    assert frames == [quantise(payload(0)), quantise(payload(1))]
    assert reply.digests[0] == blake3(frames[0]).digest()


async def test_what_cannot_be_quantised_is_not_here(clock: SteppedClock) -> None:
    def refuse(data: bytes | memoryview) -> bytes:
        raise SnapshotError("not finite")

    for block, how in ((bytes(66), quantise), (bytes(64), refuse)):
        server = BlockServer(ROOT, {key(0): Hashed.of(block)}.get, how, block_id, Governor(lambda: False, clock))
        server.add([key(0)])
        assert (await server.answer(wanted(0, encoding="q8_0")))[1] == []
        assert (await server.answer(wanted(0)))[1] == [block]


async def test_removed_and_lost_blocks_end_the_run(clock: SteppedClock) -> None:
    blocks = {key(i): Hashed.of(payload(i)) for i in range(4)}
    server = BlockServer(ROOT, blocks.get, quantise, block_id, Governor(lambda: False, clock))
    assert server.add(blocks) == [block_id(key(i)) for i in range(4)]
    del blocks[key(3)]
    assert len((await server.answer(wanted(0, 1, 2, 3)))[1]) == 3
    assert server.remove([key(1)]) == [block_id(key(1))]
    assert len((await server.answer(wanted(0, 1, 2, 3)))[1]) == 1


async def test_a_reply_is_bounded_in_frames_and_bytes(clock: SteppedClock) -> None:
    small, large = large_server(clock, bytes(64)), large_server(clock, bytes(5 << 20))
    assert len((await small.answer(wanted(*range(100))))[1]) == MAX_FRAMES
    assert len((await large.answer(wanted(*range(100))))[1]) == MAX_REPLY_BYTES // (5 << 20)
    huge = large_server(clock, bytes(MAX_REPLY_BYTES + 64))
    assert len((await huge.answer(wanted(0, 1)))[1]) == 1


def test_pages_are_complete_and_in_order(clock: SteppedClock) -> None:
    server = BlockServer(ROOT, lambda _key: None, quantise, block_id, Governor(lambda: False, clock))
    n = MAX_IDS + 100
    server.add(key(i) for i in range(n))
    first = server.list_page(ListBlocks(ROOT), 7)
    rest = server.list_page(ListBlocks(ROOT, first.ids[-1]), 8)
    assert (first.more, rest.more, first.sequence, len(first.ids)) == (True, False, 7, MAX_IDS)
    assert [*first.ids, *rest.ids] == sorted(block_id(key(i)) for i in range(n))
    server.remove([key(0)])
    assert block_id(key(0)) not in server.list_page(ListBlocks(ROOT), 9).ids
    assert server.list_page(ListBlocks(b"x" * 32), 9).ids == ()


# -- the governor ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.2)), max_size=60))
def test_work_stays_within_its_share_of_any_time(steps: list[tuple[float, float]]) -> None:
    bucket = TokenBucket(BUSY_SHARE, BUSY_BURST_S, 0.0)
    now = 0.0
    done: list[tuple[float, float]] = []
    for pause, cost in steps:
        now += pause
        if bucket.wait_s(now) == 0:
            bucket.take(cost, now)
            done.append((now, cost))
    for i in range(len(done)):
        for j in range(i, len(done)):
            before_the_last = sum(cost for _at, cost in done[i:j])
            assert before_the_last <= BUSY_BURST_S + BUSY_SHARE * (done[j][0] - done[i][0]) + 1e-6


@given(debt=st.floats(0, 10), back=st.floats(0, 100))
def test_the_wait_is_what_it_says_and_a_clock_that_goes_back_gives_nothing(debt: float, back: float) -> None:
    bucket = TokenBucket(0.04, 0.05, 100.0)
    bucket.take(debt, 100.0)
    wait = bucket.wait_s(100.0)
    assert bucket.wait_s(100.0 - back) == wait
    if wait > 1e-3:
        assert bucket.wait_s(100.0 + wait / 2) > 0
    assert bucket.wait_s(100.0 + wait * (1 + 1e-9) + 1e-4) == 0


async def test_a_busy_engine_loses_at_most_its_share(clock: SteppedClock) -> None:
    block = bytes(4 << 20)
    server = large_server(clock, block, busy=True)
    begun, served = clock.now, 0
    while clock.now - begun < 60:
        try:
            served += sum(map(len, (await server.answer(wanted(*range(4))))[1]))
        except QueueFull:
            await clock.sleep(0.1)
    cost_s = served / SEND_BYTES_PER_S
    assert 0 < cost_s <= 0.05 * (clock.now - begun) + BUSY_BURST_S


async def test_when_the_budget_is_out_the_run_is_shorter_and_then_refused(clock: SteppedClock) -> None:
    server = large_server(clock, bytes(4 << 20), busy=True)
    first = (await server.answer(wanted(*range(4), budget_s=0.01)))[1]
    assert 1 <= len(first) < 4
    with pytest.raises(QueueFull):
        await server.answer(wanted(0, budget_s=0.01))


async def test_an_idle_engine_sets_no_limit(clock: SteppedClock) -> None:
    server = large_server(clock, bytes(4 << 20))
    begun = clock.now
    for _ in range(20):
        assert len((await server.answer(wanted(*range(4))))[1]) == 4
    assert clock.now == begun


async def test_many_askers_at_once_are_all_answered(clock: SteppedClock) -> None:
    server = make_server(clock, 20)
    answers = await asyncio.gather(*(server.answer(wanted(*range(20))) for _ in range(50)))
    assert all(sum(map(len, frames)) == 20 * BLOCK_BYTES for _reply, frames in answers)
