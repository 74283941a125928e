"""Fetching the end of a prompt while its beginning is computed: what waits, what ends it, and what is left then."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

import pytest
from blake3 import blake3
from block_peers import BLOCK_BYTES, NAN, Swarm, block_id, key, payload, query

from swarmcpp.sharing.fetch import FetchResult, fetch_prefix
from swarmcpp.sharing.fetchcontext import FetchSettings
from swarmcpp.wire.peers import Blocks, FetchBlocks, Reply

BLOCKS = 40
TPS = 160.0
"""A block takes 0.4 s."""
RATE = BLOCK_BYTES / 0.5
"""A block of F16 takes 0.5 s."""
EXACT = FetchSettings(kv_wire="f16")


@dataclass
class Engine:
    """Computes fronts: `n` blocks take `n` x `block_s`, in which links move the clock too."""

    swarm: Swarm
    block_s: float = 64 / TPS
    works: bool = True
    asked: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    cancelled: int = 0

    async def __call__(self, n_blocks: int) -> bool:
        self.asked.append(n_blocks)
        clock = self.swarm.clock
        ends = clock.now + n_blocks * self.block_s
        try:
            while clock.now < ends:
                before = clock.now
                await asyncio.sleep(0.02)
                if clock.now == before:
                    clock.now += max(0.2, self.block_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        assert not self.swarm.stored, "no block is stored before those in front of it"
        self.done.append(n_blocks)
        return self.works


async def fetch(swarm: Swarm, engine: Engine, settings: FetchSettings = EXACT, **changes: object) -> FetchResult:
    changes = {"prefill_tps": TPS, **changes}
    async with asyncio.timeout(60):
        result = await fetch_prefix(swarm.context(settings), query(BLOCKS, **changes), swarm.store, engine)
    have = changes.get("have", 0)
    assert isinstance(have, int)
    begin = have + result.first
    assert swarm.stored == {i: payload(i) for i in range(begin, begin + result.blocks)}
    assert len(result.sources) == result.blocks
    assert engine.done in ([], engine.asked)
    return result


@pytest.mark.parametrize("have", [0, 3])
async def test_a_slow_link_and_the_engine_meet(caplog: pytest.LogCaptureFixture, have: int) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    swarm = Swarm()
    peer = swarm.join("a", BLOCKS, rate=RATE)
    engine = Engine(swarm)
    result = await fetch(swarm, engine, have=have)
    assert engine.done == [result.first] and result.first >= 4
    assert have + result.first + result.blocks == BLOCKS and result.reason == ""
    asked = [block for message in peer.asked for block in message.ids]
    assert sorted(asked) == sorted(block_id(key(i)) for i in range(have + result.first, BLOCKS))
    assert result.seconds < 0.75 * (BLOCKS - have) * 64 / TPS
    assert swarm.trust.told == [("ok", "a")]
    assert f"cross-node prefix SPLIT computed_blocks={result.first} shipped_blocks={result.blocks}" in caplog.text
    assert f"cross-node prefix HIT peer=a blocks={result.blocks}" in caplog.text


async def test_quantised_blocks_wait_as_they_came() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS, rate=RATE / 2)
    result = await fetch(swarm, Engine(swarm), FetchSettings(kv_wire="q8_0"))
    assert result.first and result.blocks and swarm.exact == {False}
    assert result.bytes == result.blocks * BLOCK_BYTES * 34 // 64


async def test_a_fast_link_leaves_the_engine_alone() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS)
    engine = Engine(swarm)
    result = await fetch(swarm, engine)
    assert (result.first, result.blocks, engine.asked) == (0, BLOCKS, [])


async def test_a_front_that_takes_long_keeps_what_came() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS, rate=RATE)
    result = await fetch(swarm, Engine(swarm, block_s=4.0))
    assert result.first + result.blocks == BLOCKS and result.reason == ""


async def test_a_link_that_slows_down_is_left_once_the_engine_could_go_on() -> None:
    swarm = Swarm()
    peer = swarm.join("a", BLOCKS, rate=RATE)

    def slow_down(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
        if len(peer.asked) > 6:
            peer.bytes_per_s = RATE / 20
        return reply, frames

    peer.bend = slow_down
    engine = Engine(swarm)
    result = await fetch(swarm, engine)
    assert result.reason == "overtaken" and engine.done == [result.first]
    assert 3 <= result.blocks < BLOCKS - result.first
    assert result.seconds < 1.5 * result.first * 64 / TPS + 3


async def test_a_peer_that_dies_leaves_its_blocks_and_the_front() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS, rate=RATE).dies_after = 5
    engine = Engine(swarm)
    result = await fetch(swarm, engine)
    assert result.reason == "holders-failed" and engine.done == [result.first]
    assert 0 < result.blocks <= 5


async def test_a_peer_that_sends_nothing_costs_nothing_but_the_front() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS, rate=RATE).dies_after = 0
    engine = Engine(swarm)
    result = await fetch(swarm, engine)
    assert (result.blocks, result.reason) == (0, "holders-failed")
    assert engine.done == [result.first] and engine.cancelled == 0
    assert result.seconds < result.first * 64 / TPS + 1


async def test_the_engine_that_fails_ends_it_without_a_block() -> None:
    swarm = Swarm()
    swarm.join("a", BLOCKS, rate=RATE)
    result = await fetch(swarm, Engine(swarm, works=False))
    assert (result.first, result.blocks, result.reason) == (0, 0, "front-failed")
    assert swarm.trust.told == []


async def test_a_liar_is_found_when_its_blocks_are_stored() -> None:
    swarm = Swarm()

    def not_finite(message: FetchBlocks, reply: Reply, frames: list[memoryview]) -> tuple[Reply, list[memoryview]]:
        bad = memoryview(NAN * (BLOCK_BYTES // 2))[: len(frames[0])]
        sent = [bad for _ in frames]
        return Blocks(tuple(blake3(each).digest() for each in sent)), sent

    swarm.join("liar", BLOCKS, rate=RATE).bend = not_finite
    result = await fetch(swarm, Engine(swarm))
    assert result.blocks == 0 and result.reason
    assert swarm.trust.told == [("wrong", "liar")]


async def test_cancelling_cancels_the_front_and_what_was_asked() -> None:
    swarm = Swarm()
    peer = swarm.join("a", BLOCKS, rate=RATE)
    peer.silent = True
    engine = Engine(swarm, block_s=1000.0)
    task = asyncio.create_task(fetch(swarm, engine))
    until = time.monotonic() + 60
    while not (peer.asked and engine.asked) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0)
    asked = len(peer.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == 1 and asked and peer.cancelled == asked
    assert swarm.trust.told == [] and not swarm.stored
