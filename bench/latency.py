"""Scenarios `stall` and `cancel`: what one user feels of another one's long prompt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from bench.load import Client, Watched, longest_pause, random_prompt
from bench.report import Figure, Outcome, Verdict, at_least
from bench.servers import Launch
from bench.setting import LLAMA, SWARM, Bed, Setup, commands

STALL_PROMPT = 4096
STALL_CTX = 8192
CANCEL_PROMPT = 2048
CANCEL_WAITING_PROMPT = 8
WARM_UP_PROMPT = 512
LLAMA_BATCHES = ((64, 64), (128, 128), (256, 256), (512, 512))
BUDGETS_MS = (100, 200, 400, 800, 1600)


async def _warm_up(client: Client, rng: random.Random, vocab: range, prompt_tokens: int) -> float:
    """One request of both kinds of work, so that nothing is measured cold; seconds of its prefill."""
    return (await client.complete(random_prompt(rng, prompt_tokens, vocab), 16)).ttft


async def measure_stall(client: Client, rng: random.Random, vocab: range) -> tuple[float, float]:
    """(longest pause of a streaming user in s, prefill rate of the long prompt in tokens/s)."""
    user = Watched(client, random_prompt(rng, 32, vocab), STALL_CTX - 64)
    try:
        await user.wait_events(8)
        sent = time.perf_counter()
        long = await client.complete(random_prompt(rng, STALL_PROMPT, vocab), 1)
        # The pause that the long prompt caused ends with the user's next token, which may follow its first token.
        await user.wait_events(len(user.times) + 2)
    finally:
        await user.leave()
    return longest_pause(user.times, sent, sent + long.ttft), STALL_PROMPT / long.ttft


def stall_launches(setup: Setup) -> list[Launch]:
    """Every setting of the stall scenario, llama-server's defaults first."""
    batches = () if setup.quick else LLAMA_BATCHES
    budgets = BUDGETS_MS[-1:] if setup.quick else BUDGETS_MS
    launches: list[Launch] = []
    if LLAMA in setup.sides:
        launches += [setup.llama(2, STALL_CTX, batch) for batch in (None, *batches)]
    if SWARM in setup.sides:
        launches += [setup.swarm(2, STALL_CTX, budget) for budget in (None, *budgets)]
    return launches


async def stall(setup: Setup) -> Outcome:
    """A long prompt arrives while a user's answer streams. A fresh server for every measurement."""
    launches = stall_launches(setup)
    pauses: dict[str, list[float]] = {launch.name: [] for launch in launches}
    rates: dict[str, list[float]] = {launch.name: [] for launch in launches}
    for round_ in range(setup.repeats):
        for launch in launches:
            rng = setup.rng("stall", round_)
            async with Bed(setup, [launch]) as bed:
                client = bed.clients[launch.name]
                await _warm_up(client, rng, setup.vocab, WARM_UP_PROMPT)
                pause, rate = await measure_stall(client, rng, setup.vocab)
            pauses[launch.name].append(pause)
            rates[launch.name].append(rate)
            setup.say(f"stall {round_}: {launch.name}: pause {pause:.2f} s, prefill {rate:.0f} tokens/s")
    pause_figure = Figure("longest pause", "s", pauses, "lower")
    rate_figure = Figure("prefill of the long prompt", "tokens/s", rates)
    verdicts = stall_verdicts(pause_figure, rate_figure) if {LLAMA, SWARM} <= set(pauses) else ()
    notes = best_batch_note(pause_figure, rate_figure) if LLAMA in pauses else ()
    return Outcome("stall", (pause_figure, rate_figure), verdicts, notes, commands(launches))


def best_batch_note(pause: Figure, rate: Figure) -> tuple[str, ...]:
    """llama-server's -b with the shortest pause among those that keep 0.92 of its default prefill rate."""
    tuned = [name for name in pause.samples if name.startswith(f"{LLAMA} ") and rate.gain(name) >= 0.92]
    if not tuned:
        return ("no -b of llama-server keeps 0.92 of its default prefill rate",)
    best = min(tuned, key=pause.median)
    ours = (
        f"; {SWARM} by default pauses {pause.gain(SWARM, over=best):.1f} times less" if SWARM in pause.samples else ""
    )
    return (f"best of llama-server at >= 0.92 of its prefill rate: {best}, {pause.median(best):.2f} s{ours}",)


def stall_verdicts(pause: Figure, rate: Figure) -> tuple[Verdict, ...]:
    """The claims on the defaults, and on the best larger budget."""
    larger = [name for name in pause.samples if name.startswith(f"{SWARM} ") and rate.gain(name) >= 0.92]
    best = max(larger, key=pause.gain, default=None)
    curve = (
        at_least(f"longest pause shorter at >= 0.92 of the prefill rate ({best})", pause.gain(best), 10)
        if best
        else Verdict("no budget reaches 0.92 of llama-server's prefill rate", False)
    )
    return (
        at_least("longest pause shorter, defaults", pause.gain(SWARM), 20),
        at_least("prefill rate of llama-server, defaults", rate.gain(SWARM), 0.8),
        curve,
    )


async def measure_cancel(client: Client, rng: random.Random, vocab: range, after: float) -> float:
    """Seconds from disconnecting a long prompt, `after` seconds into it, to the waiting request's first token."""
    long = Watched(client, random_prompt(rng, CANCEL_PROMPT, vocab), 16)
    started = time.perf_counter()
    # Sent only once the long prompt surely holds the one slot, so that it waits and never goes first.
    await asyncio.sleep(min(0.2, after / 2))
    waiting = asyncio.create_task(client.complete(random_prompt(rng, CANCEL_WAITING_PROMPT, vocab), 4))
    await asyncio.sleep(max(0.0, started + after - time.perf_counter()))
    if long.task.done() or long.times:
        raise RuntimeError(f"the prefill of {CANCEL_PROMPT} tokens was over before {after:.1f} s; nothing to cancel")
    left = await long.leave()
    reply = await waiting
    if reply.first is None:
        raise RuntimeError(f"{client.base_url} answered the waiting request with nothing")
    return reply.first - left


def cancel_fractions(repeats: int) -> Sequence[float]:
    """Where in the prefill each round disconnects: spread evenly, as clients leave at no special moment."""
    return [(index + 0.5) / repeats for index in range(repeats)]


async def cancel(setup: Setup) -> Outcome:
    """A client leaves in mid-prefill while another waits for the only slot."""
    launches = setup.both(slots=1, ctx_size=4096)
    waits: dict[str, list[float]] = {launch.name: [] for launch in launches}
    async with Bed(setup, launches) as bed:
        whole = {
            name: await _warm_up(client, setup.rng("cancel", -1), setup.vocab, CANCEL_PROMPT)
            for name, client in bed.clients.items()
        }
        for round_, fraction in enumerate(cancel_fractions(setup.repeats)):
            for name, client in bed.clients.items():
                # 0.7: a prefill that happens to run faster than the one that was timed must not be over by then.
                after = 0.7 * fraction * whole[name]
                waits[name].append(await measure_cancel(client, setup.rng("cancel", round_), setup.vocab, after))
                setup.say(
                    f"cancel {round_}: {name}, left after {after:.1f} s: {waits[name][-1]:.3f} s to the next token"
                )
    figure = Figure("from disconnect to the next first token", "s", waits, "lower")
    verdicts = (
        (at_least("the waiting request's first token comes sooner", figure.gain(SWARM), 20),)
        if {LLAMA, SWARM} <= set(waits)
        else ()
    )
    return Outcome("cancel", (figure,), verdicts, commands=commands(launches))
