"""What gossip costs and how fast news travels, in simulated swarms: real codec and state, simulated clock and links."""

from __future__ import annotations

import heapq
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Run as a file, Python puts bench/ itself on the path, not the directory that has it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from swarmcpp.peers import Address, Capability, Load, ModelOffer, ObservedLatency
from swarmcpp.swarm.announcer import FULL_BEATS, Announcer, heartbeat_s
from swarmcpp.swarm.holders import Holders
from swarmcpp.swarm.membership import GONE_BEATS, MAX_LATENCIES, Heard, Membership, Status
from swarmcpp.testing import FakeClock
from swarmcpp.wire.peers import MAX_IDS, BlockPage, Gossip, ListBlocks, PrefixCacheAnnounce, decode, encode

OUT = Path(__file__).resolve().parent / "out"
SIZES = (10, 25, 50, 100, 200)
STEADY_S = 60.0
"""Simulated seconds before one node dies; bytes are counted in them."""

LATENCY_S = (0.0002, 0.005)
LOSS = 0.001
"""Of each message at each subscriber, as by a full queue."""

PROMPTS_PER_S = 2 / 60
PROMPT_BLOCKS = 8
"""512 tokens."""

BUSY_S = 6.0
"""How long a prompt keeps a slot."""

FRAME_OVERHEAD = 35 + 52
"""Bytes around each message: ZMTP with CURVE (flags, length, command name, nonce, MAC), then IPv4 and TCP with time
stamps, as if each went in a packet of its own."""

MAX_IN_BYTES_S = 16_000
"""What a swarm of any size may cost a node: 1% of a link of 12.8 Mbit/s."""

ROOT = b"r" * 32


@dataclass(slots=True)
class Node:
    """A node with the real state, and what the simulation knows of it."""

    id: str
    announcer: Announcer
    membership: Membership
    holders: Holders = field(default_factory=Holders)
    blocks: set[bytes] = field(default_factory=set)
    busy: int = 0
    timer: int = 0
    """Of the only planned publication that counts."""
    sent_bytes: int = 0
    received_bytes: int = 0
    dead: bool = False


@dataclass(slots=True)
class Found:
    """What one simulated swarm showed; times in seconds."""

    sent: list[float] = field(default_factory=list)
    """Bytes per second of each node."""
    received: list[float] = field(default_factory=list)
    news_s: list[float] = field(default_factory=list)
    """From a prompt's blocks in the arena until all know them, of each prompt."""
    suspected_s: list[float] = field(default_factory=list)
    """From the death until it is suspected, at each node."""
    gone_s: list[float] = field(default_factory=list)
    false_alarms: int = 0
    listings: int = 0
    right: bool = False
    """At the end every node knew exactly the blocks of every living other one."""


