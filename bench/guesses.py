"""Scenarios of speculative decoding on one machine: text that is copied or edited, novel text, and many users."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.load import Client, Reply, throughput
from bench.report import Figure, Outcome, Verdict, at_least
from bench.servers import Launch, llama_server
from bench.setting import LLAMA, SWARM, Bed, Setup, commands
from swarmcpp.models.synthetic import QWEN25_05B

SHAPE = replace(QWEN25_05B, name="Qwen2.5-0.5B-shape that counts", tied=False, counts=True)
"""After each token it says the next id. What it says is known beforehand, and takes as long as with any weights."""

COUNTING = (SHAPE, "qwen2.5-0.5b-counts-q8_0.gguf")

ANSWER = 192
SOURCE = 256
"""Tokens of the text that is copied."""

SEEN = 16
"""Tokens of the copy that stand at the prompt's end already: llama-server looks for 12."""

LINE = 32
CHANGED = 0.1
"""Of the tokens of a prediction, in phrases of PHRASE."""

PHRASE = 6

USERS = 8
SPEC_TYPES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""llama-server's that need no second model."""

PLAIN = f"{SWARM} without guesses"
OFF = {"speculative": {"drafter": "none"}}
NGRAM = {"speculative": {"drafter": "ngram"}}


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, whose answer are the ids that follow its last one. `extra` is for swarmcpp's body."""

    prompt: tuple[int, ...]
    extra: Mapping[str, Any]


def copy_task(rng: random.Random) -> Task:
    """A text, then its beginning once more."""
    first = rng.randrange(1000, SHAPE.n_vocab - 2 * SOURCE)
    text = range(first, first + SOURCE)
    return Task((*text, *noise(rng, 8), *text[:SEEN]), NGRAM)


def shuffled_task(rng: random.Random) -> Task:
    """A text whose lines stand in the prompt in another order: each has to be found anew."""
    first = rng.randrange(1000, SHAPE.n_vocab - 2 * SOURCE)
    lines = [tuple(range(at, at + LINE)) for at in range(first, first + SOURCE, LINE)]
    rng.shuffle(lines)
    return Task((*(token for line in lines for token in line), *noise(rng, 8), *range(first, first + SEEN)), NGRAM)


def predicted_task(rng: random.Random) -> Task:
    """The answer as it will be, but for some phrases."""
    return _predicted(rng, PHRASE)


def speckled_task(rng: random.Random) -> Task:
    """The answer as it will be, but for as many tokens one by one: it is hardly ever right for long."""
    return _predicted(rng, 1)


