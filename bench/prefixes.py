"""Scenarios of the prefix cache: a prompt again, prompts together, what storing costs, and what eviction keeps."""

from __future__ import annotations

import asyncio
import heapq
import random
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.load import Reply, random_prompt
from bench.report import Figure, Outcome, Verdict, at_least
from bench.setting import LLAMA, SWARM, Bed, Setup, commands
from swarmcpp.core import Rows
from swarmcpp.kv.arena import Arena, ArenaFile
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model

REPEAT_PROMPT = 513
SHARED_PROMPT = 2048
OWN_PROMPT = 32
USERS = 8
BLOCK_TOKENS = 64
CHAPTER_RATIO = 29.4
"""Cold over warm time to first token on a 513-token prompt in SwarmLLM's performance chapter."""


def step_ms(reply: Reply) -> float:
    """Median milliseconds between the events of an answer: one decode step."""
    times = [moment.at for moment in reply.moments]
    return 1000 * statistics.median(b - a for a, b in pairwise(times))


async def repeat(setup: Setup) -> Outcome:
    """The same prompt of 513 tokens twice; every round has a prompt of its own."""
    launches = setup.both(slots=2, ctx_size=1024)
    cold: dict[str, list[float]] = {launch.name: [] for launch in launches}
    warm: dict[str, list[float]] = {launch.name: [] for launch in launches}
    steps: dict[str, list[float]] = {launch.name: [] for launch in launches}
    async with Bed(setup, launches) as bed:
        for round_ in range(-1, setup.repeats):
            prompt = random_prompt(setup.rng("repeat", round_), REPEAT_PROMPT, setup.vocab)
            for name, client in bed.clients.items():
                warmable = replace(client, cached=True)
                first = await warmable.complete(prompt, 16)
                again = await warmable.complete(prompt, 16)
                if round_ < 0:
                    continue
                cold[name].append(1000 * first.ttft)
                warm[name].append(1000 * again.ttft)
                steps[name].append(step_ms(again))
                setup.say(f"repeat {round_}: {name}: {cold[name][-1]:.0f} ms, then {warm[name][-1]:.1f} ms")
    figures = (
        Figure("first token, cold", "ms", cold, "lower"),
        Figure("first token, the same prompt again", "ms", warm, "lower"),
        Figure("one decode step", "ms", steps, "lower"),
    )
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    if SWARM in warm:
        share = figures[1].median(SWARM) / figures[2].median(SWARM)
        ratio = figures[0].median(SWARM) / figures[1].median(SWARM)
        verdicts = (Verdict(f"warm first token in decode steps: {share:.2f}, wanted <= 1.5", share <= 1.5),)
        notes = (f"{setup.model.name}: cold / warm = {ratio:.1f}x (SwarmLLM's chapter: {CHAPTER_RATIO}x)",)
    return Outcome("repeat", figures, verdicts, notes, commands(launches))


async def together(setup: Setup) -> Outcome:
    """Eight prompts of 2,048 shared and 32 own tokens arrive at once at a server that knows none of them."""
    launches = setup.both(slots=USERS, ctx_size=SHARED_PROMPT + 512)
    last: dict[str, list[float]] = {launch.name: [] for launch in launches}
    first: dict[str, list[float]] = {launch.name: [] for launch in launches}
    async with Bed(setup, launches) as bed:
        for round_ in range(setup.repeats):
            rng = setup.rng("together", round_)
            shared = random_prompt(rng, SHARED_PROMPT, setup.vocab)
            prompts = [shared + random_prompt(rng, OWN_PROMPT, setup.vocab) for _ in range(USERS)]
            for name, client in bed.clients.items():
                replies = await replace(client, cached=True).together(prompts, 8)
                last[name].append(max(reply.ttft for reply in replies))
                first[name].append(min(reply.ttft for reply in replies))
                setup.say(f"together {round_}: {name}: last first token after {last[name][-1]:.2f} s")
    figures = (
        Figure("last first token of eight", "s", last, "lower"),
        Figure("first first token of eight", "s", first, "lower"),
    )
    verdicts = (
        (at_least("the last of eight starts sooner (limit 7.2x)", figures[0].gain(SWARM), 6),)
        if {LLAMA, SWARM} <= set(last)
        else ()
    )
    return Outcome("together", figures, verdicts, commands=commands(launches))


