"""Scenarios of a model whose layers two boxes of one core share: a long prompt, and one stream alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from bench.delegates import decode_rate
from bench.load import Client, random_prompt
from bench.netns import namespaces
from bench.nodes import Nodes, cores
from bench.pipebed import ANSWER, CTX, PROMPT, Case, apart, both, here, over_rpc, two_stages
from bench.report import Figure, Outcome, Verdict, at_least
from bench.rpc import halved
from bench.servers import Launch
from bench.setting import SWARM, Bed, Setup, commands

LONG_PROMPT = 2048
LONG_CTX = LONG_PROMPT + 256
ALONE = "one core"


async def prefill(setup: Setup) -> Outcome:
    """A prompt of 2,048 tokens over two boxes at 1 Gbit/s and at 20 Mbit/s, against one core and against RPC."""
    figures: list[Figure] = []
    alone = _alone(setup, llama=True)
    with namespaces(2) as spaces:
        async with AsyncExitStack() as stack:
            sides = await both(stack, setup, Case(apart(spaces), 1, LONG_CTX, first=halved))
            bed = await stack.enter_async_context(Bed(setup, [alone]))
            clients = {ALONE: bed.clients[ALONE], **sides.clients}
            for mbit in (1000.0, 20.0):
                for space in spaces:
                    space.set_rate(mbit)
                link = f"{mbit:g} Mbit/s"
                rates = await read_long(setup, clients, link)
                figures.append(Figure(f"{LONG_PROMPT} tokens, {link}", "tokens/s", rates))
    verdicts: list[Verdict] = []
    if SWARM in sides.clients:
        for figure, wanted in zip(figures, (1.7, 1.6), strict=True):
            verdicts.append(at_least(f"{figure.name}, of one core", figure.gain(SWARM, ALONE), wanted))
        verdicts += over_rpc(setup, f"{figures[1].name}, of RPC", figures[1], 1.4)
    return Outcome("prefill", tuple(figures), tuple(verdicts), commands={**commands([alone]), **sides.commands})


def _alone(setup: Setup, *, llama: bool) -> Launch:
    """One server on box A's core with the whole model: llama-server for a long prompt, or swarmcpp for one stream."""
    single = replace(setup, threads=1)
    launch = single.llama(slots=1, ctx_size=LONG_CTX) if llama else single.swarm(slots=1, ctx_size=CTX)
    return replace(launch, name=ALONE, cpus=cores(1))


async def read_long(setup: Setup, clients: Mapping[str, Client], link: str) -> dict[str, list[float]]:
    """Prompt tokens / time to the first token, by setting and round."""
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for round_ in range(-1, setup.repeats):
        # No cache has any of it.
        prompt = random_prompt(setup.rng(f"prefill {link}", round_), LONG_PROMPT, setup.vocab)
        for name, client in clients.items():
            rate = LONG_PROMPT / (await client.complete(prompt, 1)).ttft
            setup.say(f"prefill {round_}: {link}: {name}: {rate:.1f} tokens/s")
            if round_ >= 0:
                rates[name].append(rate)
    return rates


async def single(setup: Setup) -> Outcome:
    """One stream over two stages without delay, against the same engine with all layers on one core."""
    alone = _alone(setup, llama=False)
    rates: dict[str, list[float]] = {ALONE: [], SWARM: []}
    case = Case(here(), 1)
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(Bed(setup, [alone]))
        nodes = await stack.enter_async_context(Nodes(setup))
        clients = {ALONE: bed.clients[ALONE], SWARM: await two_stages(nodes, case, setup.model)}
        for round_ in range(-1, setup.repeats):
            prompt = random_prompt(setup.rng("single", round_), PROMPT, setup.vocab)
            for name, client in clients.items():
                rate = decode_rate(await client.complete(prompt, ANSWER))
                setup.say(f"single {round_}: {name}: {rate:.2f} tokens/s")
                if round_ >= 0:
                    rates[name].append(rate)
        shown = {**commands([alone]), **nodes.commands}
    hops = [await _overhead(setup, case, round_) for round_ in range(setup.repeats)]
    figures = (
        Figure("1 stream", "tokens/s", rates),
        Figure("a hop, beside what its stage computes", "us", {SWARM: hops}, "lower"),
    )
    verdict = at_least("1 stream, of the engine with all layers", figures[0].gain(SWARM), 0.95)
    return Outcome("single", figures, (verdict,), commands=shown)


async def _overhead(setup: Setup, case: Case, round_: int) -> float:
    """Microseconds of a hop, from nodes of their own whose logs say how long passes took."""
    async with Nodes(setup) as nodes:
        client = await two_stages(nodes, case, setup.model, "-vv")
        await client.complete(random_prompt(setup.rng("overhead", round_), PROMPT, setup.vocab), ANSWER)
        return hop_overhead_us([nodes.log(name).read_text(errors="replace") for name in ("A", "B")])


def hop_overhead_us(logs: Sequence[str]) -> float:
    """What a pass of one row takes more than its stages' computing, for each stage, in microseconds, by medians.

    `logs` are those of the stages' nodes, the head's first. Raises ValueError when a line that is needed is missing.
    """
    whole = _times(logs[0], "pipeline pass")
    parts = [_times(log, "stage pass") for log in logs]
    if not whole or not all(parts):
        raise ValueError("the nodes logged no passes of one row: start them with -vv")
    return 1000 * (statistics.median(whole) - sum(map(statistics.median, parts))) / len(logs)


def _times(log: str, event: str) -> list[float]:
    """Milliseconds of an event's passes of one row."""
    return [float(found) for found in re.findall(rf"DIAG: {event} rows=1 parts=1 ms=([\d.]+)", log)]
