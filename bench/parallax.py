"""Routes through simulated swarms of unlike nodes: how good they are, and how long the search for one takes."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from swarmcpp.peers import ObservedLatency
from swarmcpp.route.parallax import (
    DEFAULT_LINK,
    Link,
    Stage,
    Work,
    chain_exists,
    cost,
    find_route,
    known_links,
)
from swarmcpp.route.passes import Curve, PassTimes, pass_s
from swarmcpp.testing import FakeClock

OUT = Path(__file__).resolve().parent / "out"
HEAD = "head"

LAYER_S = (0.0005, 0.01)
"""Of one row: from a good desktop to an old laptop, for models of 1B to 8B."""

RTT_S = (0.0002, 0.08)
BYTES_PER_S = (1.25e5, 1.25e8)
"""1 Mbit/s to 1 Gbit/s."""

KNOWN = 32
"""Links that a node tells, as in gossip."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

SMALL_SWARMS, LARGE_SWARMS, SIMULATIONS, SEARCHES = 1000, 50, 200, 15
SMALL_NODES = 8
LARGE_LAYERS, LARGE_NODES = 80, 1000
STREAMS = 16
"""Requests at once in the simulation of an added node."""

MOST_OVER = 0.01
MOST_LOST = 0.01
"""Of the throughput of many streams. Each takes the route that is best for itself, not for all (Braess's paradox): of
4,000 swarms in which a slow node joined, 2 lost up to 0.3%."""

MOST_SEARCH_S = 0.05

Chain = tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Swarm:
    """Stages, what is known of the links between their nodes and HEAD, and a request."""

    stages: tuple[Stage, ...]
    n_layers: int
    links: dict[tuple[str, str], Link]
    work: Work

    def cost(self, chain: Sequence[Stage]) -> float:
        """Seconds of the request through `chain`."""
        return cost(chain, HEAD, self.links, DEFAULT_LINK, self.work)

    def route(self) -> Chain:
        """The chain that is taken; empty without any."""
        found = find_route(self.stages, self.n_layers, HEAD, self.links, DEFAULT_LINK, self.work)
        return found.stages if found else ()


def log_uniform(rng: random.Random, bounds: tuple[float, float]) -> float:
    """A number of which each order of magnitude is as likely."""
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def curve(rng: random.Random, n_layers: int, layer_s: float) -> Curve:
    """Pass times of a stage, measured at some row counts; one in ten is not measured yet."""
    if rng.random() < 0.1:
        return ()
    share = rng.uniform(0.05, 0.3)
    return tuple((rows, n_layers * layer_s * (1 + (rows - 1) * share)) for rows in ROWS if rng.random() < 0.7)


def observed(rng: random.Random, nodes: Sequence[str]) -> dict[str, tuple[ObservedLatency, ...]]:
    """What each node knows of its links to KNOWN others."""
    return {
        node: tuple(
            ObservedLatency(other, log_uniform(rng, RTT_S), log_uniform(rng, BYTES_PER_S))
            for other in rng.sample(nodes, min(KNOWN, len(nodes)))
            if other != node
        )
        for node in nodes
    }


def random_swarm(rng: random.Random, n_nodes: int, n_layers: int, cuts: Sequence[int], most: int) -> Swarm:
    """A swarm that has a chain, whose nodes hold up to `most` consecutive pieces between `cuts`; some hold two stages,
    and HEAD may hold one."""
    nodes = [HEAD, *(f"{index:04}" for index in range(n_nodes - 1))]
    stages: list[Stage] = []
    while not chain_exists(stages, n_layers):
        stages = []
        for node in nodes:
            layer_s = log_uniform(rng, LAYER_S)
            for _ in range(1 if rng.random() < 0.9 else 2):
                at = rng.randrange(len(cuts) - 1)
                first, last = cuts[at], cuts[min(at + rng.randint(1, most), len(cuts) - 1)]
                stages.append(
                    Stage(
                        node,
                        first,
                        last,
                        curve(rng, last - first, layer_s),
                        queue_s=rng.choice((0.0, 0.0, rng.uniform(0, 2))),
                        streams=rng.randrange(4),
                    )
                )
    told = observed(rng, nodes)
    work = Work(
        row_bytes=rng.choice((3584, 16384)), prompt_tokens=rng.randint(0, 2048), passes=rng.choice((1, 64, 256))
    )
    return Swarm(tuple(stages), n_layers, known_links(HEAD, told[HEAD], told), work)


