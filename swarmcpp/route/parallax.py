"""Which chain of stages finishes a request first, by dynamic programming over the layers. Pure.

A route is a chain of stages whose ranges meet exactly, from layer 0 to the last one. Rows start at the request's own
node (the head), which looks embeddings up, go down the chain, and ids come back to it. With

    t(s, n)     seconds of one pass of n rows through stage s: `pass_s`
    h(a, b, n)  rtt / 2 + n * row_bytes / bytes_per_s of the link from a to b; 0 within a node
    c           rows of one chunk of the prompt: min(prompt_tokens, chunk_tokens)
    lap(n)      sum of t over the stages, of h from the head through the chain, and of rtt / 2 from the tail to the head

a request of `prompt_tokens` to compute and `passes` decode passes is priced at

    queue    sum of queue_s over the stages
    prompt   lap(c) + (prompt_tokens / c - 1) * widest      chunks follow one another down the chain, so each one after
                                                           the first adds the widest place only: the largest t(s, c),
                                                           or c * row_bytes / bytes_per_s of the links that rows take
    answer   passes * lap(rows), where a stage computes its `streams` others in the same pass

All of it adds up along the chain but `widest`. The search is exact nevertheless: the cheapest sum is found, then the
cheapest sum among the routes whose widest place is narrower than that one's, and so on while that can still win. A
route that is never looked at is as wide as one that was found, and its sum no smaller.

The states of the DP are stages. A link that nobody has measured costs `default`, so a stage's predecessor is the best
of those without a known link, which one sorted list by boundary tells, or one of the few with: time is about linear in
stages and known links.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Final

from swarmcpp.peers import NodeId, ObservedLatency
from swarmcpp.route.passes import Curve, pass_s

MAX_TOLD: Final = 32
"""Links that are believed of one node."""

MAX_TELLERS: Final = 4096
"""Nodes whose links are looked at: bounds the table of links, not the swarm."""

MAX_SEARCHES: Final = 32
"""Searches for one route, each for a narrower widest place. Random swarms of 1,000 nodes need two or three; only curves
that somebody made for it need so many that a node would stall. The best route so far is taken then."""


@dataclass(frozen=True, slots=True)
class Link:
    """From one node to another: round trip in seconds, rate in bytes/s (0: unknown, priced as the default link's)."""

    rtt_s: float
    bytes_per_s: float = 0.0


DEFAULT_LINK: Final = Link(0.1, 125_000.0)
"""What a link costs that is not known, as in swarm/links.py: slow, so a wrong guess costs a chance, not time."""

_WITHIN: Final = Link(0.0, math.inf)
_NOWHERE: Final = (math.inf, -1, 0.0)


@dataclass(frozen=True, slots=True)
class Stage:
    """An engine of `node` that runs layers [first, last). `pass_s` of a peer must have gone through `sound_curve`."""

    node: NodeId
    first: int
    last: int
    pass_s: Curve = ()
    queue_s: float = 0.0
    """Until a request that comes now is looked at."""
    slots_free: int = 1
    """0: no route goes through it. If requests may wait for a slot there, say 1 and price it in `queue_s`."""
    streams: int = 0
    """Rows of others in each of its decode passes."""
    name: str = ""
    """As users see the node."""

    def __str__(self) -> str:
        return f"{self.name or self.node} {self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Work:
    """What a request needs: prompt tokens to compute (its warm beginning not counted), then decode passes."""

    row_bytes: int
    """Of one hidden row on the wire."""
    prompt_tokens: int = 0
    passes: int = 1
    """Expected."""
    rows: int = 1
    """Of this request in one decode pass; more than 1 with drafts."""
    chunk_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Route:
    """Stages in order, the seconds until the request's end as estimated, and the reason in words."""

    stages: tuple[Stage, ...]
    seconds: float
    why: str


def known_links(
    head: NodeId, own: Iterable[ObservedLatency], told: Mapping[NodeId, Sequence[ObservedLatency]]
) -> dict[tuple[NodeId, NodeId], Link]:
    """Links by (from, to): what `head` measured itself, then what others tell of theirs, MAX_TOLD of each at most.

    A node knows the rate towards itself (swarm/links.py), so the receiver's word goes before the sender's, whose rate
    is that of the way back. Takes time linear in the links; to be kept as long as nothing new is told.
    """
    links: dict[tuple[NodeId, NodeId], Link] = {}
    # The first word on a link counts: own ones, the receivers', the senders'.
    tellers = [(node, told[node]) for node in islice(sorted(told), MAX_TELLERS) if node != head]
    heard = [(head, each.peer, Link(each.rtt_s, each.bytes_per_s)) for each in own if _sound(each)]
    for node, peer, link in heard:
        links[peer, node] = links[node, peer] = link
    heard = [
        (node, each.peer, Link(each.rtt_s, each.bytes_per_s))
        for node, latencies in tellers
        for each in latencies[:MAX_TOLD]
        if _sound(each)
    ]
    for node, peer, link in heard:
        links.setdefault((peer, node), link)
    for node, peer, link in heard:
        links.setdefault((node, peer), link)
    return links


def _sound(latency: ObservedLatency) -> bool:
    return 0 <= latency.rtt_s < math.inf and 0 <= latency.bytes_per_s < math.inf


def missing_layers(stages: Iterable[Stage], n_layers: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of layers that no stage has, in order.

    Empty although `find_route` finds nothing: see `chain_exists`, and whether stages are avoided or have no free slot.
    """
    gaps, covered = [], 0
    for first, last in sorted({(stage.first, stage.last) for stage in stages if _within(stage, n_layers)}):
        if first > covered:
            gaps.append((covered, first))
        covered = max(covered, last)
    return gaps if covered >= n_layers else [*gaps, (covered, n_layers)]


def chain_exists(stages: Iterable[Stage], n_layers: int) -> bool:
    """Whether ranges meet exactly from 0 to `n_layers`. False without `missing_layers`: every layer is there, but in
    ranges that overlap and cannot follow one another."""
    reached = {0}
    for first, last in sorted({(stage.first, stage.last) for stage in stages if _within(stage, n_layers)}):
        if first in reached:
            reached.add(last)
    return n_layers in reached


def _within(stage: Stage, n_layers: int) -> bool:
    return 0 <= stage.first < stage.last <= n_layers


class _Prices:
    """What each part of a chain adds to the sum of the module's formulas, and how wide it is; both in seconds."""

    __slots__ = ("_default", "_links", "_work", "chunk", "chunk_bytes", "default", "laps", "volume", "waves")

    def __init__(self, work: Work, links: Mapping[tuple[NodeId, NodeId], Link], default: Link) -> None:
        self._work, self._links, self._default = work, links, default
        self.chunk = max(0, min(work.prompt_tokens, work.chunk_tokens))
        self.waves = work.prompt_tokens / self.chunk - 1 if self.chunk else 0.0
        self.laps = work.passes + (1 if self.chunk else 0)
        self.chunk_bytes = self.chunk * work.row_bytes
        self.volume = self.chunk_bytes + work.passes * work.rows * work.row_bytes
        self.default = self.link(default)

    def stage(self, stage: Stage) -> tuple[float, float]:
        """A stage without its links."""
        n_layers = stage.last - stage.first
        wide = pass_s(stage.pass_s, self.chunk, n_layers) if self.chunk else 0.0
        decode_s = pass_s(stage.pass_s, self._work.rows + stage.streams, n_layers)
        return stage.queue_s + wide + self._work.passes * decode_s, wide

    def link(self, link: Link) -> tuple[float, float]:
        """A link that rows take."""
        rate = link.bytes_per_s or self._default.bytes_per_s or DEFAULT_LINK.bytes_per_s
        return self.laps * link.rtt_s / 2 + self.volume / rate, self.chunk_bytes / rate

    def hop(self, source: NodeId, target: NodeId) -> tuple[float, float]:
        """From one node to another, or within one."""
        return self.link(_WITHIN if source == target else self._links.get((source, target), self._default))

    def home(self, tail: NodeId, head: NodeId) -> float:
        """Ids on their way from the tail to the head."""
        return 0.0 if tail == head else self.laps * self._links.get((tail, head), self._default).rtt_s / 2


def cost(
    stages: Sequence[Stage],
    head: NodeId,
    links: Mapping[tuple[NodeId, NodeId], Link],
    default: Link,
    work: Work,
) -> float:
    """Seconds until the end of a request that takes this chain: the formulas of the module."""
    prices = _Prices(work, links, default)
    parts = [prices.stage(stage) for stage in stages]
    parts += [prices.hop(a, b) for a, b in pairwise([head, *(stage.node for stage in stages)])]
    total = sum(part for part, _ in parts) + prices.home(stages[-1].node, head)
    return total + prices.waves * max(wide for _, wide in parts)


def find_route(
    stages: Iterable[Stage],
    n_layers: int,
    head: NodeId,
    links: Mapping[tuple[NodeId, NodeId], Link],
    default: Link,
    work: Work,
    avoid: frozenset[NodeId] = frozenset(),
) -> Route | None:
    """The route of the least `cost` for a request of node `head`, whatever the order of `stages` and `links`; None
    without any. Nodes in `avoid` and stages without a free slot are left out. A node may appear twice, with two stages.
    """
    usable = [each for each in stages if each.slots_free > 0 and each.node not in avoid and _within(each, n_layers)]
    usable.sort(key=lambda each: (each.first, each.last, each.node, each.queue_s, each.streams, each.pass_s))
    prices = _Prices(work, links, default)
    search = _Search(usable, n_layers, head, links, prices)
    best: list[int] = []
    least, limit = math.inf, math.inf
    for _ in range(MAX_SEARCHES):
        found, total, widest = search.cheapest(limit)
        if not found:
            break
        if total + prices.waves * widest < least:
            best, least = found, total + prices.waves * widest
        if total >= least:
            break
        limit = min(widest, (least - total) / prices.waves)
    if not best:
        return None
    chosen = tuple(usable[index] for index in best)
    seconds = cost(chosen, head, links, default, work)
    return Route(chosen, seconds, _why(chosen, head, seconds, prices, len(usable)))


def _why(stages: Sequence[Stage], head: NodeId, seconds: float, prices: _Prices, n_usable: int) -> str:
    hops = [prices.hop(a, b)[0] for a, b in pairwise([head, *(stage.node for stage in stages)])]
    links_s = sum(hops) + prices.home(stages[-1].node, head)
    queue_s = sum(stage.queue_s for stage in stages)
    names = ", ".join(map(str, stages))
    return f"{names}: {seconds:.2f} s (queue {queue_s:.2f}, links {links_s:.2f}), best of {n_usable} stages"


class _Search:
    """The graph of one search: stages by index, in order of their first layer; prices are pairs (sum, width)."""

    def __init__(
        self,
        stages: Sequence[Stage],
        n_layers: int,
        head: NodeId,
        links: Mapping[tuple[NodeId, NodeId], Link],
        prices: _Prices,
    ) -> None:
        self._default = prices.default
        self._stages = [prices.stage(stage) for stage in stages]
        self._starts: dict[int, list[int]] = defaultdict(list)
        self._ends: dict[int, list[int]] = defaultdict(list)
        for index, stage in enumerate(stages):
            self._starts[stage.first].append(index)
            self._ends[stage.last].append(index)
        self._entries = {index: prices.hop(head, stages[index].node) for index in self._starts.get(0, ())}
        self._exits = {index: prices.home(stages[index].node, head) for index in self._ends.get(n_layers, ())}
        self._edges: list[dict[int, tuple[float, float]]] = [{} for _ in stages]
        """By stage: its predecessors over known links."""
        leaving: dict[NodeId, list[tuple[int, int]]] = defaultdict(list)
        entering: dict[NodeId, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, stage in enumerate(stages):
            if stage.last < n_layers:
                leaving[stage.node].append((stage.last, index))
            if stage.first > 0:
                entering[stage.node][stage.first].append(index)
        within = {(node, node): _WITHIN for node in leaving}
        for (source, target), link in chain(within.items(), links.items()):
            if source in leaving and target in entering:
                starts = entering[target]
                for boundary, before in leaving[source]:
                    if boundary in starts:
                        for index in starts[boundary]:
                            self._edges[index].setdefault(before, prices.link(link))

    def cheapest(self, limit: float) -> tuple[list[int], float, float]:
        """Among the chains that are narrower than `limit` everywhere, the one of the least sum: its stages, that sum,
        and its widest place. Empty without any."""
        reached: dict[int, tuple[float, int, float]] = {}
        """By stage: the sum to its end, its predecessor, and the width of the link from there."""
        for boundary in sorted(self._starts):
            ranked = sorted((reached[index][0], index) for index in self._ends.get(boundary, ()) if index in reached)
            for index in self._starts[boundary]:
                own, wide = self._stages[index]
                if wide < limit:
                    before = self._before(index, boundary, ranked, reached, limit)
                    if before[0] < math.inf:
                        reached[index] = (before[0] + own, before[1], before[2])
        ends = [(reached[index][0] + home, index) for index, home in self._exits.items() if index in reached]
        total, index = min(ends, default=(math.inf, -1))
        found, widest = [], 0.0
        while index >= 0:
            found.append(index)
            widest = max(widest, self._stages[index][1], reached[index][2])
            index = reached[index][1]
        return found[::-1], total, widest

    def _before(
        self,
        index: int,
        boundary: int,
        ranked: Sequence[tuple[float, int]],
        reached: Mapping[int, tuple[float, int, float]],
        limit: float,
    ) -> tuple[float, int, float]:
        """The least sum before a stage, with the predecessor and the width of the link from it."""
        if boundary == 0:
            total, wide = self._entries[index]
            return (total, -1, wide) if wide < limit else _NOWHERE
        edges, best = self._edges[index], _NOWHERE
        default_s, default_wide = self._default
        if default_wide < limit:
            for before, source in ranked:
                if source not in edges:
                    best = (before + default_s, source, default_wide)
                    break
        for source, (total, wide) in edges.items():
            if wide < limit and source in reached:
                found = (reached[source][0] + total, source, wide)
                if found < best:
                    best = found
        return best