def _predicted(rng: random.Random, phrase: int) -> Task:
    first = rng.randrange(1000, SHAPE.n_vocab - 2 * SOURCE)
    begins = rng.sample(range(ANSWER // phrase), round(CHANGED * ANSWER / phrase))
    wrong = {begin * phrase + at for begin in begins for at in range(phrase)}
    told = [token + 7 if at in wrong else token for at, token in enumerate(range(first, first + ANSWER))]
    prediction = {"type": "content", "content": told}
    return Task((*noise(rng, 32), first - 1), {"prediction": prediction})


def novel_task(rng: random.Random) -> Task:
    """Nothing in the prompt or the answer comes twice."""
    first = rng.randrange(1000, SHAPE.n_vocab - 2 * SOURCE)
    return Task((*noise(rng, 64), first), {})


def noise(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(300, 1000) for _ in range(count))


async def ask(client: Client, tasks: Sequence[Task], extra: Mapping[str, Any]) -> list[Reply]:
    asking = (replace(client, extra=extra).complete(task.prompt, ANSWER) for task in tasks)
    replies = list(await asyncio.gather(*asking))
    if any(reply.completion_tokens != ANSWER for reply in replies):
        raise RuntimeError(f"{client.base_url} gave answers of another length than {ANSWER} tokens")
    return replies


def _with_guesses(setup: Setup, model: Path, kind: str, slots: int) -> Launch:
    made = llama_server(
        setup.reference,
        model,
        slots=slots,
        ctx_size=1024,
        threads=setup.threads,
        repack=setup.repack,
        extra=("--spec-type", kind),
    )
    return replace(made, name=f"{LLAMA} {kind}")


def _extra(setting: str, task: Task, salt: str) -> Mapping[str, Any]:
    if setting == PLAIN:
        return {**OFF, "cache_salt": salt}
    return {**task.extra, "cache_salt": salt} if setting == SWARM else {}


async def _compare(
    setup: Setup, name: str, make: Callable[[random.Random], Task], *, users: int = 1, kinds: Sequence[str] = ()
) -> tuple[Figure, Outcome]:
    """Tokens/s of all settings on the same prompts in alternation. All must give the same answers."""
    model = await asyncio.to_thread(setup.synthetic, *COUNTING)
    launches = [setup.swarm(users, 1024, model=model)]
    if LLAMA in setup.sides:
        launches += [setup.llama(users, 1024, model=model)]
        launches += [_with_guesses(setup, model, kind, users) for kind in kinds]
    settings = [PLAIN, *(launch.name for launch in launches)]
    rates: dict[str, list[float]] = {setting: [] for setting in settings}
    differ = 0
    async with Bed(setup, launches) as bed:
        # The first round warms all up: page cache, thread pools, learned costs.
        for round_ in range(-1, setup.repeats):
            rng = setup.rng(name, round_)
            tasks = [make(rng) for _ in range(users)]
            told: set[tuple[str, ...]] = set()
            for setting in settings if round_ % 2 else settings[::-1]:
                client = bed.clients[SWARM if setting == PLAIN else setting]
                replies = await ask(client, tasks, _extra(setting, tasks[0], f"{setting} {round_}"))
                told.add(tuple(reply.text for reply in replies))
                if round_ >= 0:
                    rates[setting].append(throughput(replies))
                    setup.say(f"{name} {round_}: {setting} {rates[setting][-1]:.1f} tokens/s")
            differ += len(told) > 1
    figure = Figure(f"{name}, {users} user{'s' if users > 1 else ''}", "tokens/s", rates)
    same = Verdict(f"{name}: all settings give the same answers", differ == 0, timed=False)
    return figure, Outcome(name, (figure,), (same,), commands=commands(launches))


async def copy(setup: Setup) -> Outcome:
    """Text that stands in the prompt."""
    figure, outcome = await _compare(setup, "copy", copy_task, kinds=SPEC_TYPES)
    return _held(outcome, figure, 2.5, 1.2)


async def shuffled(setup: Setup) -> Outcome:
    """Text whose lines stand in the prompt in another order."""
    figure, outcome = await _compare(setup, "shuffled copy", shuffled_task, kinds=SPEC_TYPES)
    return _held(outcome, figure, 2.5, 1.2)


async def prediction(setup: Setup) -> Outcome:
    """A prediction of which 90% are right."""
    figure, outcome = await _compare(setup, "prediction", predicted_task)
    return _held(outcome, figure, 3.0)


async def speckled(setup: Setup) -> Outcome:
    """A prediction of which every tenth token is wrong, at random."""
    _, outcome = await _compare(setup, "speckled prediction", speckled_task)
    return outcome


async def novel(setup: Setup) -> Outcome:
    """Text of which nothing was there before."""
    figure, outcome = await _compare(setup, "novel", novel_task)
    return _held(outcome, figure, 0.97)


async def users(setup: Setup) -> Outcome:
    """The same for eight users."""
    figure, outcome = await _compare(setup, "novel", novel_task, users=USERS)
    return _held(outcome, figure, 0.97)


def _held(outcome: Outcome, figure: Figure, plain: float, others: float = 0.0) -> Outcome:
    """`outcome` with what is wanted of swarmcpp: times its own plain decoding, and times the best of llama-server's."""
    verdicts = [*outcome.verdicts, at_least(f"{figure.name}, of plain decoding", figure.gain(SWARM, PLAIN), plain)]
    rivals = [setting for setting in figure.samples if setting.startswith(f"{LLAMA} ")]
    if rivals and others:
        best = max(rivals, key=figure.median)
        verdicts.append(at_least(f"{figure.name}, of {best}", figure.gain(SWARM, best), others))
    return replace(outcome, verdicts=tuple(verdicts))