# -- in this process ---------------------------------------------------------------------------------------------------


@contextmanager
def _cache(block_bytes: int, max_bytes: int) -> Iterator[tuple[PrefixCache, ArenaFile]]:
    """An empty cache in a temporary directory, and the file as an engine sees it."""
    with tempfile.TemporaryDirectory(prefix="swarmcpp-bench-") as directory:
        identity = KvIdentity(bytes(32), BLOCK_TOKENS, (1, 1))
        arena = Arena.open(Path(directory), identity.root(), block_bytes, max_bytes, 0)
        if arena is None:
            raise RuntimeError(f"no block of {block_bytes} bytes fits into {max_bytes}")
        cache = PrefixCache(arena, identity)
        file = ArenaFile(arena.path, arena.geometry)
        try:
            yield cache, file
        finally:
            file.close()
            cache.close()


def _prefill(backend: LlamaBackend, tokens: Sequence[int]) -> float:
    """Seconds of a whole prompt in chunks of 128, into an empty slot 0."""
    begun = time.perf_counter()
    for start in range(0, len(tokens), 128):
        chunk = tokens[start : start + 128]
        backend.decode([Rows(0, start, chunk, outputs=int(start + len(chunk) == len(tokens)))])
    return time.perf_counter() - begun


async def cost(setup: Setup) -> Outcome:
    """What storing a prompt costs beside reading it, what bringing it back costs, and how long a lookup takes."""
    return await asyncio.to_thread(_cost, setup)


def _cost(setup: Setup) -> Outcome:
    model = Model(setup.model, use_extra_bufts=setup.repack)
    context = Context(model, ContextOptions(n_ctx=SHARED_PROMPT + 256, n_seqs=2, n_threads=setup.threads))
    backend = LlamaBackend(model, context, BLOCK_TOKENS)
    block_bytes = backend.learn().token_bytes * BLOCK_TOKENS
    share: list[float] = []
    back: list[float] = []
    with _cache(block_bytes, 1 << 30) as (cache, file):
        backend.use_file(file)
        for round_ in range(setup.repeats):
            tokens = random_prompt(setup.rng("cost", round_), SHARED_PROMPT, setup.vocab)
            backend.truncate(0, 0)
            reading = _prefill(backend, tokens)
            begun = time.perf_counter()
            grant = cache.grant(tokens, "")
            cache.enter(grant, backend.store_blocks(0, grant.grants))
            share.append(100 * (time.perf_counter() - begun) / reading)
            begun = time.perf_counter()
            lease = cache.lease([*tokens, 0], "")
            loaded = backend.load_blocks(1, lease.refs)
            back.append(1000 * (time.perf_counter() - begun))
            cache.release(lease)
            if loaded * BLOCK_TOKENS != SHARED_PROMPT:
                raise RuntimeError(f"{loaded} blocks of {SHARED_PROMPT // BLOCK_TOKENS} came back")
            setup.say(f"cost {round_}: storing {share[-1]:.2f}% of {reading:.1f} s, back in {back[-1]:.1f} ms")
    context.close()
    model.close()
    lookups = [_lookup_ms(setup) for _ in range(setup.repeats)]
    figures = (
        Figure("export and insert, of the prefill time", "%", {SWARM: share}, "lower"),
        Figure(f"{SHARED_PROMPT} tokens back from the arena", "ms", {SWARM: back}, "lower"),
        Figure("lookup of 32k tokens among 100,000 blocks", "ms", {SWARM: lookups}, "lower"),
    )
    stored, found = figures[0].median(SWARM), figures[2].median(SWARM)
    verdicts = (
        Verdict(f"export and insert: {stored:.2f}% of prefill, wanted < 2%", stored < 2.0),
        Verdict(f"lookup: {found:.2f} ms, wanted < 5 ms", found < 5.0),
    )
    return Outcome("cost", figures, verdicts)


