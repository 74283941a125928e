"""Scenarios of a model whose layers several nodes share: the memory of a small node, and stages that are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.delegates import OPENINGS
from bench.load import Client, Prompt, Reply, Watched, longest_pause, random_prompt
from bench.nodes import Nodes, NodeSpec
from bench.pipebed import Case, here, stage
from bench.report import Figure, Outcome, Verdict, at_least
from bench.rpc import RPC, Rpc
from bench.setting import LLAMA, SWARM, Setup
from swarmcpp.models.capacity import estimate_memory, stage_memory
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.synthetic import QWEN25_14B

MEMORY_CTX = 2048
MEMORY_SLOTS = 2
SMALL, LARGE = 0.40, 0.65
"""Of the memory that the whole model needs: what the node that joins has, and what the first one has."""
MEMORY_LIMIT = 1.1

KILLS = 100
QUICK_KILLS = 6
KILL_CTX = 512
KILL_TOKENS = 200
LONG_KILLS = 8
LONG_KILL_PROMPT = 1000
"""Beyond 512 tokens of context attention rounds differently alone and beside others, so on random weights texts may
change behind near ties, with a kill or without."""
LONG_KILL_CTX = 1280
LONG_KILL_TOKENS = 64
STREAMS = 4


# -- memory ------------------------------------------------------------------------------------------------------------


async def memory(setup: Setup) -> Outcome:
    """A node with 40% of the memory that a 14B model needs joins one that has 65%: what it takes, at its peak.

    Counted is what is resident of its two processes together, code and libraries too, against the slice's file and the
    KV of its layers for all slots.
    """
    path = setup.synthetic(QWEN25_14B, "qwen2.5-14b-shape-q4_0.gguf", "Q4_0")
    model = inspect(path)
    need = estimate_memory(model, MEMORY_CTX, MEMORY_SLOTS).total
    first, second = here()
    prompt = random_prompt(setup.rng("memory", 0), MEMORY_CTX // 2, range(1000, QWEN25_14B.n_vocab))
    async with Nodes(setup) as nodes:
        specs = {
            name: NodeSpec(
                name, box.core, MEMORY_SLOTS, MEMORY_CTX, None, ("--memory", str(round(share * need))), health="/health"
            )
            for name, box, share in (("A", first, LARGE), ("B", second, SMALL))
        }
        await nodes.serve(specs["A"], path)
        await nodes.join(specs["B"], path)
        await nodes.answers("A")
        # Every buffer has been used once.
        await nodes.client("A", path).complete(prompt, 8)
        row = (await nodes.rows("A"))["B"]
        layers = (row.first_layer, row.last_layer)
        taken = nodes.peak_rss("B")
        slice_file = _slice_bytes(nodes, "B", layers)
        shown = dict(nodes.commands)
    return _memory_outcome(model, layers, need, taken, slice_file, shown)


def _slice_bytes(nodes: Nodes, name: str, layers: tuple[int, int]) -> int:
    """Size of the slice that a node made of its layers."""
    found = list((nodes.data(name) / "slices").glob(f"*-{layers[0]}-{layers[1]}-*.gguf"))
    if len(found) != 1:
        raise RuntimeError(f"node {name} has {len(found)} slices of layers {layers[0]}-{layers[1]}, not one")
    return found[0].stat().st_size


def _memory_outcome(
    model: ModelFile, layers: tuple[int, int], need: int, taken: int, slice_file: int, shown: dict[str, str]
) -> Outcome:
    kv = stage_memory(model, *layers, MEMORY_CTX, MEMORY_SLOTS).kv
    sizes = {"slice and KV": [(slice_file + kv) / 2**20], SWARM: [taken / 2**20]}
    figure = Figure("resident, node and engine", "MiB", sizes, "lower")
    share = taken / (slice_file + kv)
    verdict = Verdict(f"resident / (slice + KV): {share:.3f}, wanted <= {MEMORY_LIMIT}", share <= MEMORY_LIMIT, False)
    note = (
        f"the model needs {need / 2**20:.0f} MiB with {MEMORY_SLOTS} slots of {MEMORY_CTX} tokens; the node may use "
        f"{SMALL * need / 2**20:.0f} MiB and has layers {layers[0]}-{layers[1]} of {model.n_layers}"
    )
    return Outcome("memory", (figure,), (verdict,), (note,), shown)


# -- kill --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """What is asked while stages are killed. `prompts` are of one round; each gets an answer of `tokens` tokens."""

    title: str
    model: Path
    kills: int
    tokens: int
    ctx_size: int = KILL_CTX


@dataclass(frozen=True, slots=True)
class _Kill:
    """One round: streams whose text changed, streams that still ran, the longest pause of any."""

    changed: int
    running: int
    pause_s: float
    left: int


async def kill(setup: Setup) -> Outcome:
    """kill -9 of a stage's node or engine at a random token, four streams, on a real small model."""
    if setup.stories is None:
        return Outcome("kill", notes=("skipped: set SWARMCPP_STORIES to stories260K.gguf",))
    case = _Case("kill", setup.stories, QUICK_KILLS if setup.quick else KILLS, KILL_TOKENS)
    return await _killed(setup, case, exact=True)


