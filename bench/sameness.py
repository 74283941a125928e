"""Scenario `same`: answers with guesses against answers without, on models that have learnt something.

Rows that are computed together are summed in another order than one by one. Where two tokens are so near that this
decides, answers differ with and without guesses: a near tie. So plain answers asked for one after another are held
against plain ones beside seven others as well, and where greedy answers part, the distance of the two best tokens is
computed anew.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.alone import Alone
from bench.load import Client, Reply, common_prefix
from bench.nodes import Nodes, NodeSpec
from bench.pipebed import Case, here, two_stages
from bench.report import Figure, Outcome, Verdict
from bench.setting import SWARM, Setup
from swarmcpp.models.embedded import DRAFT, embedded_file

PROMPTS = 200
ANSWER = 48
SLOTS = 8
CTX = 512
GAMMA = 6
NEAR = 0.25
"""Between the two best logits: what Q8_0 makes of the last bit's difference between rows one by one and together."""

KILL_EVERY_S = 3.0
PLAIN: Mapping[str, Any] = {"speculative": {"drafter": "none"}}
SEEDED: Mapping[str, Any] = {"temperature": 0.8}
NAMES = ("Tom", "Sue", "Bo", "Jack", "Ben", "Lily", "Lucy", "Sam", "Amy", "Max")
HEROES = ("cat", "dog", "bird", "boat", "train", "cloud", "mouse", "princess", "bear", "fish")
PLACES = ("in a small house", "near the big forest")