def small_swarm(rng: random.Random) -> Swarm:
    """Up to SMALL_NODES nodes, cut at up to three places."""
    n_layers = rng.choice((16, 24, 32))
    cuts = sorted({0, n_layers, *rng.sample(range(1, n_layers), rng.randint(1, 3))})
    return random_swarm(rng, rng.randint(4, SMALL_NODES), n_layers, cuts, 2)


def chains(swarm: Swarm, at: int = 0) -> Iterator[Chain]:
    """Every chain from layer `at` on."""
    if at == swarm.n_layers:
        yield ()
    for stage in swarm.stages:
        if stage.first == at:
            for rest in chains(swarm, stage.last):
                yield (stage, *rest)


def exhaustive(swarm: Swarm) -> Chain:
    """The cheapest of all chains."""
    return min(chains(swarm), key=swarm.cost)


def nearest(swarm: Swarm, node: str, stage: Stage) -> float:
    """Greedy by link: the round trip of one row to the next stage."""
    link = Link(0.0, math.inf) if node == stage.node else swarm.links.get((node, stage.node), DEFAULT_LINK)
    return link.rtt_s / 2 + swarm.work.row_bytes / (link.bytes_per_s or DEFAULT_LINK.bytes_per_s)


def fastest(swarm: Swarm, node: str, stage: Stage) -> float:
    """Greedy by layer: what a decode pass through the next stage takes for each of its layers, the link included."""
    n_layers = stage.last - stage.first
    return (nearest(swarm, node, stage) + pass_s(stage.pass_s, 1 + stage.streams, n_layers)) / n_layers


def greedy(swarm: Swarm, price: Callable[[Swarm, str, Stage], float]) -> Chain:
    """Stage by stage the one of the least price, among those from which the end can be reached."""
    ends = {swarm.n_layers}
    for first, last in sorted({(stage.first, stage.last) for stage in swarm.stages}, reverse=True):
        if last in ends:
            ends.add(first)
    chain: list[Stage] = []
    node, at = HEAD, 0
    while at < swarm.n_layers:
        following = [stage for stage in swarm.stages if stage.first == at and stage.last in ends]
        chain.append(min(following, key=lambda stage: price(swarm, node, stage)))
        node, at = chain[-1].node, chain[-1].last
    return tuple(chain)


def small(seed: int) -> report.Outcome:
    """Against every chain, in small swarms."""
    rng = random.Random(seed)
    over: dict[str, list[float]] = {"exhaustive": [], "parallax": [], "greedy, nearest": [], "greedy, fastest": []}
    n_chains = []
    for _ in range(SMALL_SWARMS):
        swarm = small_swarm(rng)
        n_chains.append(sum(1 for _ in chains(swarm)))
        best = swarm.cost(exhaustive(swarm))
        found = (best, *(swarm.cost(each) for each in (swarm.route(), greedy(swarm, nearest), greedy(swarm, fastest))))
        for name, seconds in zip(over, found, strict=True):
            over[name].append(seconds / best)
    worst = max(over["parallax"])
    return report.Outcome(
        f"{SMALL_SWARMS} swarms of 4 to {SMALL_NODES} nodes",
        (
            report.Figure("seconds of a request / the least there is", "x", over, "lower"),
            report.Figure("chains in a swarm", "1", {"all": n_chains}),
        ),
        (
            report.Verdict(
                f"{worst:.6f} of exhaustive search at worst, wanted <= {1 + MOST_OVER}", worst <= 1 + MOST_OVER, False
            ),
        ),
    )


