"""Scenarios of a swarm whose nodes share what they hold: prefixes over real links, joining, two arenas as one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.load import BadReply, Client, random_prompt
from bench.netns import Namespace, namespaces
from bench.nodes import Nodes, NodeSpec, cores
from bench.report import Figure, Outcome, Verdict, at_least
from bench.servers import Launch
from bench.setting import LLAMA, SWARM, Bed, Setup, commands
from swarmcpp.models.synthetic import QWEN25_7B, Shape
from swarmcpp.models.synthetic_vocab import IM_END, MIN_VOCAB
from swarmcpp.status import NodeRow

BLOCK_TOKENS = 64
OWN_PROMPT = 1
"""Tokens of B's question beyond what A has read: one, since the last token of a prompt is always computed."""

ARENA_OWN = 8
ROOM = 320
"""Tokens that an answer may have, and more than the padding of a context: with them the question is too long for A. The
answer ends with its first token all the same, which a bias makes the end of a turn."""

CHAPTER_RATIO = 12.9
"""Cold over fetched time to first token, 640 tokens on a CPU, in SwarmLLM's performance chapter."""

JOIN_MBIT = 1000.0
METER_S = 0.005

ARENA = "1G"
ARENA_PROMPT = 2048
ARENA_PROMPTS = 29
"""Of 2,048 tokens at 32 KiB: 1.8 GiB. Odd, so that each round asks for every prompt at the other node."""

CACHE_SHAPE = Shape("cache-shape", "llama", 4, 64, 16, 16, 128, 4096, 2048, head_dim=128)
"""KV of a large model (32 KiB a token) with little to compute, so that filling the arenas does not take hours."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt that one node has read, asked at another: how long, over what, and the ratios that are wanted."""

    title: str
    model: Path
    vocab: range
    prompt_tokens: int
    wanted: Mapping[float, float]
    """Cold time to first token of llama-server / that of the swarm, by the link's Mbit/s."""


async def prefix(setup: Setup) -> Outcome:
    """A prompt of 2,048 tokens that A has read, asked at B, over links of 1000, 100 and 5 Mbit/s."""
    wanted = {1000.0: 40.0, 5.0: 0.97} if setup.quick else {1000.0: 40.0, 100.0: 10.0, 5.0: 0.97}
    return await _fetched(setup, Prefix("prefix", setup.model, setup.vocab, 2048, wanted))


async def chapter(setup: Setup) -> Outcome:
    """The experiment of SwarmLLM's chapter: a 7B model in Q4_0, 640 tokens, 1 Gbit/s. Takes 12 GB of memory."""
    model = await asyncio.to_thread(setup.synthetic, QWEN25_7B, "qwen2.5-7b-shape-q4_0.gguf", "Q4_0")
    vocab = range(MIN_VOCAB, QWEN25_7B.n_vocab)
    outcome = await _fetched(setup, Prefix("chapter", model, vocab, 640, {1000.0: 50.0}))
    return replace(outcome, notes=(*outcome.notes, f"SwarmLLM's chapter: {CHAPTER_RATIO}x"))


