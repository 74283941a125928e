"""The supervisor of a stage with real engine processes: its sequences, its blocks, and what a death takes with it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine_support import ids_of, prompt_of, request
from stage_processes import DEADLINE_S, IDENTITY, options, stage
from stage_support import N_EMBD, N_LAYERS, N_VOCAB, Chain, cut, stage_model

from swarmcpp.core import GenerateRequest
from swarmcpp.errors import EngineFailed, NotReady, QueueFull, StageLost, SwarmError, WireError
from swarmcpp.kv.keys import block_keys
from swarmcpp.llama.rows import encode_rows
from swarmcpp.llama.stage import EmbeddingTable
from swarmcpp.supervisor.stage import IDLE_S, MAX_BYTES_UNDER_WAY, Computed, StageSupervisor
from swarmcpp.testing import FakeClock
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import PassPart

pytestmark = pytest.mark.e2e

A, B, C = bytes(16), bytes([1] * 16), bytes([2] * 16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage_model(tmp_path_factory.mktemp("stages"))


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


async def within(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, DEADLINE_S)


@dataclass(slots=True)
class Head:
    """One sequence over some stages, from the head's side."""

    path: Path
    stages: list[StageSupervisor]
    asked: GenerateRequest
    name: bytes = A
    epoch: int = 0
    wire: RowEncoding = "f32"
    told: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.asked.prompt, *self.told]

    @property
    def keys(self) -> list[bytes]:
        return block_keys(IDENTITY.root(), self.tokens, 64)

    async def open(self) -> int:
        """The tokens that every stage has now."""
        self.epoch += 1
        asked = replace(self.asked, generated=tuple(self.told))
        n_tokens = len(self.tokens)
        offers = [
            await each.open(self.name, self.epoch, self.keys, asked if each is self.stages[-1] else None, n_tokens)
            for each in self.stages
        ]
        return min([await each.resume(self.name, self.epoch, min(offers)) for each in self.stages])

    async def run(self, start: int, tokens: list[int], *, output: bool) -> Computed:
        encoding: RowEncoding = "f32"
        rows: Any = encode_rows(EmbeddingTable(self.path).rows(tokens), encoding)
        for each in self.stages:
            part = PassPart(self.name, self.epoch, start, len(tokens), int(output))
            computed = await within(each.run([part], encoding, rows, self.wire))
            rows, encoding = computed.rows, self.wire
        return computed

    async def generate(self, count: int, start: int = 0) -> list[int]:
        """Go on until there are `count` tokens, from `start` tokens in the KV."""
        while len(self.told) < count:
            # In tiles, as whatever computed it before did.
            stop = min(len(self.tokens), start - start % 64 + 64) if start < len(self.asked.prompt) else start + 1
            last = stop == len(self.tokens)
            computed = await self.run(start, self.tokens[start:stop], output=last)
            self.told += ids_of(computed.tokens)
            start = stop
        return self.told

    async def store(self) -> None:
        for each in self.stages:
            await within(each.store(self.name, self.epoch, self.keys))


@asynccontextmanager
async def pair(path: Path, arena: Path | None = None, **how: Any) -> AsyncIterator[list[StageSupervisor]]:
    async with stage(path, 0, 2, arena, **how) as first, stage(path, 2, N_LAYERS, arena, **how) as tail:
        yield [first, tail]


def expected(path: Path, asked: GenerateRequest, steps: int) -> list[int]:
    """What the stages say in this process."""
    chain = Chain(path)
    chain.place(1, asked)
    prompt, start = asked.prompt, 0
    ids: dict[int, int] = {}
    while start < len(prompt):
        ids = chain.run({1: (start, prompt[start : start + 64])})
        start += 64
        if start < len(prompt):
            # The token of an unfinished prompt was not wanted.
            chain.place(1, asked, tokens=start)
    told = {1: [ids[1]]}
    chain.go_on({1: asked}, told, steps)
    chain.close()
    return told[1]


async def test_a_sequence_runs_over_two_processes(path: Path) -> None:
    asked = request(prompt_of(100, 1, N_VOCAB), 30)
    passes: list[tuple[int, float]] = []
    async with pair(path, on_pass=lambda rows, seconds: passes.append((rows, seconds))) as stages:
        assert [(each.slots, each.free, each.status.ctx_size) for each in stages] == [(2, 2, 512)] * 2
        head = Head(path, stages, asked)
        assert await head.open() == 0
        assert [each.free for each in stages] == [1, 1]
        assert await head.generate(30) == expected(path, asked, 30)
        assert [rows for rows, _ in passes] == [64, 64] + [1] * 58, "of prompts only tiles"
        assert all(seconds > 0 for _, seconds in passes)
        for each in stages:
            await each.close_sequence(A)
            await each.close_sequence(A)
        assert [each.free for each in stages] == [2, 2]