def large(seed: int) -> report.Outcome:
    """Against greedy choices, in larger swarms."""
    rng = random.Random(seed)
    over: dict[str, list[float]] = {"parallax": [], "greedy, nearest": [], "greedy, fastest": []}
    for _ in range(LARGE_SWARMS):
        swarm = random_swarm(rng, 100, LARGE_LAYERS, range(0, LARGE_LAYERS + 1, 5), 4)
        own = swarm.cost(swarm.route())
        for name, chain in zip(over, (swarm.route(), greedy(swarm, nearest), greedy(swarm, fastest)), strict=True):
            over[name].append(swarm.cost(chain) / own)
    never = all(ratio >= 1 for values in over.values() for ratio in values)
    return report.Outcome(
        f"{LARGE_SWARMS} swarms of 100 nodes, {LARGE_LAYERS} layers",
        (report.Figure("seconds of a request / those of parallax", "x", over, "lower"),),
        (report.Verdict("no greedy route is faster", never, False),),
    )


def search_time(seed: int) -> report.Outcome:
    """The time of one search among LARGE_NODES nodes that tell KNOWN links each."""
    rng = random.Random(seed)
    layouts = {
        "4 equal ranges": (range(0, LARGE_LAYERS + 1, 20), 1),
        "10 equal ranges": (range(0, LARGE_LAYERS + 1, 8), 1),
        "ranges of 5 to 20": (range(0, LARGE_LAYERS + 1, 5), 4),
        "any ranges up to 16": (range(LARGE_LAYERS + 1), 16),
    }
    taken: dict[str, list[float]] = {}
    for name, (cuts, most) in layouts.items():
        taken[name] = []
        for _ in range(SEARCHES):
            swarm = random_swarm(rng, LARGE_NODES, LARGE_LAYERS, cuts, most)
            begun = time.perf_counter()
            swarm.route()
            taken[name].append(time.perf_counter() - begun)
    figure = report.Figure("one search", "s", taken, "lower")
    slowest = max(map(figure.median, taken))
    return report.Outcome(
        f"{LARGE_NODES} nodes, {LARGE_LAYERS} layers",
        (figure,),
        (report.Verdict(f"a search takes {slowest * 1e3:.1f} ms, wanted < 50", slowest < MOST_SEARCH_S),),
    )


def measured(rng: random.Random, n_layers: int, layer_s: float) -> Curve:
    """What PassTimes learns of a stage whose passes take up to 30% longer than they would."""
    clock = FakeClock()
    times = PassTimes(clock)
    for _ in range(10):
        for rows in (1, 4, 16, 128):
            clock.advance(0.1)
            times.add(rows, n_layers * layer_s * (1 + (rows - 1) * 0.2) * rng.uniform(1, 1.3))
    return times.curve()


def near(seed: int) -> report.Outcome:
    """For the middle of a model, a small box nearby or a large one with four times the slots that is slow to answer:
    because of its link, or because its passes take long."""
    rng = random.Random(seed)
    taken: dict[str, list[float]] = {"through the small near node": [], "through the large slow node": []}
    chosen = 0
    for number in range(SIMULATIONS):
        layer_s, far = log_uniform(rng, LAYER_S), number % 2 == 0
        ends = [Stage("a", 0, 8, measured(rng, 8, layer_s)), Stage("c", 16, 24, measured(rng, 8, layer_s))]
        small_box = Stage("near", 8, 16, measured(rng, 8, layer_s), slots_free=4)
        large_s = layer_s * (0.9 if far else rng.uniform(2, 5))
        large_box = Stage("large", 8, 16, measured(rng, 8, large_s), slots_free=16)
        lan = [ObservedLatency(node, rng.uniform(0.0002, 0.001), 1e8) for node in (HEAD, "a", "near", "c")]
        wide = [ObservedLatency("large", rng.uniform(0.02, 0.08) if far else 0.001, 1e8)]
        told = {node: (*(each for each in lan if each.peer != node), *wide) for node in (HEAD, "a", "near", "c")}
        links = known_links(HEAD, told[HEAD], told)
        swarm = Swarm((*ends, small_box, large_box), 24, links, Work(3584, rng.randint(1, 512), 128))
        for name, box in zip(taken, (small_box, large_box), strict=True):
            taken[name].append(swarm.cost((ends[0], box, ends[1])))
        chosen += small_box in swarm.route()
    text = f"the small near node is taken in {chosen} of {SIMULATIONS} swarms"
    return report.Outcome(
        "a small node with low observed latency beside a large slow one",
        (report.Figure("a request", "s", taken, "lower"),),
        (report.Verdict(text, chosen == SIMULATIONS, False),),
    )