async def recover(setup: Setup) -> Outcome:
    """The same with longer prompts on a model of random weights, where texts may differ behind near ties."""
    kills = 1 if setup.quick else LONG_KILLS
    return await _killed(setup, _Case("recover", setup.model, kills, LONG_KILL_TOKENS, LONG_KILL_CTX), exact=False)


def _prompts(setup: Setup, case: _Case, round_: int, *, exact: bool) -> Sequence[Prompt]:
    if exact:
        return OPENINGS[:STREAMS]
    rng = setup.rng(case.title, round_)
    return [random_prompt(rng, LONG_KILL_PROMPT, setup.vocab) for _ in range(STREAMS)]


async def _killed(setup: Setup, case: _Case, *, exact: bool) -> Outcome:
    """Three nodes, of which two have the same layers; one of these is killed in every round."""
    first, second = here()
    half, n_layers = inspect(case.model).n_layers // 2, inspect(case.model).n_layers
    common = Case((first, second), STREAMS, case.ctx_size)
    rear = {name: stage(name, second, common, (half, n_layers)) for name in ("B", "C")}
    found: list[_Kill] = []
    calm: list[float] = []
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(Nodes(setup))
        await nodes.serve(stage("A", first, common, (0, half), "-vv"), case.model)
        for name, spec in rear.items():
            await nodes.join(spec, case.model)
            await nodes.sees_layers("A", name, (half, n_layers))
        await nodes.answers("A")
        client = nodes.client("A", case.model)
        for round_ in range(case.kills):
            rng = setup.rng(f"{case.title} moment", round_)
            prompts = _prompts(setup, case, round_, exact=exact)
            if exact:
                # These prompts are the same in every round.
                undisturbed = await client.together(prompts, case.tokens)
                blow = await _strike(nodes, client, prompts, [reply.completion_tokens for reply in undisturbed], rng)
            else:
                # Before anything was stored of them.
                blow = await _strike(nodes, client, prompts, [case.tokens] * len(prompts), rng)
                undisturbed = await client.together(prompts, case.tokens)
            calm.append(max(_pause(reply, _all_began(undisturbed)) for reply in undisturbed))
            kill_, victim = blow.outcome(undisturbed), blow.victim
            found.append(kill_)
            setup.say(
                f"{case.title} {round_}: {victim}: pause {1000 * kill_.pause_s:.0f} ms (undisturbed "
                f"{1000 * calm[-1]:.0f}), {kill_.changed} of {kill_.running} texts changed"
            )
            if victim in rear:
                await nodes.join(rear[victim], case.model)
            await nodes.answers(victim.split()[0])
            await nodes.sees_layers("A", victim.split()[0], (half, n_layers))
        moved = nodes.log("A").read_text(errors="replace").count("DIAG: pipeline failover")
        shown = dict(nodes.commands)
    again = await _rpc_again(setup, case, exact=exact) if LLAMA in setup.sides else []
    return _kill_outcome(case, found, calm, again, moved, shown, exact=exact)


@dataclass(frozen=True, slots=True)
class _Blow:
    """Who was killed, and what the streams gave all the same."""

    victim: str
    replies: list[Reply]
    running: int
    at: float
    left: int

    def outcome(self, undisturbed: Sequence[Reply]) -> _Kill:
        pairs = zip(self.replies, undisturbed, strict=True)
        changed = sum(a.text != b.text or a.completion_tokens != b.completion_tokens for a, b in pairs)
        return _Kill(changed, self.running, max(_pause(reply, self.at) for reply in self.replies), self.left)