async def _fetched(setup: Setup, case: Prefix) -> Outcome:
    """See `Prefix`. A reads all prompts before there is a B, which could otherwise be given one of them to read.

    B's question with room for its answer is longer than A's context, so it cannot be delegated to A, where it would
    be answered even sooner: what is measured is the fetch. llama-server computes the same question on B's core.
    """
    core_a, core_b = cores(2)
    room = case.prompt_tokens + 1
    questions = {rate: _questions(setup, case, rate) for rate in case.wanted}
    figures: list[Figure] = []
    notes: list[str] = []
    routes: set[str] = set()
    async with AsyncExitStack() as stack:
        spaces = stack.enter_context(namespaces(2))
        nodes = await stack.enter_async_context(Nodes(setup))
        await nodes.serve(NodeSpec("A", core_a, 1, room, spaces[0]), case.model)
        await _read(setup, nodes, case, questions)
        cold = await _cold_server(stack, setup, case, core_b)
        for rate, asked in questions.items():
            for space in spaces:
                space.set_rate(rate)
            await nodes.join(NodeSpec("B", core_b, 1, room + OWN_PROMPT + ROOM, spaces[1]), case.model)
            await nodes.settled()
            await nodes.sees_blocks("B", "A", case.prompt_tokens // BLOCK_TOKENS)
            figure = await _ask(setup, case, nodes.client("B", case.model), cold, asked, rate)
            notes.append(await _served_by(nodes, f"{rate:g} Mbit/s"))
            routes |= set(nodes.routes("B"))
            figures.append(figure)
            await nodes.stop("B")
            nodes.forget("B")
        shown = {**nodes.commands, **(commands([_cold_launch(setup, case, core_b)]) if cold else {})}
    verdicts = tuple(
        at_least(f"first token, {figure.name.partition(', ')[2]}", figure.gain(SWARM), wanted)
        for figure, wanted in zip(figures, case.wanted.values(), strict=True)
        if cold
    )
    own = Verdict("B answered every question itself", routes == {"local"}, timed=False)
    return Outcome(case.title, tuple(figures), (*verdicts, own), tuple(notes), shown)


def _questions(setup: Setup, case: Prefix, rate: float) -> list[list[int]]:
    """One question for each round, and one before for the link to become known. B adds its own end."""
    rounds = range(-1, setup.repeats)
    return [random_prompt(setup.rng(f"{case.title} {rate}", each), case.prompt_tokens, case.vocab) for each in rounds]


async def _read(setup: Setup, nodes: Nodes, case: Prefix, questions: Mapping[float, Sequence[list[int]]]) -> None:
    prompts = [prompt for asked in questions.values() for prompt in asked]
    for index, prompt in enumerate(prompts, 1):
        reply = await nodes.client("A", case.model).complete(prompt, 1)
        setup.say(f"{case.title}: A has read prompt {index} of {len(prompts)} in {reply.ttft:.1f} s")


def _cold_launch(setup: Setup, case: Prefix, core: int) -> Launch:
    single = replace(setup, threads=1)
    return replace(
        single.llama(slots=1, ctx_size=case.prompt_tokens + OWN_PROMPT + ROOM, model=case.model), cpus=(core,)
    )


async def _cold_server(stack: AsyncExitStack, setup: Setup, case: Prefix, core: int) -> Client | None:
    """llama-server with one thread on `core`; None when it takes no part."""
    if LLAMA not in setup.sides:
        return None
    bed = await stack.enter_async_context(Bed(setup, [_cold_launch(setup, case, core)]))
    return bed.clients[LLAMA]


async def _ask(
    setup: Setup, case: Prefix, warm: Client, cold: Client | None, questions: Sequence[Sequence[int]], rate: float
) -> Figure:
    """Times to the first token of each question but the first, at llama-server and at the node."""
    ending = {"max_tokens": ROOM, "ignore_eos": False, "logit_bias": {str(IM_END): 100}}
    sides = {name: replace(client, extra=ending) for name, client in ((LLAMA, cold), (SWARM, warm)) if client}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_, question in enumerate(questions, -1):
        own = random_prompt(setup.rng(f"{case.title} own {rate}", round_), OWN_PROMPT, case.vocab)
        for name, client in sides.items():
            reply = await client.complete([*question, *own], ROOM)
            if reply.completion_tokens > 1:
                raise BadReply(f"{name} went on after its first token, which should have been the last")
            ttft = 1000 * reply.ttft
            setup.say(f"{case.title} {round_}: {rate:g} Mbit/s: {name}: {ttft:.1f} ms")
            if round_ >= 0:
                times[name].append(ttft)
    return Figure(f"first token, {rate:g} Mbit/s", "ms", times, "lower")


async def _served_by(nodes: Nodes, link: str) -> str:
    """Where B's answers came from, for the reader to see that the fetch is what was measured."""
    row = (await nodes.rows("B"))["B"]
    routes = nodes.routes("B")
    ways = ", ".join(f"{routes.count(route)} {route}" for route in sorted(set(routes)))
    return f"{link}: answers of B by route: {ways}; prompt tokens: {_by_tier([row])}"


def _by_tier(rows: Sequence[NodeRow]) -> str:
    names = ("slot_tokens", "arena_tokens", "peer_tokens", "computed_tokens")
    return ", ".join(f"{sum(getattr(row, name) for row in rows)} {name.partition('_')[0]}" for name in names)


# -- join --------------------------------------------------------------------------------------------------------------


class _Meter:
    """Watches what a namespace's link receives, in a thread of its own: (time.perf_counter, bytes) while it changes."""

    def __init__(self, space: Namespace) -> None:
        self._space = space
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._seen: list[tuple[float, int]] = []

    def __enter__(self) -> _Meter:
        self._seen.append((time.perf_counter(), self._space.received()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(METER_S):
            now = self._space.received()
            if now != self._seen[-1][1]:
                self._seen.append((time.perf_counter(), now))

    def transfer_s(self, size: int) -> float:
        """Seconds that `size` bytes took, from when 1% to when 99% of them had come, scaled to all of them."""
        began = self._seen[0][1]
        low, high = (next(at for at, total in self._seen if total - began >= share * size) for share in (0.01, 0.99))
        return (high - low) / 0.98


async def join(setup: Setup) -> Outcome:
    """From `swarmcpp join TOKEN` on a machine without the model to its first answer, over 1 Gbit/s."""
    core_a, core_b = cores(2)
    size = setup.model.stat().st_size
    total: list[float] = []
    beside: list[float] = []
    share: list[float] = []
    with namespaces(2, JOIN_MBIT) as spaces:
        async with Nodes(setup) as nodes:
            await nodes.serve(NodeSpec("A", core_a, 2, 1024, spaces[0]), setup.model)
            for round_ in range(setup.repeats):
                prompt = random_prompt(setup.rng("join", round_), 16, setup.vocab)
                begun = time.perf_counter()
                with _Meter(spaces[1]) as meter:
                    await nodes.join(NodeSpec("B", core_b, 2, 1024, spaces[1]))
                    reply = await nodes.client("B", setup.model).complete(prompt, 1)
                transfer = meter.transfer_s(size)
                total.append(reply.finished - begun)
                beside.append(total[-1] - transfer)
                share.append(100 * size * 8 / 1e6 / transfer / JOIN_MBIT)
                setup.say(f"join {round_}: {total[-1]:.1f} s, of which {transfer:.1f} s of transfer ({share[-1]:.0f}%)")
                await nodes.stop("B")
                nodes.forget("B")
            shown = dict(nodes.commands)
    figures = (
        Figure("join to first answer", "s", {SWARM: total}, "lower"),
        Figure("the same without the transfer", "s", {SWARM: beside}, "lower"),
        Figure(f"transfer, of {JOIN_MBIT:g} Mbit/s", "%", {SWARM: share}),
    )
    spent, rate = figures[1].median(SWARM), figures[2].median(SWARM)
    verdicts = (
        Verdict(f"join without the transfer: {spent:.1f} s, wanted < 10 s", spent < 10.0),
        Verdict(f"transfer: {rate:.0f}% of the link's rate, wanted >= 70%", rate >= 70.0),
    )
    return Outcome("join", figures, verdicts, (f"{setup.model.name}: {size / 1e6:.0f} MB",), shown)


# -- arenas ------------------------------------------------------------------------------------------------------------


async def arenas(setup: Setup) -> Outcome:
    """Prompts of 1.8 GiB of KV, asked in a circle and alternately at two nodes with an arena of 1 GiB each."""
    first, second = cores(2)
    model = await asyncio.to_thread(setup.synthetic, CACHE_SHAPE, "cache-shape-q4_0.gguf", "Q4_0")
    vocab = range(MIN_VOCAB, CACHE_SHAPE.n_vocab)
    rng = setup.rng("arenas", 0)
    prompts = [random_prompt(rng, ARENA_PROMPT + ARENA_OWN, vocab) for _ in range(ARENA_PROMPTS)]
    shares: list[float] = []
    names = ("A", "B")
    async with Nodes(setup) as nodes:
        size = ("--cache-size", ARENA)
        await nodes.serve(NodeSpec("A", first, 1, ARENA_PROMPT + 256, options=size), model)
        await nodes.join(NodeSpec("B", second, 1, ARENA_PROMPT + 256, options=size), model)
        await nodes.settled()
        before = await _tallies(nodes, names)
        for round_ in range(-1, setup.repeats):
            for index, prompt in enumerate(prompts):
                name = names[(index + round_ * len(prompts)) % 2]
                await nodes.client(name, model).complete(prompt, 1)
            after = await _tallies(nodes, names)
            hits, computed = (after[key] - before[key] for key in ("hits", "computed"))
            before = after
            share = 100 * hits / (hits + computed)
            setup.say(f"arenas {round_}: {share:.1f}% of prompt tokens were hits")
            if round_ >= 0:
                shares.append(share)
        rows = [(await nodes.rows(name))[name] for name in names]
        shown = dict(nodes.commands)
    worst = min(shares)
    verdict = Verdict(f"hits after the first round, worst round: {worst:.1f}%, wanted >= 95%", worst >= 95.0, False)
    held = ", ".join(f"{row.name} holds {row.blocks} blocks" for row in rows)
    note = f"prompt tokens of all rounds: {_by_tier(rows)}; {held}"
    figure = Figure("prompt tokens that were hits", "%", {SWARM: shares})
    return Outcome("arenas", (figure,), (verdict,), (note,), shown)


async def _tallies(nodes: Nodes, names: Sequence[str]) -> dict[str, int]:
    """Prompt tokens so far, of all nodes together: those whose KV was there, and those computed."""
    rows = [(await nodes.rows(name))[name] for name in names]
    hits = sum(row.slot_tokens + row.arena_tokens + row.peer_tokens for row in rows)
    return {"hits": hits, "computed": sum(row.computed_tokens for row in rows)}