class Swarm:
    """A full mesh of `n` nodes that know each other already."""

    def __init__(self, n: int, seed: int) -> None:
        self.found = Found()
        self.clock = FakeClock()
        self._end = STEADY_S + (GONE_BEATS + 2) * heartbeat_s(n)
        # A lost message is missed when the next one comes, a heartbeat later; that one may be lost as well.
        self._quiet_from = self._end - 3 * heartbeat_s(n)
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._waiting: dict[bytes, tuple[float, set[str]]] = {}
        """Last block of a prompt: since when it is there, and who has not heard of it."""
        self.nodes = {each.id: each for each in (self._node(number, n) for number in range(n))}
        self._latency = {(a, b): self._random.uniform(*LATENCY_S) for a in self.nodes for b in self.nodes}
        ids = list(self.nodes)
        for node in self.nodes.values():
            for other in self.nodes.values():
                if other is not node:
                    node.membership.welcome(other.announcer.stamped(_capability(other.id, ids)))
            self._start(node)

    def _node(self, number: int, n: int) -> Node:
        name = f"{number:016x}"
        announcer = Announcer(name, 1, self.clock)
        announcer.n_nodes = n
        # The last full capability was said at some time before, so that they do not come all at once or never.
        self.clock.now = -self._random.uniform(0, FULL_BEATS * heartbeat_s(n))
        announcer.capability(_capability(name, [f"{each:016x}" for each in range(n)]))
        announcer.poll()
        self.clock.now = 0.0
        return Node(name, announcer, Membership(name, 1, self.clock))

    def _start(self, node: Node) -> None:
        beat = heartbeat_s(len(self.nodes))
        self._after(self._random.uniform(0, beat), lambda: self._publish(node))
        self._after(self._random.uniform(0, beat / 4), lambda: self._tick(node))
        self._after(self._random.expovariate(PROMPTS_PER_S), lambda: self._prompt(node))

    def run(self, until: float | None = None) -> None:
        """Let simulated time pass, to the end without `until`."""
        until = self._end if until is None else until
        while self._events and self._events[0][0] <= until:
            at, _, action = heapq.heappop(self._events)
            self.clock.now = at
            action()
        self.clock.now = until

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now + seconds, next(self._order), action))

    def _prompt(self, node: Node) -> None:
        if node.dead or self.clock.now > self._quiet_from:
            return
        blocks = tuple(self._random.randbytes(16) for _ in range(PROMPT_BLOCKS))
        node.blocks.update(blocks)
        node.announcer.blocks_changed(ROOT, blocks)
        self._waiting[blocks[-1]] = (self.clock.now, set(self.nodes) - {node.id})
        self._change_load(node, 1)
        self._after(BUSY_S, lambda: self._change_load(node, -1))
        self._after(self._random.expovariate(PROMPTS_PER_S), lambda: self._prompt(node))

    def _change_load(self, node: Node, change: int) -> None:
        node.busy += change
        node.announcer.load(Load(min(node.busy, 4), max(0, node.busy - 4), 200.0, 20.0 + node.busy, 0.5))
        self._schedule(node)

    def _schedule(self, node: Node) -> None:
        """Publish when something is due, which may be another time than was thought before."""
        node.timer = timer = next(self._order)

        def publish() -> None:
            if node.timer == timer and not node.dead:
                self._publish(node)

        at = max(self.clock.now, node.announcer.next_due())
        heapq.heappush(self._events, (at, next(self._order), publish))

    def _publish(self, node: Node) -> None:
        for gossip in node.announcer.poll():
            frame = encode(gossip)
            # Decoded once for all who get it, since their processors are not simulated.
            news = decode(frame)
            assert isinstance(news, Gossip)
            for other in self.nodes.values():
                if other is not node and not other.dead:
                    node.sent_bytes += len(frame) + FRAME_OVERHEAD
                    if self._random.random() >= LOSS:
                        self._send(node, other, len(frame), partial(self._hear, other, news))
        self._schedule(node)

    def _send(self, sender: Node, receiver: Node, n_bytes: int, action: Callable[[], None]) -> None:
        def arrive() -> None:
            if not receiver.dead:
                receiver.received_bytes += n_bytes + FRAME_OVERHEAD
                action()

        self._after(self._latency[sender.id, receiver.id], arrive)

    def _hear(self, node: Node, gossip: Gossip) -> None:
        heard = node.membership.hear(gossip)
        if heard in (Heard.NEWS, Heard.GAP):
            node.holders.hear(gossip)
            if isinstance(gossip.news, PrefixCacheAnnounce):
                self._learned(node, gossip.news.added)
        if heard is Heard.GAP:
            self.found.listings += 1
            self._list(node, self.nodes[gossip.node], b"")

    def _learned(self, node: Node, ids: tuple[bytes, ...]) -> None:
        for each in ids:
            if each in self._waiting:
                since, missing = self._waiting[each]
                missing.discard(node.id)
                if not missing:
                    self.found.news_s.append(self.clock.now - since)
                    del self._waiting[each]

    def _list(self, node: Node, peer: Node, after: bytes) -> None:
        """Ask `peer` for a page of its blocks."""

        def answer() -> None:
            rest = sorted(each for each in peer.blocks if each > after)
            page = BlockPage(tuple(rest[:MAX_IDS]), peer.announcer.sequence, more=len(rest) > MAX_IDS)
            n_bytes = len(encode(page))
            peer.sent_bytes += n_bytes + FRAME_OVERHEAD
            self._send(peer, node, n_bytes, lambda: take(page))

        def take(page: BlockPage) -> None:
            following = node.holders.page(peer.id, ROOT, page, after)
            self._learned(node, page.ids)
            if following is not None:
                self._list(node, peer, following)

        n_bytes = len(encode(ListBlocks(ROOT, after)))
        node.sent_bytes += n_bytes + FRAME_OVERHEAD
        self._send(node, peer, n_bytes, answer)

    def _tick(self, node: Node) -> None:
        if node.dead:
            return
        for change in node.membership.tick():
            if not self.nodes[change.node].dead:
                self.found.false_alarms += change.status is not Status.ALIVE
            elif change.status is Status.SUSPECT:
                self.found.suspected_s.append(self.clock.now - STEADY_S)
            elif change.status is Status.GONE:
                self.found.gone_s.append(self.clock.now - STEADY_S)
                node.holders.forget(change.node)
        self._after(heartbeat_s(len(self.nodes)) / 4, lambda: self._tick(node))

    def die(self) -> None:
        """The first node falls silent; nobody waits any more for it to learn anything."""
        victim = next(iter(self.nodes.values()))
        victim.dead = True
        for last, (_, missing) in list(self._waiting.items()):
            missing.discard(victim.id)
            if last in victim.blocks or not missing:
                del self._waiting[last]

    def agree(self) -> bool:
        """Whether each living node knows the blocks of each other one, and of no other."""
        living = [node for node in self.nodes.values() if not node.dead]
        known = {node.id: len(node.blocks) for node in living}
        dead = {each: 0 for each in self.nodes if each not in known}
        return all(
            node.holders.count(peer) == blocks
            for node in living
            for peer, blocks in (known | dead).items()
            if peer != node.id
        )


