"""Scenario `decode`: tokens per second for one user and for eight."""

from __future__ import annotations

from collections.abc import Sequence

from bench.load import Client, Reply, random_prompt, throughput
from bench.report import Figure, Outcome, at_least
from bench.setting import LLAMA, SWARM, Bed, Setup, commands

USERS = 8
PROMPT_TOKENS = 32
ANSWER_TOKENS = 96
TARGET = 0.97


def time_per_token(reply: Reply) -> float:
    """Milliseconds between the first token and the last, per token; NaN for an answer of one token."""
    if reply.first is None or reply.completion_tokens < 2:
        return float("nan")
    return 1000 * (reply.moments[-1].at - reply.first) / (reply.completion_tokens - 1)


async def _burst(client: Client, prompts: Sequence[list[int]]) -> list[Reply]:
    replies = await client.together(prompts, ANSWER_TOKENS)
    short = [reply.completion_tokens for reply in replies if reply.completion_tokens != ANSWER_TOKENS]
    if short:
        raise RuntimeError(f"{client.base_url} gave answers of {short} tokens, {ANSWER_TOKENS} were asked for")
    return replies


async def decode(setup: Setup) -> Outcome:
    """Throughput (all tokens / wall time) with the servers' best flags, in alternation on the same prompts."""
    launches = setup.both(slots=USERS, ctx_size=1024)
    names = [launch.name for launch in launches]
    one: dict[str, list[float]] = {name: [] for name in names}
    eight: dict[str, list[float]] = {name: [] for name in names}
    ttft: dict[str, list[float]] = {name: [] for name in names}
    pace: dict[str, list[float]] = {name: [] for name in names}
    async with Bed(setup, launches) as bed:
        for round_ in range(-1, setup.repeats):
            rng = setup.rng("decode", round_)
            alone = random_prompt(rng, PROMPT_TOKENS, setup.vocab)
            prompts = [random_prompt(rng, PROMPT_TOKENS, setup.vocab) for _ in range(USERS)]
            for name in names:
                single = await _burst(bed.clients[name], [alone])
                replies = await _burst(bed.clients[name], prompts)
                if round_ < 0:
                    continue  # the first round warms both up: page cache, thread pools, learned costs
                one[name].append(throughput(single))
                eight[name].append(throughput(replies))
                ttft[name].append(1000 * single[0].ttft)
                pace[name].append(time_per_token(single[0]))
                setup.say(f"decode {round_}: {name} {one[name][-1]:.1f} and {eight[name][-1]:.1f} tokens/s")
        memory = {name: [bed.running[name].sample_rss() / 2**20] for name in names}
    figures = (
        Figure("1 user", "tokens/s", one),
        Figure(f"{USERS} users", "tokens/s", eight),
        Figure("1 user, after the first token", "ms/token", pace, "lower"),
        Figure(f"1 user, first token after {PROMPT_TOKENS}", "ms", ttft, "lower"),
        Figure("peak memory", "MiB", memory, "lower"),
    )
    verdicts = (
        tuple(at_least(f"decode, {figure.name}, of llama-server", figure.gain(SWARM), TARGET) for figure in figures[:2])
        if {LLAMA, SWARM} <= set(names)
        else ()
    )
    return Outcome("decode", figures, verdicts, commands=commands(launches))
