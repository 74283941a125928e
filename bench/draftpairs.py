"""Scenarios of a draft model, and of a model that guesses for itself without some of its layers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.alone import Alone
from bench.guesses import ANSWER, OFF, PLAIN, SHAPE, novel_task
from bench.load import Client, Prompt, Reply
from bench.report import Figure, Outcome, Verdict, at_least
from bench.sameness import HEROES, NAMES
from bench.servers import Launch, swarmcpp_server
from bench.setting import SWARM, Bed, Setup, commands
from swarmcpp.models.embedded import DRAFT, embedded_file

_BIG = replace(
    SHAPE, name="Qwen2.5-1.5B-shape that counts", n_layers=28, n_embd=1536, n_head=12, n_head_kv=2, n_ff=8960
)
_LITTLE = replace(SHAPE, name="draft that counts", n_layers=4, n_embd=256, n_head=4, n_head_kv=2, n_ff=1024)

TARGET = (_BIG, "qwen2.5-1.5b-counts-q8_0.gguf")
SMALL = (_LITTLE, "draft-counts-q8_0.gguf")
"""Shapes and files. It says the same as TARGET: both say the next id."""

STORIES = tuple(f"Once upon a time there was a {hero} named {name}." for hero, name in zip(HEROES, NAMES, strict=True))
CTX = 1024
GAMMA = 4
FORCED: Mapping[str, Any] = {"speculative": {"drafter": "draft", "gamma": GAMMA}}
SKIPPING = {"SWARMCPP_INFERENCE_SWIFT_SELF_SPECULATIVE": "true"}


def _server(setup: Setup, model: Path, *options: str, env: Mapping[str, str] | None = None) -> Launch:
    made = swarmcpp_server(model, slots=1, ctx_size=CTX, threads=setup.threads)
    return replace(made, argv=(*made.argv, *options), env={**made.env, **(env or {})})


async def _rates(
    setup: Setup, launch: Launch, rounds: Sequence[Sequence[Prompt]], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, list[float]], dict[str, list[Reply]], int]:
    """Tokens/s of one user by setting and round, after a first one that warms up; the replies, and in how many rounds
    answers differ."""
    rates: dict[str, list[float]] = {name: [] for name in settings}
    replies: dict[str, list[Reply]] = {name: [] for name in settings}
    differ = 0
    async with Bed(setup, [launch]) as bed:
        (client,) = bed.clients.values()
        for number, prompts in enumerate(rounds, -1):
            told = set()
            for name in list(settings) if number % 2 else list(settings)[::-1]:
                found = await _in_turn(client, prompts, {**settings[name], "cache_salt": f"{name} {number}"})
                told.add(tuple(reply.text for reply in found))
                if number >= 0:
                    rates[name].append(_rate(found))
                    replies[name] += found
                    setup.say(f"{launch.name} {number}: {name} {rates[name][-1]:.1f} tokens/s")
            differ += len(told) > 1
    return rates, replies, differ


async def _in_turn(client: Client, prompts: Sequence[Prompt], extra: Mapping[str, Any]) -> list[Reply]:
    return [await replace(client, extra=extra).complete(prompt, ANSWER) for prompt in prompts]


def _rate(replies: Sequence[Reply]) -> float:
    return sum(reply.completion_tokens for reply in replies) / sum(reply.finished - reply.started for reply in replies)


def _acceptance(replies: Sequence[Reply]) -> float:
    drafted = sum(reply.drafted for reply in replies)
    return sum(reply.accepted for reply in replies) / drafted if drafted else 0.0


async def pair(setup: Setup) -> Outcome:
    """A 1.5B shape and a small draft of one mind: what a draft that is always right brings."""
    target = await asyncio.to_thread(setup.synthetic, *TARGET)
    small = await asyncio.to_thread(setup.synthetic, *SMALL)
    launch = _server(setup, target, "--draft-model", str(small))
    rounds = [[novel_task(setup.rng("pair", number)).prompt] for number in range(-1, setup.repeats)]
    settings = {PLAIN: OFF, SWARM: {"speculative": {"drafter": "draft"}}}
    rates, replies, differ = await _rates(setup, launch, rounds, settings)
    figure = Figure("1.5B shape, a draft that agrees", "tokens/s", rates)
    verdicts = (
        Verdict("pair: both give the same answers", differ == 0, timed=False),
        at_least("pair: acceptance, of all", _acceptance(replies[SWARM]), 0.95),
        at_least("pair: speed, of plain decoding", figure.gain(SWARM, PLAIN), 1.0),
    )
    return Outcome("pair", (figure,), verdicts, commands=commands([launch]))


def _exact_acceptance(target: Path, draft: Path, prompts: Sequence[str]) -> float:
    """Of GAMMA guesses a pass, where every token is computed alone."""
    big, small = Alone(target, CTX), Alone(draft, CTX)
    drafted = accepted = 0
    for prompt in prompts:
        tokens = big.tokenize(prompt)
        end = len(tokens) + ANSWER
        tokens.append(big.best(tokens))
        while len(tokens) < end:
            guessed = list(tokens)
            for _ in range(min(GAMMA, end - len(tokens) - 1)):
                guessed.append(small.best(guessed))
            drafted += len(guessed) - len(tokens)
            for guess in guessed[len(tokens) :]:
                tokens.append(big.best(tokens))
                if tokens[-1] != guess:
                    break
                accepted += 1
            else:
                tokens.append(big.best(tokens))
    return accepted / drafted


async def guide(setup: Setup) -> Outcome:
    """The models of the package: the guide and its draft, at stories."""
    launch = _server(setup, embedded_file(), "--draft-model", DRAFT)
    rounds = [STORIES] * (1 + setup.repeats)
    settings = {PLAIN: OFF, SWARM: {"speculative": {"drafter": "draft"}}, f"{SWARM}, {GAMMA} each": FORCED}
    rates, replies, _ = await _rates(setup, launch, rounds, settings)
    found = _acceptance(replies[f"{SWARM}, {GAMMA} each"])
    exact = await asyncio.to_thread(_exact_acceptance, embedded_file(), embedded_file(DRAFT), STORIES)
    figure = Figure("guide and its draft", "tokens/s", rates)
    verdict = at_least(f"acceptance {found:.3f}, of the {exact:.3f} of exact arithmetic", found / exact, 0.95)
    return Outcome("guide", (figure,), (replace(verdict, timed=False),), commands=commands([launch]))


async def skip(setup: Setup) -> Outcome:
    """Models that guess for themselves without a band of their layers: the guide, and a 1.5B shape of which all layers
    but the head say nothing, the best case there is."""
    figures: list[Figure] = []
    notes: list[str] = []
    launches: list[Launch] = []
    target = await asyncio.to_thread(setup.synthetic, *TARGET)
    counted = [[novel_task(setup.rng("skip", number)).prompt] for number in range(-1, setup.repeats)]
    cases: tuple[tuple[str, Path, Sequence[Sequence[Prompt]]], ...] = (
        ("guide", embedded_file(), [STORIES] * (1 + setup.repeats)),
        (_BIG.name, target, counted),
    )
    settings: dict[str, Mapping[str, Any]] = {
        PLAIN: OFF,
        SWARM: {"speculative": {"drafter": "skip"}},
        f"{SWARM}, {GAMMA} each": {"speculative": {"drafter": "skip", "gamma": GAMMA}},
    }
    for name, model, rounds in cases:
        launch = _server(setup, model, env=SKIPPING)
        rates, replies, _ = await _rates(setup, launch, rounds, settings)
        figures.append(Figure(f"{name}, skipping layers", "tokens/s", rates))
        notes.append(f"{name}: acceptance {_acceptance(replies[f'{SWARM}, {GAMMA} each']):.3f} of {GAMMA} guesses each")
        launches.append(launch)
    return Outcome("skip", tuple(figures), (), tuple(notes), commands(launches))
