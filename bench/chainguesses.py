"""Scenarios of guesses over two stages far from each other, one stream, against llama.cpp's RPC workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from bench.draftpairs import SMALL, TARGET
from bench.farlink import far
from bench.guesses import COUNTING, OFF, PLAIN, SPEC_TYPES, Task, ask, copy_task, novel_task
from bench.load import Client, throughput
from bench.netns import namespaces
from bench.nodes import Nodes
from bench.pipebed import Case, apart, two_stages
from bench.report import Figure, Outcome, Verdict, at_least
from bench.rpc import BEST, RPC, Rpc
from bench.setting import LLAMA, SWARM, Setup

RTT_S = 0.050
PAIR_RTT_S = 0.020
CTX = 1024
LINK_BYTES = "on the link for each token, both ways"


class _Race:
    """Settings that answer the same tasks in turn."""

    def __init__(
        self, setup: Setup, name: str, make: Callable[[random.Random], Task], count: Callable[[], int]
    ) -> None:
        self._setup, self._name, self._make, self._count = setup, name, make, count
        self.clients: dict[str, Client] = {}
        self.rates: dict[str, list[float]] = {}
        self.sizes: dict[str, list[float]] = {}
        self.differ = 0

    async def round(self, round_: int) -> dict[str, float]:
        """Tokens/s of each; those of rounds from 0 on are kept."""
        task = self._make(self._setup.rng(self._name, round_))
        found: dict[str, float] = {}
        told: set[str] = set()
        for setting in list(self.clients) if round_ % 2 else list(self.clients)[::-1]:
            salt = {"cache_salt": f"{setting} {round_}"}
            extra = {PLAIN: {**OFF, **salt}, SWARM: {**task.extra, **salt}}.get(setting, {})
            before = self._count()
            replies = await ask(self.clients[setting], [task], extra)
            found[setting] = throughput(replies)
            size = (self._count() - before) / replies[0].completion_tokens
            told.add(replies[0].text)
            self._setup.say(f"{self._name} {round_}: {setting} {found[setting]:.2f} tokens/s, {size:.0f} bytes a token")
            if round_ >= 0:
                self.rates.setdefault(setting, []).append(found[setting])
                self.sizes.setdefault(setting, []).append(size)
        self.differ += len(told) > 1
        return found


async def _raced(setup: Setup, name: str, make: Callable[[random.Random], Task], kinds: tuple[str, ...]) -> Outcome:
    """One stream over both products. Of RPC's kinds of guesses the one goes on that was best in the second round: some
    are good only at the first request."""
    setup = replace(setup, model=await asyncio.to_thread(setup.synthetic, *COUNTING))
    with namespaces(2) as spaces:
        async with AsyncExitStack() as stack:
            ends = await stack.enter_async_context(far((spaces[0], spaces[1]), RTT_S / 2))
            boxes = apart(ends)
            race = _Race(setup, name, make, lambda: sum(end.received() for end in ends))
            shown: dict[str, str] = {}
            if LLAMA in setup.sides:
                for kind in ("", *kinds):
                    options = ("--spec-type", kind) if kind else ()
                    split = replace(BEST, name=f"{RPC} {kind}".strip(), options=options)
                    one = await stack.enter_async_context(Rpc(setup, boxes, slots=1, ctx_size=CTX, split=split))
                    race.clients[split.name] = one.client
                    shown |= one.commands
            nodes = await stack.enter_async_context(Nodes(setup))
            client = await two_stages(nodes, Case(boxes, 1, CTX), setup.model)
            race.clients |= {PLAIN: client, SWARM: client}
            shown |= nodes.commands
            await race.round(-2)
            warm = await race.round(-1)
            others = [setting for setting in warm if setting.startswith(f"{RPC} ")]
            best = max(others, key=warm.__getitem__, default="")
            for setting in others:
                if setting != best:
                    del race.clients[setting]
            for round_ in range(setup.repeats):
                await race.round(round_)
    title = f"{name}, one stream, {1000 * RTT_S:g} ms round trip"
    figures = (Figure(title, "tokens/s", race.rates), Figure(LINK_BYTES, "bytes", race.sizes, "lower"))
    same = Verdict(f"{name}: all settings give the same answers", race.differ == 0, timed=False)
    return Outcome(f"chain {name}", figures, (same,), (f"second round: {warm}",) if best else (), shown)


async def copy(setup: Setup) -> Outcome:
    """Text that stands in the prompt."""
    outcome = await _raced(setup, "copy", copy_task, SPEC_TYPES)
    figure = outcome.figures[0]
    best = next((setting for setting in figure.samples if setting.startswith(f"{RPC} ")), "")
    claims = []
    if best:
        claims = [
            at_least("copy, of RPC", figure.gain(SWARM, RPC), 8.0),
            at_least(f"copy, of {best}", figure.gain(SWARM, best), 2.5),
        ]
    return replace(outcome, verdicts=(*outcome.verdicts, *claims))


async def pair(setup: Setup) -> Outcome:
    """A 1.5B shape over two stages with a small draft of one mind beside the first, 20 ms apart."""
    target, small = await asyncio.gather(*(asyncio.to_thread(setup.synthetic, *each) for each in (TARGET, SMALL)))
    setup = replace(setup, model=target)
    with namespaces(2) as spaces:
        async with AsyncExitStack() as stack:
            ends = await stack.enter_async_context(far((spaces[0], spaces[1]), PAIR_RTT_S / 2))
            nodes = await stack.enter_async_context(Nodes(setup))
            client = await two_stages(nodes, Case(apart(ends), 1, CTX), target, "--draft-model", str(small))
            race = _Race(setup, "pair", _drafted_task, lambda: sum(end.received() for end in ends))
            race.clients = {PLAIN: client, SWARM: client}
            for round_ in range(-1, setup.repeats):
                await race.round(round_)
            shown = dict(nodes.commands)
    figure = Figure(f"1.5B shape, one stream, {1000 * PAIR_RTT_S:g} ms round trip", "tokens/s", race.rates)
    verdicts = (
        Verdict("pair: both give the same answers", race.differ == 0, timed=False),
        at_least("pair, of plain passes", figure.gain(SWARM, PLAIN), 2.0),
    )
    return Outcome("chain pair", (figure, Figure(LINK_BYTES, "bytes", race.sizes, "lower")), verdicts, (), shown)


def _drafted_task(rng: random.Random) -> Task:
    return Task(novel_task(rng).prompt, {"speculative": {"drafter": "draft"}})


async def novel(setup: Setup) -> Outcome:
    """Text of which nothing was there before."""
    outcome = await _raced(replace(setup, sides=(SWARM,)), "novel", novel_task, ())
    claim = at_least("novel, of plain passes", outcome.figures[0].gain(SWARM, PLAIN), 0.97)
    return replace(outcome, verdicts=(*outcome.verdicts, claim))