async def _strike(
    nodes: Nodes, client: Client, prompts: Sequence[Prompt], tokens: Sequence[int], rng: random.Random
) -> _Blow:
    """Kill a node of the rear stage, or its engine, at a random event of the first stream, once all have begun."""
    streams = [Watched(client, prompt, count) for prompt, count in zip(prompts, tokens, strict=True)]
    for stream in streams:
        # While prompts are read, others wait for that too.
        await stream.wait_events(1)
    await streams[0].wait_events(rng.randrange(1, max(2, tokens[0] // 2)))
    name, left, killed = rng.choice("BC"), 0, time.perf_counter()
    running = sum(not stream.task.done() for stream in streams)
    if whole := rng.random() < 0.5:
        left = await nodes.kill(name)
    else:
        nodes.kill_engine(name)
    replies = [await stream.task for stream in streams]
    return _Blow(name if whole else f"{name} engine", replies, running, killed, left)


def _pause(reply: Reply, since: float) -> float:
    """The longest time between two tokens, seconds, of which some is after `since`."""
    return longest_pause([moment.at for moment in reply.moments], since, reply.finished)


def _all_began(replies: Sequence[Reply]) -> float:
    """When all had their first token."""
    return max(reply.moments[0].at for reply in replies)


async def _rpc_again(setup: Setup, case: _Case, *, exact: bool) -> list[float]:
    """Seconds until RPC has given each stream its next token when both programs have to be started again.

    Counted from the start of the new worker on: that a user has to notice first is not.
    """
    own = replace(setup, model=case.model)
    took: list[float] = []
    for round_ in range(setup.repeats):
        prompts: Sequence[Prompt] = _prompts(setup, case, round_, exact=exact)
        half = case.tokens // 2
        async with Rpc(own, here(), slots=STREAMS, ctx_size=case.ctx_size) as rpc:
            said = [reply.text for reply in await rpc.client.together(prompts, half)]
        rng = setup.rng(f"{case.title} rpc", round_)
        prompts = [
            prompt + text if isinstance(prompt, str) else [*prompt, *random_prompt(rng, half, setup.vocab)]
            for prompt, text in zip(prompts, said, strict=True)
        ]
        begun = time.perf_counter()
        async with Rpc(own, here(), slots=STREAMS, ctx_size=case.ctx_size) as rpc:
            took.append(max(reply.finished for reply in await rpc.client.together(prompts, 1)) - begun)
        setup.say(f"{case.title} {round_}: {RPC} answers again after {took[-1]:.2f} s")
    return took


def _kill_outcome(
    case: _Case,
    found: Sequence[_Kill],
    calm: Sequence[float],
    again: Sequence[float],
    moved: int,
    shown: dict[str, str],
    *,
    exact: bool,
) -> Outcome:
    streams = STREAMS * len(found)
    changed, left = sum(each.changed for each in found), sum(each.left for each in found)
    pauses = [each.pause_s for each in found]
    samples = {"undisturbed": calm, SWARM: pauses, **({f"{RPC} started again": again} if again else {})}
    verdicts = [
        Verdict(f"streams that ran when a stage was killed and moved: {moved}, wanted some", moved > 0, timed=False),
        Verdict(f"processes that outlived their node: {left}, wanted 0", left == 0, timed=False),
    ]
    text = f"texts that are what they would have been: {streams - changed} of {streams}"
    if exact:
        verdicts.append(Verdict(text, changed == 0, timed=False))
    if again:
        figure = Figure("", "s", {SWARM: [max(pauses)], RPC: again}, "lower")
        verdicts.append(at_least("longest pause of all, shorter than RPC's start", figure.gain(SWARM, RPC), 10.0))
    notes = (f"{len(found)} kills; longest pause of all: {1000 * max(pauses):.0f} ms; {text}",)
    pause = Figure(f"longest pause of {STREAMS} answers", "s", samples, "lower")
    return Outcome(case.title, (pause,), tuple(verdicts), notes, shown)