def _capability(node: str, nodes: Sequence[str]) -> Capability:
    """A typical one: one model, one address, links measured to as many of `nodes` as are told."""
    others = [each for each in nodes if each != node][:MAX_LATENCIES]
    model = ModelOffer(
        *("qwen2.5-0.5b-instruct-q8_0", b"f" * 32, ROOT, "qwen2", "Qwen2.5 0.5B Instruct Q8_0"),
        *(531_000_000, 494_000_000, 151_936, 32_768, 24, 0, 24, 12_288, 8_192, 4, 1_700_000_000),
    )
    return Capability(
        *(node, 1, f"laptop-{node[-3:]}", (Address("192.168.1.23", 17610, "k" * 40),), 47611, "0.1.0", "ready"),
        *("AMD Ryzen 7 5800U with Radeon Graphics", 8, 16 << 30, 6 << 30, (model,)),
        observed_latencies=tuple(ObservedLatency(each, 0.00123, 1.1e8) for each in others),
    )


def simulate(n: int, seed: int = 0) -> Found:
    """A swarm of `n` nodes for a minute, then until all have buried the one that died."""
    swarm = Swarm(n, seed)
    swarm.run(STEADY_S)
    found = swarm.found
    found.sent = [node.sent_bytes / STEADY_S for node in swarm.nodes.values()]
    found.received = [node.received_bytes / STEADY_S for node in swarm.nodes.values()]
    swarm.die()
    swarm.run()
    found.right = swarm.agree() and len(found.gone_s) == len(found.suspected_s) == n - 1
    return found


def outcome(found: dict[str, Found]) -> report.Outcome:
    """Figures and claims of the swarms by the name of their size."""

    def figure(name: str, unit: str, pick: Callable[[Found], list[float]]) -> report.Figure:
        return report.Figure(name, unit, {size: pick(each) for size, each in found.items()}, "lower")

    most = max(statistics.fmean(each.received) for each in found.values())
    return report.Outcome(
        "gossip",
        (
            figure("out per node", "bytes/s", lambda each: each.sent),
            figure("in per node", "bytes/s", lambda each: each.received),
            figure("a block known to all", "s", lambda each: each.news_s),
            figure("a death suspected", "s", lambda each: each.suspected_s),
            figure("a death certain", "s", lambda each: each.gone_s),
        ),
        (
            report.Verdict("every node knows who is there and which blocks they hold", all_right(found), timed=False),
            report.Verdict("nobody alive is suspected", not any(each.false_alarms for each in found.values()), False),
            report.Verdict(f"gossip costs a node {most:.0f} bytes/s at most", most <= MAX_IN_BYTES_S, timed=False),
        ),
        tuple(f"{size}: {each.listings} listings after lost messages" for size, each in found.items()),
    )


def all_right(found: dict[str, Found]) -> bool:
    """Whether every swarm ended as it should."""
    return all(each.right for each in found.values())


def main(
    nodes: Annotated[list[int] | None, typer.Option(min=2, max=1000, help="size of a swarm; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of latencies, losses and prompts")] = 0,
    json: Annotated[Path | None, typer.Option(help="default: bench/out/gossip-TIME.json")] = None,
) -> None:
    """Simulate swarms, print the table and write JSON. Exit code 1 unless every claim holds."""
    result = outcome({f"{n} nodes": simulate(n, seed) for n in nodes or SIZES})
    report.show(result, Console(width=130))
    target = json or OUT / f"gossip-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    report.write_json(target, {**report.machine(), "seed": seed}, [result])
    if not all(verdict.holds for verdict in result.verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
