"""What a node publishes of itself, and when: pure state and an injected clock; the caller owns socket and timer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from swarmcpp.core import Clock
from swarmcpp.peers import CacheHits, Capability, Load, NodeId
from swarmcpp.wire.peers import MAX_IDS, Alive, Gossip, Leaving, NodeCapability, PrefixCacheAnnounce

SMALL_SWARM: Final = 16
"""Nodes up to which a heartbeat is one second."""

EARLY: Final = 4
"""Messages in one heartbeat interval at most when load or capability change in between."""

FULL_BEATS: Final = 10
"""Heartbeat intervals between full capabilities: what nobody is told at once (hits, free memory, latencies) reaches
the others with them, and so does one whose message was lost."""

BATCH_S: Final = 0.2
"""How long changed blocks wait for more of them. A prompt's blocks are stored one step after the other."""


def heartbeat_s(n_nodes: int) -> float:
    """Seconds between heartbeats in a swarm of `n_nodes`: 1 up to 16 nodes, then n/16, so that a node, which hears all
    others, gets 16 heartbeats a second at most."""
    return max(1.0, n_nodes / SMALL_SWARM)


class Announcer:
    """Collects what changed on node `own` in its life `boot`, and says which gossip is due.

    Used by one thread. `n_nodes` (set by the caller) is the size of the swarm; all intervals follow from it. Until
    the first capability only changed blocks are told.
    """

    def __init__(self, own: NodeId, boot: int, clock: Clock) -> None:
        self.n_nodes = 1
        self._own = own
        self._boot = boot
        self._clock = clock
        self._capability: Capability | None = None
        self._said: Capability | None = None
        """As it was published last, with its load as any message told it."""
        self._full_at = self._spoke_at = clock()
        self._sequence = 0
        self._changed: dict[bytes, dict[bytes, bool]] = {}
        """By root and id: whether the block is there now."""
        self._changed_at = 0.0

    @property
    def sequence(self) -> int:
        """Of the last gossip; what a BlockPage made now must carry. 0 before the first."""
        return self._sequence

    def stamped(self, capability: Capability) -> Capability:
        """`capability` as a Hello or Welcome has to tell it now: with heartbeat and sequence."""
        return replace(capability, heartbeat_s=heartbeat_s(self.n_nodes), sequence=self._sequence)

    def capability(self, new: Capability) -> None:
        """Take over all that `new` says, its load included."""
        self._capability = new

    def load(self, new: Load) -> None:
        """Take over a new load; without effect before the first capability."""
        if self._capability is not None:
            self._capability = replace(self._capability, load=new)

    def blocks_changed(self, root: bytes, added: Iterable[bytes] = (), dropped: Iterable[bytes] = ()) -> None:
        """The arena lost `dropped`, then gained `added` (ids of 16 bytes).

        The last change of an id counts and is told even if it undoes one that was not: a peer may have read a page of
        ids in between.
        """
        if not self._changed:
            self._changed_at = self._clock()
        changes = self._changed.setdefault(root, {})
        changes.update((each, False) for each in dropped)
        changes.update((each, True) for each in added)
        if not changes:
            del self._changed[root]

    def poll(self) -> list[Gossip]:
        """What to publish now, in this order; empty when nothing is due."""
        now, capability = self._clock(), self._capability
        due: list[Gossip] = []
        if capability is None:
            pass
        elif self._said is None or now >= self._full_due(capability, self._said):
            self._full_at = self._spoke_at = now
            due.append(self._next(NodeCapability(replace(self.stamped(capability), sequence=self._sequence + 1))))
            self._said = capability
        elif now >= self._load_due(capability, self._said):
            self._spoke_at = now
            due.append(self._next(Alive(capability.load)))
            self._said = replace(self._said, load=capability.load)
        if self._changed and now >= self._changed_at + BATCH_S:
            due += self._announcements()
        return due

    def leave(self) -> list[Gossip]:
        """The last gossip of this boot."""
        return [self._next(Leaving())]

    def next_due(self) -> float:
        """When poll() will have something, on the clock, if nothing changes before; may have passed."""
        due = self._changed_at + BATCH_S if self._changed else math.inf
        if self._capability is None:
            return due
        if self._said is None:
            return self._spoke_at
        full = self._full_due(self._capability, self._said)
        return min(due, full, self._load_due(self._capability, self._said))

    def _full_due(self, capability: Capability, said: Capability) -> float:
        beat = heartbeat_s(self.n_nodes)
        regular = self._full_at + FULL_BEATS * beat
        changed = _lasting(capability) != _lasting(said)
        return min(regular, self._spoke_at + beat / EARLY) if changed else regular

    def _load_due(self, capability: Capability, said: Capability) -> float:
        load, beat = capability.load, heartbeat_s(self.n_nodes)
        changed = (load.slots_busy, load.waiting) != (said.load.slots_busy, said.load.waiting)
        return self._spoke_at + (beat / EARLY if changed else beat)

    def _announcements(self) -> list[Gossip]:
        found: list[Gossip] = []
        for root, changes in self._changed.items():
            # Lost blocks first, so that a peer at its limit has room for the new ones.
            dropped = [each for each, there in changes.items() if not there]
            ids = dropped + [each for each, there in changes.items() if there]
            for start in range(0, len(ids), MAX_IDS):
                part = ids[start : start + MAX_IDS]
                cut = max(0, len(dropped) - start)
                news = PrefixCacheAnnounce(root, added=tuple(part[cut:]), dropped=tuple(part[:cut]))
                found.append(self._next(news))
        self._changed.clear()
        return found

    def _next(self, news: Alive | PrefixCacheAnnounce | Leaving | NodeCapability) -> Gossip:
        self._sequence += 1
        return Gossip(self._own, self._boot, self._sequence, news)


def _lasting(capability: Capability) -> Capability:
    """Without what changes all the time and does not decide who can be asked."""
    return replace(
        capability,
        load=Load(),
        hits=CacheHits(),
        blocks=0,
        memory_free=0,
        stages=tuple(replace(stage, pass_s=()) for stage in capability.stages),
        observed_latencies=(),
        sequence=0,
        heartbeat_s=1.0,
    )
