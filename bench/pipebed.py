"""What the scenarios of stages share: two boxes, both products on them, and bursts of streams in alternation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.load import BadReply, Client, Reply, common_prefix, random_prompt, throughput
from bench.netns import Namespace
from bench.nodes import Nodes, NodeSpec, cores
from bench.report import Figure, Verdict, at_least
from bench.rpc import BEST, RPC, Box, Rpc, Split, balanced
from bench.setting import LLAMA, SWARM, Setup
from swarmcpp.models.inspect import inspect

PROMPT = 8
ANSWER = 64
CTX = 256


@dataclass(frozen=True, slots=True)
class Case:
    """How both products are started."""

    boxes: tuple[Box, Box]
    slots: int
    ctx_size: int = CTX
    split: Split = BEST
    first: Callable[[Path], int] = balanced
    """How many layers the first box gets."""


@dataclass(frozen=True, slots=True)
class Sides:
    """What runs: a client for each setting, and the command lines."""

    clients: dict[str, Client]
    commands: dict[str, str]
    nodes: Nodes | None = None


def here() -> tuple[Box, Box]:
    """Two boxes on this machine's loopback."""
    first, second = cores(2)
    return Box(first), Box(second)


def apart(spaces: Sequence[Namespace]) -> tuple[Box, Box]:
    """Two boxes, each in a network of its own."""
    first, second = cores(2)
    return Box(first, spaces[0]), Box(second, spaces[1])


def stage(name: str, box: Box, case: Case, layers: tuple[int, int], *options: str) -> NodeSpec:
    """A node that runs a range of layers."""
    return NodeSpec(
        name,
        box.core,
        case.slots,
        case.ctx_size,
        box.space,
        ("--layers", f"{layers[0]}-{layers[1]}", *options),
        # It is ready when the others are, and they start after it.
        health="/health",
    )


async def two_stages(nodes: Nodes, case: Case, model: Path, *options: str) -> Client:
    """The first layers at A, which is asked, the others at B, as RPC has them."""
    n_layers, half = inspect(model).n_layers, case.first(model)
    await nodes.serve(stage("A", case.boxes[0], case, (0, half), *options), model)
    await nodes.join(stage("B", case.boxes[1], case, (half, n_layers), *options), model)
    await nodes.answers("A")
    return nodes.client("A", model)


async def both(stack: AsyncExitStack, setup: Setup, case: Case) -> Sides:
    """RPC and two stages, those that take part; they live as long as `stack`."""
    clients: dict[str, Client] = {}
    shown: dict[str, str] = {}
    nodes: Nodes | None = None
    if LLAMA in setup.sides:
        rpc = await stack.enter_async_context(
            Rpc(setup, case.boxes, slots=case.slots, ctx_size=case.ctx_size, split=case.split, first=case.first)
        )
        clients[RPC] = rpc.client
        shown |= rpc.commands
    if SWARM in setup.sides:
        nodes = await stack.enter_async_context(Nodes(setup))
        clients[SWARM] = await two_stages(nodes, case, setup.model)
        shown |= nodes.commands
    return Sides(clients, shown, nodes)


async def _together(client: Client, prompts: Sequence[list[int]], tokens: int) -> list[Reply]:
    replies = await client.together(prompts, tokens)
    if short := [reply.completion_tokens for reply in replies if reply.completion_tokens != tokens]:
        raise BadReply(f"{client.base_url} gave answers of {short} tokens, {tokens} were asked for")
    return replies


async def race(
    setup: Setup, sides: Sides, streams: int, title: str, count: Callable[[], int] | None = None
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Rates of all streams (tokens/s) and, with `count` (bytes so far), bytes a token, by setting and round; and the
    share of each answer that is the same from its start in both settings."""
    rates: dict[str, list[float]] = {name: [] for name in sides.clients}
    sizes: dict[str, list[float]] = {name: [] for name in sides.clients}
    shared: list[float] = []
    for round_ in range(-1, setup.repeats):
        rng = setup.rng(title, round_)
        prompts = [random_prompt(rng, PROMPT, setup.vocab) for _ in range(streams)]
        texts: list[list[str]] = []
        for name, client in sides.clients.items():
            before = count() if count else 0
            replies = await _together(client, prompts, ANSWER)
            rate, size = throughput(replies), ((count() if count else 0) - before) / (streams * ANSWER)
            texts.append([reply.text for reply in replies])
            setup.say(
                f"{title} {round_}: {name}: {rate:.1f} tokens/s" + (f", {size:.0f} bytes a token" if size else "")
            )
            # The first round warms up: page cache, learned costs.
            if round_ >= 0:
                rates[name].append(rate)
                sizes[name].append(size)
        if len(texts) == 2:
            shared += [common_prefix(a, b) / max(len(a), len(b), 1) for a, b in zip(*texts, strict=True)]
    return rates, sizes, shared


def over_rpc(setup: Setup, text: str, figure: Figure, wanted: float) -> tuple[Verdict, ...]:
    """The claim that swarmcpp is so many times better than RPC; none when one of them takes no part."""
    return (at_least(text, figure.gain(SWARM, RPC), wanted),) if {LLAMA, SWARM} <= set(setup.sides) else ()


def agreement_note(shared: Sequence[float]) -> tuple[str, ...]:
    """How far answers on random weights are the same."""
    if not shared:
        return ()
    same = sum(share == 1.0 for share in shared)
    return (
        f"random weights, which have near ties: {same} of {len(shared)} answers are the same in both, the median share "
        f"from the start is {statistics.median(shared):.2f}",
    )
