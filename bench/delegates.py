"""Scenarios of a swarm whose nodes work for one another: a request sent on, many users on two replicas, a node killed.

Where a request shall certainly be sent on, it is asked at a gateway: a node that serves a small model of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import aiohttp

from bench.load import Client, Reply, Watched, common_prefix, longest_pause, random_prompt, throughput
from bench.nodes import Nodes, NodeSpec, cores
from bench.proxy import DelayProxy
from bench.report import Figure, Outcome, Verdict, at_least
from bench.setting import SWARM, Bed, Setup, commands
from swarmcpp.models.synthetic import TINY, write_model

GATEWAY = "gateway"
DIRECT, DELEGATED = "asked directly", "through another node"

REMOTE_PROMPT = 129
"""Two blocks, which are warm when it is asked again, and one token, which is always computed."""

REMOTE_TOKENS = 48
PAIRS = 4
"""Questions at each side in one round; single times to the first token scatter by more than the limit."""

RTT_S = 0.005
ROUND_TRIPS = 48
CHAPTER_RATIO = 1.93
"""One remote generate over a round trip for each token at 5 ms, in SwarmLLM's performance chapter."""

USERS = 8
USER_PROMPT = 512
USER_TOKENS = 64

KILLS = 50
QUICK_KILLS = 5
KILL_TOKENS = 200
SEAM = 8
"""Characters after the seam in which a token that is lost or repeated shows."""

OPENINGS = ("The dog ran to the big tree", "Tom saw a tree", "Mia went to the tree", "Sue saw a tree")
"""Beginnings whose 500 greedy tokens come past no near tie, the best two tokens never nearer than 0.016: what one node
computed token by token the next one computes in chunks, and unquantised weights round differently then."""


def gateway_model(setup: Setup) -> Path:
    """A model that computes nothing to speak of."""
    path = setup.out / "gateway-q8_0.gguf"
    return path if path.is_file() else write_model(path, TINY, quant="Q8_0", seed=0, tokenizer="bytes")


def decode_rate(reply: Reply) -> float:
    """Tokens/s after the first event of an answer."""
    return (reply.completion_tokens - 1) / (reply.finished - reply.started - reply.ttft)


# -- one request -------------------------------------------------------------------------------------------------------


async def remote(setup: Setup) -> Outcome:
    """The same warm prompt at the node that has the model, and at one that has to send it there, over loopback."""
    core_a, core_b = cores(2)
    rates: dict[str, list[float]] = {DIRECT: [], DELEGATED: []}
    times: dict[str, list[float]] = {DIRECT: [], DELEGATED: []}
    added: list[float] = []
    trips: list[float] = []
    steps: list[float] = []
    async with Nodes(setup) as nodes:
        await nodes.serve(NodeSpec("B", core_b, 1, 512), setup.model)
        await nodes.serve(NodeSpec(GATEWAY, core_a, 1, 512), gateway_model(setup))
        await nodes.settled()
        sides = {DIRECT: nodes.client("B", setup.model), DELEGATED: nodes.client(GATEWAY, setup.model)}
        for round_ in range(setup.repeats):
            prompt = random_prompt(setup.rng("remote", round_), REMOTE_PROMPT, setup.vocab)
            replies = await _alternate(sides, prompt)
            for name, answers in replies.items():
                rates[name].append(statistics.median(decode_rate(reply) for reply in answers))
                times[name].append(1000 * statistics.median(reply.ttft for reply in answers))
            added.append(times[DELEGATED][-1] - times[DIRECT][-1])
            steps.append(1000 / rates[DIRECT][-1])
            trips.append(await _per_token(setup, nodes, prompt, round_))
            setup.say(
                f"remote {round_}: {rates[DIRECT][-1]:.2f} and {rates[DELEGATED][-1]:.2f} tokens/s, "
                f"first token +{added[-1]:.1f} ms, {trips[-1]:.1f} ms a round trip and token"
            )
        routes, shown = nodes.routes(GATEWAY), dict(nodes.commands)
    figures = (
        Figure("decode", "tokens/s", rates),
        Figure("first token, warm", "ms", times, "lower"),
        Figure("added to the first token", "ms", {DELEGATED: added}, "lower"),
        Figure(f"a token by a request of its own, {1000 * RTT_S:g} ms round trip", "ms", {SWARM: trips}, "lower"),
    )
    more = figures[2].median(DELEGATED)
    verdicts = (
        at_least("decode rate through another node", figures[0].gain(DELEGATED), 0.97),
        Verdict(f"added to the first token: {more:.1f} ms, wanted < 5 ms", more < 5.0),
        Verdict("every answer of the gateway came from B", set(routes) == {"peer B"}, timed=False),
    )
    rate, step = figures[0].median(DELEGATED), statistics.median(steps)
    notes = (
        f"against a request for each token, measured: {rate * figures[3].median(SWARM) / 1000:.2f}x; against a step and"
        f" {1000 * RTT_S:g} ms, computed: {rate * (step / 1000 + RTT_S):.2f}x (SwarmLLM's chapter: {CHAPTER_RATIO}x)",
    )
    return Outcome("remote", figures, verdicts, notes, shown)


