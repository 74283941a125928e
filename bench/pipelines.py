"""Scenarios of a model whose layers two boxes of one core share: many streams, against llama.cpp's RPC workers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from bench.farlink import far
from bench.load import common_prefix, random_prompt
from bench.longprompts import LONG_CTX, LONG_PROMPT, read_long
from bench.netns import namespaces
from bench.pipebed import ANSWER, CTX, PROMPT, Case, Sides, agreement_note, apart, both, here, over_rpc, race
from bench.report import Figure, Outcome, Verdict
from bench.rpc import CANDIDATES, RPC, Rpc, halved
from bench.setting import SWARM, Setup

STREAMS = {16: 1.3, 32: 1.3, 64: 1.65}
"""What is wanted over RPC, by streams that decode at once."""

FAR_STREAMS = 16
FAR_RTT_S = 0.020
NARROW_MBIT = 100.0

STORY = "Once upon a time"
STORY_ANSWER = 100
STRANGE_PROMPTS = 4


async def decode(setup: Setup) -> Outcome:
    """16, 32 and 64 streams with short prompts, no delay between the boxes."""
    figures: list[Figure] = []
    verdicts: list[Verdict] = []
    shown: dict[str, str] = {}
    agreed: list[float] = []
    for streams, wanted in STREAMS.items():
        async with AsyncExitStack() as stack:
            sides = await both(stack, setup, Case(here(), streams))
            rates, _, shared = await race(setup, sides, streams, f"decode {streams}")
            shown = dict(sides.commands)
        figures.append(Figure(f"{streams} streams", "tokens/s", rates))
        verdicts += over_rpc(setup, f"{streams} streams, of RPC", figures[-1], wanted)
        agreed += shared
    return Outcome("decode", tuple(figures), tuple(verdicts), agreement_note(agreed), shown)


async def delay(setup: Setup) -> Outcome:
    """16 streams when a round trip between the boxes takes 20 ms."""
    with namespaces(2) as spaces:
        async with AsyncExitStack() as stack:
            ends = await stack.enter_async_context(far((spaces[0], spaces[1]), FAR_RTT_S / 2))
            sides = await both(stack, setup, Case(apart(ends), FAR_STREAMS))
            rates, _, shared = await race(setup, sides, FAR_STREAMS, "delay")
    figure = Figure(f"{FAR_STREAMS} streams, {1000 * FAR_RTT_S:g} ms round trip", "tokens/s", rates)
    verdicts = over_rpc(setup, figure.name, figure, 1.5)
    return Outcome("delay", (figure,), verdicts, agreement_note(shared), sides.commands)


async def narrow(setup: Setup) -> Outcome:
    """16 streams over 100 Mbit/s, and what passes the link for each token; RPC at its defaults, without -bs."""
    with namespaces(2) as spaces:

        def count() -> int:
            # What one receives the other sent.
            return sum(space.received() for space in spaces)

        async with AsyncExitStack() as stack:
            sides = await both(stack, setup, Case(apart(spaces), FAR_STREAMS))
            # After the model has been loaded over it.
            for space in spaces:
                space.set_rate(NARROW_MBIT)
            rates, sizes, shared = await race(setup, sides, FAR_STREAMS, "narrow", count)
    figures = (
        Figure(f"{FAR_STREAMS} streams, {NARROW_MBIT:g} Mbit/s", "tokens/s", rates),
        Figure("on the link for each token, both ways", "bytes", sizes, "lower"),
    )
    verdicts = (
        *over_rpc(setup, figures[0].name, figures[0], 4.0),
        *(replace(each, timed=False) for each in over_rpc(setup, "bytes a token, fewer than RPC's", figures[1], 100.0)),
    )
    note = f"prompts of {PROMPT} tokens and gossip count with the {ANSWER} tokens of each answer"
    return Outcome("narrow", figures, verdicts, (note, *agreement_note(shared)), sides.commands)


async def rpc(setup: Setup) -> Outcome:
    """Ways to start RPC, without swarmcpp: which is the fastest at each number of streams, and for a long prompt."""
    rates: dict[int, dict[str, list[float]]] = {streams: {} for streams in STREAMS}
    long: dict[str, list[float]] = {}
    shown: dict[str, str] = {}
    for split in CANDIDATES:
        name = split.name
        for streams in STREAMS:
            async with Rpc(setup, here(), slots=streams, ctx_size=CTX, split=split) as server:
                found, _, _ = await race(setup, Sides({name: server.client}, {}), streams, f"rpc {streams}")
                rates[streams] |= found
        async with Rpc(setup, here(), slots=1, ctx_size=LONG_CTX, split=split, first=halved) as server:
            long |= await read_long(setup, {name: server.client}, "loopback")
            shown |= server.commands
    figures = [Figure(f"{streams} streams", "tokens/s", found) for streams, found in rates.items()]
    return Outcome("rpc", (*figures, Figure(f"{LONG_PROMPT} tokens", "tokens/s", long)), commands=shown)


async def agreement(setup: Setup) -> Outcome:
    """The same greedy tokens from RPC and from two stages: claimed on a trained model, reported on random weights."""
    async with AsyncExitStack() as stack:
        sides = await both(stack, setup, Case(here(), 1))
        rng = setup.rng("agreement", 0)
        prompts = [random_prompt(rng, 16 + 13 * index, setup.vocab) for index in range(STRANGE_PROMPTS)]
        texts = [[(await client.complete(each, ANSWER)).text for each in prompts] for client in sides.clients.values()]
    shared = (
        [common_prefix(a, b) / max(len(a), len(b), 1) for a, b in zip(*texts, strict=True)] if len(texts) == 2 else []
    )
    if setup.stories is None:
        return Outcome("agreement", notes=(*agreement_note(shared), "no trained model: SWARMCPP_STORIES names none"))
    async with AsyncExitStack() as stack:
        told = await both(stack, replace(setup, model=setup.stories), Case(here(), 1, 512))
        stories = {name: (await client.complete(STORY, STORY_ANSWER)).text for name, client in told.clients.items()}
    verdicts: tuple[Verdict, ...] = ()
    if len(stories) == 2:
        text = f"{setup.stories.name}, {STORY_ANSWER} greedy tokens: the same text as RPC"
        verdicts = (Verdict(text, stories[RPC] == stories[SWARM] != "", timed=False),)
    return Outcome("agreement", (), verdicts, agreement_note(shared), {**sides.commands, **told.commands})
