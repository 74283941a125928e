"""A node computes the beginning of a prompt while the end of it comes from a peer over a slow link."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from swarm_process import HOST, SLOW

from swarmcpp.commands.swarm import in_swarm
from swarmcpp.config import Config, EngineConfig, InferenceConfig, ServerConfig, StorageConfig, SwarmConfig
from swarmcpp.core import GenerateRequest, SamplingParams, TokenPart
from swarmcpp.models.synthetic import write_model
from swarmcpp.node.member import Swarm
from swarmcpp.node.preparing import prepare
from swarmcpp.node.serving import run
from swarmcpp.node.whole import WholeModel
from swarmcpp.peers import Address
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.store import SwarmStore
from swarmcpp.wire.peers import FetchBlocks

pytestmark = pytest.mark.e2e

DEADLINE_S = 60.0
BLOCK = 64
BLOCKS = 20
ANSWER = 12


@dataclass
class Seat:
    """A node in this process, with an engine of its own."""

    swarm: Swarm

    @property
    def replica(self) -> LocalReplica:
        (served,) = self.swarm.models.served
        assert served.replica
        return served.replica

    @property
    def supervisor(self) -> EngineSupervisor:
        return self.replica.supervisor

    @property
    def address(self) -> Address:
        return self.swarm.capability().addresses[0]

    async def answer(self, request: GenerateRequest) -> list[TokenPart]:
        async with asyncio.timeout(DEADLINE_S), aclosing(self.swarm.requests.run_here(self.replica, request)) as parts:
            return [part async for part in parts]


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


@asynccontextmanager
async def seat(name: str, key: SwarmKey, model: Path, data: Path, *known: Address) -> AsyncIterator[Seat]:
    """A node that serves, and is gone afterwards."""
    config = Config(
        server=ServerConfig(port=0),
        engine=EngineConfig(threads=1, ctx_size=BLOCK * (BLOCKS + 4), slots=2),
        inference=InferenceConfig(kv_wire="f16"),
        storage=StorageConfig(data_dir=data, cache_size="32M"),
        swarm=SwarmConfig(enabled=True, host=HOST, port=0, name=name, discovery=False),
    )
    stop = asyncio.Event()
    async with in_swarm(config, SwarmStore(data), key, known, lan=False) as swarm:
        whole = WholeModel(config, await asyncio.to_thread(prepare, config, model), swarm)
        running = asyncio.create_task(run(config, [whole], swarm=swarm, stop=stop))
        try:
            await until(lambda: running.done() or bool(swarm.models.served), f"{name} serves")
            yield Seat(swarm)
        finally:
            stop.set()
            await running


@dataclass
class Pair:
    """Bob, who asks, and Ann, who has read `asked`'s prompt and answered it with `tokens`."""

    ann: Seat
    bob: Seat
    asked: GenerateRequest
    tokens: list[int]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("split") / "slow.gguf", SLOW, quant="Q8_0")


@pytest.fixture
async def pair(slow: Path, new_data_dir: Callable[[], Path]) -> AsyncIterator[Pair]:
    key = SwarmKey.new()
    draw = random.Random(7)
    prompts = [tuple(draw.randrange(256) for _ in range(BLOCKS * BLOCK + 10)) for _ in range(2)]
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    asked, other = (GenerateRequest("r", "slow", prompt, ANSWER, greedy) for prompt in prompts)
    async with (
        seat("Ann", key, slow, new_data_dir()) as ann,
        seat("Bob", key, slow, new_data_dir(), ann.address) as bob,
    ):
        parts = await ann.answer(asked)
        assert parts[0].cached_tokens == 0
        # Bob learns how fast his engine is.
        await bob.answer(other)
        node = ann.swarm.capability().node
        await until(lambda: bob.swarm.blocks.warm(asked)[1].get(node) == BLOCKS * BLOCK, "Bob knows what Ann has")
        cache = bob.supervisor.cache
        assert cache
        # As slow as his engine, as far as he knows: two blocks on the way for each that he computes.
        block_s = BLOCK / bob.supervisor.stats.prefill_tps
        await until(lambda: bob.swarm.mesh.links.rate_known(node), "the link is measured")
        bob.swarm.mesh.links.add_transfer(node, cache.block_bytes, block_s, fresh=True)
        yield Pair(ann, bob, asked, [token for part in parts for token in part.tokens])
        assert bob.supervisor.active == 0
        cache.check_integrity()


def stall(ann: Seat, after: int) -> asyncio.Event:
    """Let Ann send `after` blocks, and then none; set while she keeps somebody waiting."""
    served = 0
    stalled = asyncio.Event()
    send = ann.swarm.fetch_blocks

    async def fetch_blocks(message: FetchBlocks, respond: Responder) -> None:
        nonlocal served
        served += len(message.ids)
        if served > after:
            stalled.set()
            await asyncio.Event().wait()
        await send(message, respond)

    ann.swarm.fetch_blocks = fetch_blocks  # type: ignore[method-assign]
    return stalled


def tokens_of(parts: list[TokenPart]) -> list[int]:
    return [token for part in parts for token in part.tokens]


async def test_the_answer_is_that_of_one_machine(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swarmcpp")
    fetched = []
    fetch = pair.bob.swarm.blocks.fetch

    async def noted(request: GenerateRequest) -> int:
        fetched.append(await fetch(request))
        return fetched[-1]

    parts = [part async for part in pair.bob.replica.tokens(pair.asked, noted)]
    assert tokens_of(parts) == pair.tokens
    assert "cross-node prefix SPLIT" in caplog.text and "cross-node prefix HIT" in caplog.text
    assert fetched[0] >= 4 * BLOCK and fetched[0].computed >= 4 * BLOCK
    assert fetched[0] + fetched[0].computed == BLOCKS * BLOCK
    assert parts[0].tier == "peer"
    again = await pair.bob.answer(pair.asked)
    assert tokens_of(again) == pair.tokens


async def test_a_peer_that_is_lost_in_the_middle_costs_no_token(pair: Pair) -> None:
    stalled = stall(pair.ann, after=3)
    answering = asyncio.create_task(pair.bob.answer(pair.asked))
    await asyncio.wait_for(stalled.wait(), DEADLINE_S)
    await pair.ann.swarm.mesh.close()
    parts = await answering
    assert tokens_of(parts) == pair.tokens
    # What came before the loss may help, where the front was done by then; that was computed for this answer.
    assert parts[0].cached_tokens <= 3 * BLOCK


async def test_a_reader_who_leaves_stops_the_engine_at_once(pair: Pair) -> None:
    stall(pair.ann, after=1)
    answering = asyncio.create_task(pair.bob.answer(pair.asked))
    supervisor = pair.bob.supervisor
    await until(lambda: supervisor.stats.slots_busy == 1, "the front is being computed")
    assert supervisor.active == 1
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert supervisor.active == 0 and pair.bob.replica.ahead == 0
    await until(lambda: supervisor.stats.slots_busy == 0, "the engine is idle")
    parts = await pair.bob.answer(GenerateRequest("next", "slow", pair.asked.prompt[:100], 1))
    assert len(parts) == 1