async def _alternate(sides: dict[str, Client], prompt: Sequence[int]) -> dict[str, list[Reply]]:
    """PAIRS answers of each side to a prompt that is warm by then."""
    found: dict[str, list[Reply]] = {name: [] for name in sides}
    for pair in range(-1, PAIRS):
        for name, client in sides.items():
            reply = await client.complete(prompt, REMOTE_TOKENS)
            if pair >= 0:
                found[name].append(reply)
    return found


async def _per_token(setup: Setup, nodes: Nodes, prompt: Sequence[int], round_: int) -> float:
    """Milliseconds a token when each is a request of its own to B, over one kept connection that takes RTT_S.

    Each is a prompt whose blocks are warm and whose last token is new, so that it costs one step like that of a decode.
    These tokens are drawn, not generated: they cost the same, and the text of an answer does not tell them.
    """
    direct = nodes.client("B", setup.model)
    tokens = random_prompt(setup.rng("per token", round_), ROUND_TRIPS, setup.vocab)
    port = int(direct.base_url.rpartition(":")[2])
    async with DelayProxy("127.0.0.1", port, RTT_S / 2) as proxy, aiohttp.ClientSession() as session:
        client = replace(direct, session=session, base_url=f"http://127.0.0.1:{proxy.port}")
        await client.complete(prompt, 1)
        begun = time.perf_counter()
        for token in tokens:
            await client.complete([*prompt[:-1], token], 1)
        return 1000 * (time.perf_counter() - begun) / ROUND_TRIPS


# -- many requests -----------------------------------------------------------------------------------------------------


async def replicas(setup: Setup) -> Outcome:
    """Eight users with prompts of their own: two replicas of a core each, all asked at A, against one replica."""
    core_a, core_b = cores(2)
    alone = "one replica"
    both = "two replicas"
    ctx_size = USER_PROMPT + USER_TOKENS + 64
    single = replace(replace(setup, threads=1).swarm(slots=USERS, ctx_size=ctx_size), name=alone, cpus=(core_a,))
    rates: dict[str, list[float]] = {alone: [], both: []}
    async with AsyncExitStack() as stack:
        bed = await stack.enter_async_context(Bed(setup, [single]))
        nodes = await stack.enter_async_context(Nodes(setup))
        await nodes.serve(NodeSpec("A", core_a, USERS, ctx_size), setup.model)
        await nodes.join(NodeSpec("B", core_b, USERS, ctx_size), setup.model)
        await nodes.settled()
        sides = {alone: bed.clients[alone], both: nodes.client("A", setup.model)}
        for round_ in range(-1, setup.repeats):
            rng = setup.rng("replicas", round_)
            prompts = [random_prompt(rng, USER_PROMPT, setup.vocab) for _ in range(USERS)]
            for name, client in sides.items():
                rate = throughput(await client.together(prompts, USER_TOKENS))
                setup.say(f"replicas {round_}: {name}: {rate:.1f} tokens/s")
                # The first round teaches the nodes their rates.
                if round_ >= 0:
                    rates[name].append(rate)
        routes = nodes.routes("A")
        shown = {**commands([single]), **nodes.commands}
    figure = Figure(f"{USERS} users, answer tokens / wall time", "tokens/s", rates)
    ways = ", ".join(f"{routes.count(route)} {route}" for route in sorted(set(routes)))
    verdict = at_least("two replicas of one core each against one", figure.gain(both), 1.8)
    return Outcome("replicas", (figure,), (verdict,), (f"answers of A by route, all rounds: {ways}",), shown)


