"""Scenarios `agreement` and `beside`: the same greedy tokens from both servers, and alone as under load."""

from __future__ import annotations

from collections.abc import Sequence

from bench.load import common_prefix, random_prompt
from bench.report import Figure, Outcome, Verdict
from bench.setting import LLAMA, SWARM, Bed, Setup, commands

PROMPTS = 8
ANSWER_TOKENS = 64
SHORT_PROMPTS = tuple(16 + 13 * index for index in range(PROMPTS))
"""With the answers below 512 tokens; on both sides of 64, where ggml's attention changes kernels."""
LONG_PROMPTS = tuple(500 + 29 * index for index in range(PROMPTS))
STORY_START = "Once upon a time"
STORY_TOKENS = 100
STORY_CTX = 512


async def _stories(setup: Setup) -> dict[str, str]:
    """The greedy story by server: text of STORY_TOKENS tokens."""
    texts: dict[str, str] = {}
    async with Bed(setup, setup.both(slots=1, ctx_size=STORY_CTX, model=setup.stories)) as bed:
        for name, client in bed.clients.items():
            texts[name] = (await client.complete(STORY_START, STORY_TOKENS)).text
    return texts


async def agreement(setup: Setup) -> Outcome:
    """Greedy answers of both servers to the same prompts.

    Random weights have near ties that a different order of the same sums may decide otherwise, so on them the share
    that agrees is only reported. The claim is on a trained model: 100 greedy tokens of a story are the same text.
    """
    launches = setup.both(slots=1, ctx_size=1024)
    rng = setup.rng("agreement", 0)
    prompts = [random_prompt(rng, length, setup.vocab) for length in SHORT_PROMPTS]
    texts: dict[str, list[str]] = {}
    async with Bed(setup, launches) as bed:
        for name, client in bed.clients.items():
            texts[name] = [(await client.complete(prompt, ANSWER_TOKENS)).text for prompt in prompts]
    figures: tuple[Figure, ...] = ()
    if {LLAMA, SWARM} <= set(texts):
        pairs = list(zip(texts[LLAMA], texts[SWARM], strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        shared = [common_prefix(a, b) / max(len(a), len(b), 1) for a, b in pairs]
        figures = (
            Figure("random weights, same answers", "share", {SWARM: [same]}),
            Figure("random weights, same from the start", "share", {SWARM: shared}),
        )
    if setup.stories is None:
        return Outcome("agreement", figures, notes=("no trained model: SWARMCPP_STORIES names none",))
    stories = await _stories(setup)
    notes = tuple(f"{name}: {text[:60]!r} ... {len(text)} characters" for name, text in stories.items())
    verdicts: tuple[Verdict, ...] = ()
    if len(stories) == 2:
        verdicts = (
            Verdict(
                f"{setup.stories.name}, {STORY_TOKENS} greedy tokens: the same text as llama-server "
                f"(shared: {common_prefix(*stories.values())} characters)",
                stories[LLAMA] == stories[SWARM] != "",
                timed=False,
            ),
        )
    return Outcome("agreement", figures, verdicts, notes, commands(launches))


async def _answers(setup: Setup, name: str, prompts: Sequence[list[int]], *, together: bool) -> list[str]:
    """Greedy answers of a fresh server, so that no cache of the other pass can answer."""
    launch = next(launch for launch in setup.both(slots=PROMPTS, ctx_size=1024) if launch.name == name)
    async with Bed(setup, [launch]) as bed:
        client = bed.clients[name]
        if together:
            return [reply.text for reply in await client.together(prompts, ANSWER_TOKENS)]
        return [(await client.complete(prompt, ANSWER_TOKENS)).text for prompt in prompts]


async def _unchanged(setup: Setup, name: str, lengths: Sequence[int], round_: int) -> tuple[float, str]:
    """(share of answers that are the same alone and together, a line that says which prompts' are not)."""
    rng = setup.rng(f"beside {lengths[0]}", round_)
    prompts = [random_prompt(rng, length, setup.vocab) for length in lengths]
    alone = await _answers(setup, name, prompts, together=False)
    crowd = await _answers(setup, name, prompts, together=True)
    changed = [length for length, a, b in zip(lengths, alone, crowd, strict=True) if a != b]
    line = f"{name}, round {round_}: changed are the answers to prompts of {changed or 'no'} tokens, of {list(lengths)}"
    setup.say(line)
    return 1 - len(changed) / len(lengths), line


async def beside(setup: Setup) -> Outcome:
    """Greedy answers alone against the answers to the same prompts beside seven others.

    Beyond 512 tokens of context ggml sums a lone sequence's attention in another order than that of several, so
    there the share is reported and nothing is claimed.
    """
    launches = setup.both(slots=PROMPTS, ctx_size=1024)
    short: dict[str, list[float]] = {launch.name: [] for launch in launches}
    long: dict[str, list[float]] = {launch.name: [] for launch in launches}
    notes: list[str] = []
    for round_ in range(1 if setup.quick else min(3, setup.repeats)):
        for name in short:
            for found, lengths in ((short, SHORT_PROMPTS), (long, LONG_PROMPTS)):
                if found is long and (setup.quick or round_):
                    continue
                share, line = await _unchanged(setup, name, lengths, round_)
                found[name].append(share)
                notes.append(line)
    verdicts = (
        (Verdict("swarmcpp: every answer beside 7 others is the answer alone", min(short[SWARM]) == 1.0, timed=False),)
        if SWARM in short
        else ()
    )
    figures = [Figure("answers unchanged by 7 others", "share", short)]
    if any(long.values()):
        figures.append(Figure("the same, beyond 512 tokens of context", "share", long))
    return Outcome("beside", tuple(figures), verdicts, tuple(notes), commands(launches))