def _lookup_ms(setup: Setup) -> float:
    """Milliseconds to find and pin a stored prompt of 32,768 tokens in an index of 100,000 blocks."""
    rng = np.random.default_rng(setup.seed)
    prompts = rng.integers(0, 32000, (200, 512 * BLOCK_TOKENS)).tolist()
    with _cache(16, 512 << 20) as (cache, _file):
        for prompt in prompts:
            grant = cache.grant(prompt, "")
            cache.enter(grant, [(slot, bytes(32)) for _, slot in grant.grants])
            if cache.stats().blocks >= 100_000:
                break
        wanted = prompts[7]
        begun = time.perf_counter()
        lease = cache.lease([*wanted, 0], "")
        spent = 1000 * (time.perf_counter() - begun)
        if len(lease.refs) != 512 or cache.stats().blocks < 100_000:
            raise RuntimeError(f"{len(lease.refs)} blocks found, {cache.stats().blocks} stored")
        return spent


# -- eviction ----------------------------------------------------------------------------------------------------------

ARENA_BYTES = 1 << 30
WORKING_SET = 2 << 30
CHAIN_BLOCKS = 16
READS = 2000
BLOCK_BYTES = 12288 * BLOCK_TOKENS
"""Of Qwen2.5-0.5B: 24 layers x 2 KV heads x (64 + 64) x F16 for each token."""


def belady(accesses: Sequence[int], capacity: int) -> float:
    """Hit rate of the best possible eviction (Belady's MIN) for single blocks: an upper bound for chains of them."""
    times: dict[int, list[int]] = {}
    for at, block in enumerate(accesses):
        times.setdefault(block, []).append(at)
    never = len(accesses)

    def next_use(block: int, at: int) -> int:
        uses = times[block]
        index = bisect_right(uses, at)
        return uses[index] if index < len(uses) else never

    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for at, block in enumerate(accesses):
        hits += block in held
        if block not in held and len(held) >= capacity:
            while True:
                negative, victim = heapq.heappop(heap)
                if held.get(victim) == -negative:
                    break
            # MIN may also leave the newcomer out, when it comes back last of all.
            if -negative < next_use(block, at):
                heapq.heappush(heap, (negative, victim))
                continue
            del held[victim]
        held[block] = next_use(block, at)
        heapq.heappush(heap, (-held[block], block))
    return hits / len(accesses)


def play(documents: Sequence[int]) -> tuple[float, float]:
    """(hit rate of the real cache on a real arena, of Belady) in blocks, for reads of these documents."""
    hits = 0
    payload = memoryview(bytes(BLOCK_BYTES))
    with _cache(BLOCK_BYTES, ARENA_BYTES) as (cache, file):
        for document in documents:
            tokens = list(range(document * 2048, document * 2048 + CHAIN_BLOCKS * BLOCK_TOKENS))
            lease = cache.lease([*tokens, 0], "")
            hits += len(lease.refs)
            cache.release(lease)
            grant = cache.grant(tokens, "")
            cache.enter(grant, [(slot, bytes(32)) for _, slot in grant.grants if file.write(slot, payload)])
        capacity = cache.n_blocks
        cache.check_integrity()
    accesses = [document * CHAIN_BLOCKS + block for document in documents for block in range(CHAIN_BLOCKS)]
    return hits / len(accesses), belady(accesses, capacity)


async def eviction(setup: Setup) -> Outcome:
    """A working set of 2 GiB in an arena of 1 GiB, read in a circle and by Zipf's law."""
    documents = WORKING_SET // BLOCK_BYTES // CHAIN_BLOCKS
    rates: dict[str, dict[str, list[float]]] = {}
    for kind in ("cyclic", "zipf"):
        rates[kind] = {"Belady": [], SWARM: []}
        for round_ in range(setup.repeats):
            rng = random.Random(f"{setup.seed} {kind} {round_}")
            if kind == "cyclic":
                order = [index % documents for index in range(READS)]
            else:
                weights = [1 / (rank + 1) for rank in range(documents)]
                order = rng.choices(range(documents), weights, k=READS)
            own, best = await asyncio.to_thread(play, order)
            rates[kind]["Belady"].append(best)
            rates[kind][SWARM].append(own)
            setup.say(f"eviction {round_}: {kind}: {own:.3f}, Belady {best:.3f}")
    figures = (
        Figure("hit rate, cyclic reads", "share", rates["cyclic"]),
        Figure("hit rate, Zipf reads", "share", rates["zipf"]),
    )
    verdict = Verdict(
        f"Zipf: {figures[1].gain(SWARM):.3f} of the optimal hit rate, wanted >= 0.9",
        figures[1].gain(SWARM) >= 0.9,
        timed=False,
    )
    return Outcome("eviction", figures, (verdict,))