# -- kill --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kill:
    """One round: whether the text was what it would have been, and what the user and the machine noticed."""

    same: bool
    seamless: bool
    """Up to where it went on elsewhere and a little further, the text is what it would have been. Behind that, a near
    tie may have been decided otherwise: what is replayed is computed in chunks, and rounded differently."""
    in_time: bool
    """The answer was not over yet."""
    pause_s: float
    step_s: float
    left: int
    detail: str


async def kill(setup: Setup) -> Outcome:
    """kill -9 of whichever of two replicas generates for the gateway, at a random token, on a real small model."""
    if setup.stories is None:
        return Outcome("kill", notes=("skipped: set SWARMCPP_STORIES to stories260K.gguf",))
    core_a, core_b = cores(2)
    model = setup.stories
    specs = {
        "B": NodeSpec("B", core_b, 2, 512),
        "C": NodeSpec("C", core_a, 2, 512),
        GATEWAY: NodeSpec(GATEWAY, core_a, 2, 512),
    }
    found: list[_Kill] = []
    async with Nodes(setup) as nodes:
        await nodes.serve(specs["B"], model)
        await nodes.join(specs["C"], model)
        await nodes.serve(specs[GATEWAY], gateway_model(setup))
        await nodes.settled()
        for round_ in range(QUICK_KILLS if setup.quick else KILLS):
            kill_, victim = await _killed(setup, nodes, model, round_)
            found.append(kill_)
            setup.say(f"kill {round_}: {victim}: pause {1000 * kill_.pause_s:.0f} ms{kill_.detail}")
            await nodes.serve(specs[victim], model)
            await nodes.settled()
        shown = dict(nodes.commands)
    right = sum(each.same for each in found)
    whole = sum(each.seamless for each in found)
    left = sum(each.left for each in found)
    pauses = [1000 * each.pause_s for each in found]
    steps = [1000 * each.step_s for each in found]
    figures = (Figure("longest pause of an answer", "ms", {"undisturbed": steps, "node killed": pauses}, "lower"),)
    early = sum(each.in_time for each in found)
    verdicts = (
        Verdict(f"nodes killed before the answer was over: {early} of {len(found)}", early == len(found), False),
        Verdict(
            f"answers with nothing lost or repeated where they went on: {whole} of {len(found)}",
            whole == len(found),
            False,
        ),
        Verdict(f"texts that are what they would have been: {right} of {len(found)}", right == len(found), False),
        Verdict(f"processes that outlived their node: {left}, wanted 0", left == 0, False),
    )
    return Outcome("kill", figures, verdicts, (f"longest pause of all: {max(pauses):.0f} ms",), shown)


async def _killed(setup: Setup, nodes: Nodes, model: Path, round_: int) -> tuple[_Kill, str]:
    """One answer undisturbed, then again with its node killed; that node's name. The killed node is down after."""
    rng = setup.rng("kill", round_)
    prompt = rng.choice(OPENINGS)
    client = nodes.client(GATEWAY, model)
    calm = await client.complete(prompt, KILL_TOKENS)
    watched = Watched(client, prompt, KILL_TOKENS)
    await watched.wait_events(rng.randrange(1, max(2, len(calm.moments) // 2)))
    victim = nodes.routes(GATEWAY)[-1].removeprefix("peer ")
    in_time = not watched.task.done()
    left = await nodes.kill(victim)
    reply = await watched.task
    same = reply.text == calm.text and reply.completion_tokens == calm.completion_tokens
    shared, seam = common_prefix(reply.text, calm.text), _seam(reply)
    detail = f", after {seam} characters" + ("" if same else f"; the text differs after {shared} of {len(calm.text)}")
    return _Kill(same, same or shared >= seam + SEAM, in_time, _pause(reply), _pause(calm), left, detail), victim


def _seam(reply: Reply) -> int:
    """Characters before the longest pause of an answer."""
    gaps = [after.at - before.at for before, after in pairwise(reply.moments)]
    before = reply.moments[: gaps.index(max(gaps)) + 1] if gaps else reply.moments
    return sum(len(moment.text) for moment in before)


def _pause(reply: Reply) -> float:
    return longest_pause([moment.at for moment in reply.moments], reply.started, reply.finished)