def throughput(swarm: Swarm, streams: int) -> float:
    """Tokens/s of `streams` requests that chose their routes one after the other, when all of them decode."""
    stages = [replace(stage, streams=0, queue_s=0.0) for stage in swarm.stages]
    routes = []
    for _ in range(streams):
        found = find_route(stages, swarm.n_layers, HEAD, swarm.links, DEFAULT_LINK, swarm.work)
        if found is None:
            break
        chosen = [stages.index(stage) for stage in found.stages]
        routes.append(chosen)
        for index in chosen:
            stages[index] = replace(stages[index], streams=stages[index].streams + 1)
    # A stage counts a stream's own row beside those of others.
    beside = [replace(stage, streams=stage.streams - 1) for stage in stages]
    decode = Work(swarm.work.row_bytes)
    return sum(
        1 / cost([beside[index] for index in chosen], HEAD, swarm.links, DEFAULT_LINK, decode) for chosen in routes
    )


def added(seed: int) -> report.Outcome:
    """A node joins with the range of another one, and up to ten times slower than that."""
    rng = random.Random(seed)
    gains: dict[str, list[float]] = {"1 stream": [], f"{STREAMS} streams": []}
    used = 0
    for _ in range(SIMULATIONS):
        swarm = random_swarm(rng, SMALL_NODES, 24, range(0, 25, 6), 3)
        swarm = replace(swarm, work=Work(swarm.work.row_bytes, passes=256))
        slow, times = replace(rng.choice(swarm.stages), node="slow"), rng.uniform(1.5, 10)
        n_layers = slow.last - slow.first
        slow = replace(slow, pass_s=tuple((rows, times * pass_s(slow.pass_s, rows, n_layers)) for rows in ROWS))
        nodes = {HEAD, *(each.node for each in swarm.stages)}
        ways = {pair: log_uniform(rng, RTT_S) for node in sorted(nodes) for pair in (("slow", node), (node, "slow"))}
        links = swarm.links | {pair: Link(rtt_s, 1e7) for pair, rtt_s in ways.items()}
        more = replace(swarm, stages=(*swarm.stages, slow), links=links)
        ratios = [throughput(more, streams) / throughput(swarm, streams) for streams in (1, STREAMS)]
        used += ratios[-1] != 1
        for name, ratio in zip(gains, ratios, strict=True):
            gains[name].append(ratio)
    one, many = (min(values) for values in gains.values())
    return report.Outcome(
        "a slow node joins",
        (report.Figure("tokens/s after / before", "x", gains),),
        (
            report.Verdict(
                f"1 stream: {one:.4f} of the throughput before at worst, wanted >= 1", one >= 1 - 1e-9, False
            ),
            report.Verdict(
                f"{STREAMS} streams: {many:.4f} at worst, wanted >= {1 - MOST_LOST}", many >= 1 - MOST_LOST, False
            ),
        ),
        (f"{STREAMS} streams use it in {used} of {SIMULATIONS} swarms",),
    )


SCENARIOS = {"small": small, "large": large, "time": search_time, "near": near, "added": added}


def main(
    scenario: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCENARIOS)}; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the swarms")] = 0,
    json: Annotated[Path | None, typer.Option(help="default: bench/out/parallax-TIME.json")] = None,
) -> None:
    """Simulate swarms, print the tables and write JSON. Exit code 1 unless every claim holds."""
    console = Console(width=130)
    outcomes = []
    for name in scenario or SCENARIOS:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"{name!r} is no scenario; choose from {', '.join(SCENARIOS)}")
        others = report.Others()
        outcomes.append(replace(SCENARIOS[name](seed), others_cores=others.cores()))
        report.show(outcomes[-1], console)
    target = json or OUT / f"parallax-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    report.write_json(target, {**report.machine(), "seed": seed}, outcomes)
    if not all(verdict.holds and each.settles(verdict) for each in outcomes for verdict in each.verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