async def test_a_sequence_that_is_open_keeps_its_kv(path: Path) -> None:
    asked = request(prompt_of(70, 2, N_VOCAB), 30)
    async with pair(path) as stages:
        head = Head(path, stages, asked)
        await head.open()
        await head.generate(10)
        # All but the last token, which was not computed.
        assert await head.open() == 79
        assert await head.generate(20, 79) == expected(path, asked, 20)
        with pytest.raises(StageLost, match="open in epoch 2 was asked for in epoch 1"):
            await stages[0].run([PassPart(A, 1, 0, 1, 0)], "f32", bytes(4 * N_EMBD), "f32")
        with pytest.raises(StageLost, match="epoch 1 of a sequence that is open in epoch 2"):
            await stages[0].open(A, 1, (), None, 5)


async def test_passes_follow_each_other_in_the_order_of_calls(path: Path) -> None:
    async with stage(path, 0, 2) as first:
        await first.open(A, 1, (), None, 300)
        await first.resume(A, 1, 0)
        passes = [
            asyncio.create_task(first.run([PassPart(A, 1, start, 10, 0)], "f32", bytes(40 * N_EMBD), "f32"))
            for start in range(0, 200, 10)
        ]
        done = await within(asyncio.gather(*passes))
        assert all(len(computed.rows) == 40 * N_EMBD and computed.compute_s > 0 for computed in done)
        # A hole fails alone, and what follows it too; the sequence goes on from what is there.
        hole, after = (
            asyncio.create_task(first.run([PassPart(A, 1, start, 1, 0)], "f32", bytes(4 * N_EMBD), "f32"))
            for start in (250, 200)
        )
        with pytest.raises(StageLost, match="position 250 of a sequence with 200 tokens"):
            await within(hole)
        await within(after)
        assert await first.open(A, 2, (), None, 300) == 201


async def test_what_is_wrong_is_refused(path: Path) -> None:
    async with stage(path, 0, 2) as first:
        row = bytes(4 * N_EMBD)
        for names, keys, n_tokens in ((b"short", (), 5), (A, (), 0), (A, (), 512), (A, (bytes(31),), 64)):
            with pytest.raises(WireError):
                await first.open(names, 1, keys, None, n_tokens)
        with pytest.raises(WireError, match="9 keys of blocks; at most 8"):
            await first.open(A, 1, (bytes(32),) * 9, None, 100)
        await first.open(A, 1, (), None, 100)
        with pytest.raises(StageLost, match="not resumed"):
            await first.run([PassPart(A, 1, 0, 1, 0)], "f32", row, "f32")
        for n_tokens in (-1, 1):
            with pytest.raises(WireError, match="where 0 were offered"):
                await first.resume(A, 1, n_tokens)
        await first.resume(A, 1, 0)
        with pytest.raises(WireError, match="3 bytes of f32 for 1 rows"):
            await within(first.run([PassPart(A, 1, 0, 1, 0)], "f32", b"123", "f32"))
        with pytest.raises(WireError):
            await first.run([PassPart(A, 1, 2**70, 1, 0)], "f32", row, "f32")
        with pytest.raises(QueueFull, match="are the limits"):
            await first.run([PassPart(A, 1, 0, 1, 0)], "f32", bytes(MAX_BYTES_UNDER_WAY + 1), "f32")
        with pytest.raises(StageLost, match="not open here"):
            await first.store(B, 1, ())
        await first.open(B, 1, (), None, 100)
        with pytest.raises(QueueFull, match="all 2 sequences"):
            await first.open(C, 1, (), None, 100)
        computed = await within(first.run([PassPart(A, 1, 0, 1, 0)], "f32", row, "q8_0"))
        assert len(computed.rows) == N_EMBD // 32 * 34, "none of it hurt anybody"


