"""Blocks are computed again, to see whether those of a peer are what the model computes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from engine_support import poll, prompt_of, request

from swarmcpp.core import KvLayout
from swarmcpp.kv.arena import Arena, ArenaGeometry, Hashed
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.models.synthetic import TINY, write_model
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.wire.engine import EngineOptions

pytestmark = pytest.mark.e2e

DEADLINE_S = 60.0
BLOCK = 64
SENT = tuple(prompt_of(3 * BLOCK + 1, 1))
OTHER = tuple(prompt_of(3 * BLOCK + 1, 2))
OpenCache = Callable[[KvLayout], PrefixCache | None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("recompute") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture
def opener(tmp_path: Path) -> Callable[[int], OpenCache]:
    def with_blocks(n_blocks: int) -> OpenCache:
        def open_cache(layout: KvLayout) -> PrefixCache:
            identity = KvIdentity(bytes(32), BLOCK, (layout.k_type, layout.v_type))
            block_bytes = layout.token_bytes * BLOCK
            size = ArenaGeometry(block_bytes, n_blocks).file_bytes
            arena = Arena.open(tmp_path / "arena", identity.root(), block_bytes, size, 0)
            assert arena is not None
            return PrefixCache(arena, identity)

        return open_cache

    return with_blocks


@asynccontextmanager
async def supervised(model: Path, open_cache: OpenCache | None) -> AsyncIterator[EngineSupervisor]:
    options = EngineOptions(
        model_path=str(model),
        ctx_size=512,
        slots=2,
        threads=1,
        # The plain kernels are safe on every CPU.
        use_extra_bufts=False,
        q8_kernel=False,
        attention_kernel=False,
        prefill_chunk_tokens=128,
        prefill_budget_s=0.4,
        continuous_batching=True,
        batched_prefill_forward=True,
    )
    pids: set[int] = set()
    how = {"open_cache": open_cache} if open_cache else {}
    supervisor = EngineSupervisor(options, on_change=lambda status: pids.add(status.pid), **how)
    supervisor.start()
    try:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE_S)
        yield supervisor
    finally:
        await supervisor.close()
        for pid in pids - {0}:
            poll(lambda pid=pid: not psutil.pid_exists(pid), f"engine {pid} is gone")  # type: ignore[misc]


async def run(supervisor: EngineSupervisor, tokens: tuple[int, ...]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        async for _ in supervisor.submit(request(tokens, 1)):
            pass


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


async def computed(supervisor: EngineSupervisor, tokens: tuple[int, ...]) -> list[Hashed]:
    """Payloads of the blocks of a prompt as the engine computes them; the arena has them then."""
    cache = supervisor.cache
    assert cache is not None
    await run(supervisor, tokens)
    keys = cache.keys(tokens, "")
    await until(lambda: cache.held(tokens, "")[1] == len(keys), "the blocks are stored")
    payloads = [cache.read_block(key) for key in keys]
    return [payload for payload in payloads if payload is not None]


async def check(supervisor: EngineSupervisor, tokens: tuple[int, ...]) -> float | None:
    """Difference of the last block of `tokens` and the same computed again, of which nothing is left."""
    cache = supervisor.cache
    assert cache is not None
    known = set(cache.all_keys())
    async with asyncio.timeout(DEADLINE_S):
        again = await supervisor.recompute(tokens, "", BLOCK)
    if again is None:
        return None
    assert set(cache.all_keys()) <= known, "nobody hears of the block of a check"
    difference = cache.compare(cache.keys(tokens, "")[-1], again)
    assert cache.drop([again]) == 1
    return difference


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_block_is_what_the_model_computes_or_not(
    tiny: Path, opener: Callable[[int], OpenCache], count: int
) -> None:
    tokens = SENT[: count * BLOCK + 1]
    async with supervised(tiny, opener(64)) as supervisor:
        cache = supervisor.cache
        assert cache is not None
        sound = await computed(supervisor, SENT)
        wrong = await computed(supervisor, OTHER)
        keys = cache.keys(tokens, "")
        assert await check(supervisor, tokens) == pytest.approx(0.0, abs=0.02)
        cache.drop(keys[-1:])
        assert cache.insert(keys, count - 1, wrong[count - 1 : count], exact=True) == 1
        # This brings the wrong block into a slot, of which a check must not read.
        await run(supervisor, (*tokens, 5))
        difference = await check(supervisor, tokens)
        assert difference is not None
        assert difference > 0.5
        assert cache.read_block(keys[-1]) != sound[count - 1]
        assert supervisor.active == 0
        cache.check_integrity()


async def test_kv_that_was_found_wrong_is_neither_used_nor_stored_again(
    tiny: Path, opener: Callable[[int], OpenCache]
) -> None:
    async with supervised(tiny, opener(64)) as supervisor:
        cache = supervisor.cache
        assert cache is not None
        sound = await computed(supervisor, SENT)
        wrong = await computed(supervisor, OTHER)
        keys = cache.keys(SENT, "")
        supervisor.forget()
        cache.drop(keys[:1])
        assert cache.insert(keys, 0, wrong, exact=True) == 3
        outs = [out async for out in supervisor.submit(request((*SENT, 5), 1))]
        assert (outs[0].tier, outs[0].cached_tokens) == ("arena", 3 * BLOCK)
        cache.drop(keys[:1])
        supervisor.forget()
        assert await computed(supervisor, SENT) == sound


async def test_a_full_arena_keeps_the_block_that_is_checked(tiny: Path, opener: Callable[[int], OpenCache]) -> None:
    async with supervised(tiny, opener(6)) as supervisor:
        cache = supervisor.cache
        assert cache is not None
        payloads = await computed(supervisor, SENT)
        keys = cache.keys(SENT, "")
        cache.drop(keys[:1])
        await computed(supervisor, OTHER)
        assert cache.insert(keys, 0, payloads, exact=True) == 3
        assert cache.stats().blocks == 6
        assert await check(supervisor, SENT) == pytest.approx(0.0, abs=0.02)


async def test_an_arena_without_room_gives_no_verdict(tiny: Path, opener: Callable[[int], OpenCache]) -> None:
    async with supervised(tiny, opener(3)) as supervisor:
        cache = supervisor.cache
        assert cache is not None
        await computed(supervisor, SENT)
        assert await check(supervisor, SENT) is None
        assert cache.held(SENT, "")[1] == 3
        lease = cache.lease(OTHER, "")
        cache.release(lease)
        await computed(supervisor, OTHER)
        assert cache.held(SENT, "")[1] == 0, "nothing is left pinned"


async def test_without_an_arena_there_is_nothing_to_check(tiny: Path) -> None:
    async with supervised(tiny, None) as supervisor:
        assert await supervisor.recompute(SENT, "", BLOCK) is None


async def test_a_check_outlives_its_engine(tiny: Path, opener: Callable[[int], OpenCache]) -> None:
    async with supervised(tiny, opener(64)) as supervisor:
        await computed(supervisor, SENT)
        psutil.Process(supervisor.status.pid).send_signal(signal.SIGSTOP)
        checking = asyncio.create_task(check(supervisor, SENT))
        await until(lambda: supervisor.active == 1, "the check is submitted")
        psutil.Process(supervisor.status.pid).kill()
        assert await checking == pytest.approx(0.0, abs=0.02)


async def test_a_check_that_is_given_up_leaves_nothing(tiny: Path, opener: Callable[[int], OpenCache]) -> None:
    async with supervised(tiny, opener(3)) as supervisor:
        cache = supervisor.cache
        assert cache is not None
        await computed(supervisor, SENT)
        engine = psutil.Process(supervisor.status.pid)
        engine.send_signal(signal.SIGSTOP)
        checking = asyncio.create_task(supervisor.recompute(SENT, "", BLOCK))
        await until(lambda: supervisor.active == 1, "the check is submitted")
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking
        engine.send_signal(signal.SIGCONT)
        assert supervisor.active == 0
        await computed(supervisor, OTHER)
        assert cache.held(SENT, "")[1] == 0, "nothing is left pinned"
        cache.check_integrity()