Extras = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, what it is asked, and the options of a node that lets it guess by every drafter."""

    name: str
    model: Path
    prompts: Sequence[str]
    drafters: Sequence[str]
    options: tuple[str, ...]


def subjects(setup: Setup) -> list[Subject]:
    """The guide, and stories260K where there is one."""
    prompts = [
        f"Once upon a time there was a {hero} named {name} who lived {place}."
        for name, hero, place in itertools.product(NAMES, HEROES, PLACES)
    ]
    # Every third is long enough that its beginning is found in the cache when it is asked for again.
    prompts = [" ".join(prompts[at : at + (5 if at % 3 == 0 else 1)]) for at in range(PROMPTS)]
    found = [Subject("guide", embedded_file(), prompts, ("ngram", "prediction", "draft"), ("--draft-model", DRAFT))]
    if setup.stories is not None:
        found.append(Subject("stories260K", setup.stories, prompts, ("ngram", "prediction", "skip"), ()))
    return found


async def _answers(client: Client, prompts: Sequence[str], extras: Extras, at_once: int) -> list[Reply]:
    """The answers, asked for by `at_once` users."""
    places = asyncio.Semaphore(at_once)

    async def one(prompt: str, extra: Mapping[str, Any]) -> Reply:
        async with places:
            return await replace(client, extra=extra).complete(prompt, ANSWER)

    return list(await asyncio.gather(*(map(one, prompts, extras))))


def _guessing(drafter: str, expected: Sequence[str]) -> list[Mapping[str, Any]]:
    """What requests say that guess by `drafter`, where answers will be about as `expected`."""
    wanted = {"speculative": {"drafter": drafter, "gamma": GAMMA}}
    if drafter != "prediction":
        return [wanted] * len(expected)
    return [
        {**wanted, "prediction": {"type": "content", "content": re.sub(r"\b(he|she)\b", "it", text)}}
        for text in expected
    ]


class _Tally:
    """Counts of answers that differ from plain ones."""

    def __init__(self, setup: Setup, subject: Subject) -> None:
        self._setup, self._subject = setup, subject
        self._judge = Alone(subject.model, CTX)
        self.lines: list[str] = []
        self.wrong = 0
        """Greedy answers that differ where no two tokens are near."""

    def note(self, what: str, expected: Sequence[Reply], found: Sequence[Reply], *, greedy: bool = True) -> None:
        """Compare answers to the same prompts."""
        differ, far = 0, 0
        for prompt, one, other in zip(self._subject.prompts, expected, found, strict=True):
            if one.text != other.text or one.completion_tokens != other.completion_tokens:
                differ += 1
                common = one.text[: common_prefix(one.text, other.text)]
                # Tokens may share their first letters: their beginning is that of the word.
                heads = [common, common.rsplit(" ", 1)[0]]
                far += greedy and min(self._gap(prompt + head) for head in heads) > NEAR
        self.wrong += far
        near = f", of which {differ - far} at a near tie" if greedy and differ else ""
        self.lines.append(f"{self._subject.name}, {what}: {differ} of {len(found)} differ from plain ones{near}")
        self._setup.say(self.lines[-1])

    def _gap(self, text: str) -> float:
        """Between the best two logits after `text`."""
        second, first = np.partition(self._judge.logits(self._judge.tokenize(text)), -2)[-2:]
        return float(first - second)


async def _killing(kill: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        kill()


async def _compared(subject: Subject, client: Client, tally: _Tally, where: str, kill: Callable[[], None]) -> None:
    """All drafters at one place, greedy and seeded, and once while engines are killed."""
    prompts = subject.prompts
    for kind, shape in (("greedy", {}), ("seeded", SEEDED)):
        greedy = kind == "greedy"
        asked: list[Mapping[str, Any]] = [{**shape, "seed": at} for at in range(len(prompts))]
        plain = [{**each, **PLAIN} for each in asked]
        expected = await _answers(client, prompts, plain, 1)
        note = partial(tally.note, expected=expected, greedy=greedy)
        note(f"{where}, {kind}, plain beside 7", found=await _answers(client, prompts, plain, SLOTS))
        for drafter in subject.drafters:
            said = _guessing(drafter, [reply.text for reply in expected])
            wanted = [{**each, **more} for each, more in zip(asked, said, strict=True)]
            for users in (1, SLOTS):
                found = await _answers(client, prompts, wanted, users)
                note(f"{where}, {kind}, {drafter}, {users} at once", found=found)
        killer = asyncio.create_task(_killing(kill))
        try:
            found = await _answers(client, prompts, wanted, SLOTS)
        finally:
            killer.cancel()
            with suppress(asyncio.CancelledError):
                await killer
        note(f"{where}, {kind}, {drafter}, {SLOTS} at once, kill -9 every {KILL_EVERY_S:g} s", found=found)


async def same(setup: Setup) -> Outcome:
    """200 prompts with every drafter: one box and two stages, alone and beside seven others, with kill -9."""
    lines: list[str] = []
    wrong = 0
    shown: dict[str, str] = {}
    case = Case(here(), SLOTS, CTX)
    for subject in subjects(setup):
        tally = _Tally(setup, subject)
        skips = {"SWARMCPP_INFERENCE_SWIFT_SELF_SPECULATIVE": "true"} if "skip" in subject.drafters else {}
        async with Nodes(setup) as nodes:
            spec = NodeSpec("one", case.boxes[0].core, SLOTS, CTX, options=subject.options, env=skips)
            await nodes.serve(spec, subject.model)
            client = nodes.client("one", subject.model)
            await _compared(subject, client, tally, "one box", partial(nodes.kill_engine, "one"))
            shown |= nodes.commands
        chained = replace(subject, drafters=("ngram", "prediction"))
        async with Nodes(setup) as nodes:
            client = await two_stages(nodes, case, subject.model)
            await _compared(chained, client, tally, "two stages", partial(nodes.kill_engine, "B"))
            shown |= nodes.commands
        lines += tally.lines
        wrong += tally.wrong
    held = Verdict("greedy answers differ at near ties alone", wrong == 0, timed=False)
    figure = Figure("greedy answers that differ where no two tokens are near", "answers", {SWARM: [wrong]}, "lower")
    return Outcome("same", (figure,), (held,), tuple(lines), shown)