async def test_a_head_that_is_gone_leaves_its_sequence_to_others(path: Path) -> None:
    clock = FakeClock()
    async with stage(path, 0, 2, clock=clock) as first:
        for name in (A, B):
            await first.open(name, 1, (), None, 100)
            await first.resume(name, 1, 0)
        clock.advance(IDLE_S - 1)
        await within(first.run([PassPart(B, 1, 0, 1, 0)], "f32", bytes(4 * N_EMBD), "f32"))
        assert first.free == 0
        clock.advance(1)
        assert first.free == 1
        await first.open(C, 1, (), None, 100)
        with pytest.raises(StageLost):
            await first.resume(A, 1, 0)
        await first.resume(C, 1, 0)
        await within(first.run([PassPart(C, 1, 0, 1, 0)], "f32", bytes(4 * N_EMBD), "f32"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_a_death_takes_the_sequences_and_leaves_the_blocks(path: Path, tmp_path: Path) -> None:
    asked = request(prompt_of(150, 3, N_VOCAB), 60)
    whole = expected(path, asked, 60)
    async with pair(path, tmp_path) as stages:
        head = Head(path, stages, asked)
        await head.open()
        await head.generate(50)
        await head.store()
        await head.store()
        caches = [each.cache for each in stages]
        assert all(cache and cache.stats().blocks == 3 for cache in caches)
        assert len({cache.path for cache in caches if cache}) == 2
        tail = stages[1]
        part = PassPart(A, 1, 0, 1, 0)
        os.kill(tail.status.pid, signal.SIGSTOP)
        lost = [asyncio.create_task(tail.run([part], "f32", bytes(4 * N_EMBD), "f32")) for _ in range(3)]
        lost.append(asyncio.create_task(tail.open(B, 1, head.keys, None, 199)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        os.kill(tail.status.pid, signal.SIGKILL)
        *runs, offered = await within(asyncio.gather(*lost, return_exceptions=True))
        assert [type(each) for each in runs] == [StageLost] * 3
        assert "SIGKILL" in str(runs[0])
        assert offered == 192
        with pytest.raises((StageLost, NotReady)):
            await head.run(199, [1], output=True)
        await within(tail.wait_ready())
        assert tail.free == 2
        # The first stage has 199 tokens, the other one its blocks.
        assert await head.open() == 192
        assert stages[1].cache and stages[1].cache.stats().bad == 0
        assert await head.generate(60, 192) == whole
        assert [each.status.restarts for each in stages] == [0, 1]

    async with pair(path, tmp_path) as stages:
        head = Head(path, stages, asked)
        assert await head.open() == 128
        assert (await head.generate(60, 128)) == whole


async def test_bad_blocks_are_found_and_the_rest_is_used(path: Path, tmp_path: Path) -> None:
    asked = request(prompt_of(200, 4, N_VOCAB), 20)
    async with stage(path, 0, 2, tmp_path) as first:
        head = Head(path, [first], asked)
        await head.open()
        await head.run(0, list(asked.prompt), output=False)
        await head.store()
        cache = first.cache
        assert cache and cache.stats().blocks == 3
        await first.close_sequence(A)
        damaged = cache._index.get(head.keys[1])
        assert damaged
        cache._arena.write(damaged.slot, bytes(cache.block_bytes))
        assert await first.open(B, 1, head.keys, None, 200) == 192
        assert await within(first.resume(B, 1, 192)) == 64
        assert (cache.stats().blocks, cache.stats().bad) == (1, 1)
        assert await first.open(B, 2, head.keys, None, 200) == 64
        await within(first.resume(B, 2, 64))
        assert all(block.pins == 0 for block in cache._index.all_blocks())


async def test_blocks_from_quantised_rows_stay_here(path: Path, tmp_path: Path) -> None:
    async with pair(path, tmp_path) as stages:
        head = Head(path, stages, request(prompt_of(70, 5, N_VOCAB), 5), wire="q8_0")
        await head.open()
        await head.run(0, list(head.asked.prompt), output=True)
        await head.store()
        first, tail = (each.cache for each in stages)
        assert first and tail
        assert (first.all_keys(), tail.all_keys()) == (head.keys, [])
        assert tail.held_keys(head.keys) == 1


async def test_an_engine_that_is_given_up_says_so(path: Path) -> None:
    async def at_once(_seconds: float) -> None:
        await asyncio.sleep(0)

    command = (sys.executable, "-c", "import sys; sys.exit(3)")
    supervisor = StageSupervisor(options(cut(path, 0, 2)), sleep=at_once, command=command)
    supervisor.start()
    with suppress(SwarmError):
        await within(supervisor.wait_ready())
    with pytest.raises(EngineFailed, match="killed its engine"):
        await supervisor.open(A, 1, (), None, 5)
    await supervisor.close()
    with pytest.raises(NotReady):
        await supervisor.open(A, 1, (), None, 5)


async def test_close_fails_what_waits(path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(stage(path, 0, 2))
        await first.open(A, 1, (), None, 100)
        await first.resume(A, 1, 0)
        waiting = asyncio.create_task(first.run([PassPart(A, 1, 0, 64, 0)], "f32", bytes(256 * N_EMBD), "f32"))
        await asyncio.sleep(0)
        await first.close()
        with pytest.raises(NotReady, match="shutting down"):
            await waiting


async def test_an_engine_whose_link_has_ended_takes_nothing_more(path: Path, tmp_path: Path) -> None:
    """It is about to be found dead; who asks now must not have to find that out by a failure."""
    async with pair(path, tmp_path) as (first, _):
        assert first._incarnation is not None
        first._incarnation.link.end()
        for ask in (first.open(A, 1, (), None, 3), first.resume(A, 1, 0)):
            with pytest.raises((NotReady, StageLost), match=r"has died|not open here"):
                await within(ask)
