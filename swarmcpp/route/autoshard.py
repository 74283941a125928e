"""When a node loads and unloads layer ranges. Pure: time is ticks, and other nodes are what gossip shows of them.

A node that wants another range than it holds first acquires it, then drains the old one and releases it. Where memory
cannot hold both it drains and releases first. What others know of it, and it of them, is late by some ticks; so

* nothing moves before `TICKS` ticks that want the same;
* a range drains only while a route without it exists: ready stages, not draining ones, with exact boundaries from the
  first layer to the last, so each layer has another ready stage;
* a drained range is released only after `TICKS` more ticks, and only if that still holds. Two nodes that each counted
  on the other see that by then, as long as news takes fewer than `TICKS` ticks;
* of nodes that drain overlapping ranges, or ranges without which together there is no route, all but the one with the
  least id resume, and who would begin waits while another node loads or drains any of the layers. So one node at a time
  moves, and the least id always can;
* a node whose drain was undone waits longer than before, each a different time. What a plan gives to whom depends on
  what all hold, so nodes that act in step on the same late news could move to and fro together for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from blake3 import blake3

from swarmcpp.peers import NodeId

TICKS: Final = 3
MAX_DOUBLINGS: Final = 4
"""At 5 s a tick, nobody waits for more than 5 minutes."""

StageState = Literal["loading", "ready", "draining"]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class HeldStage:
    """A range [first, last) of a node. A draining stage still computes for the requests that it has."""

    node: NodeId
    first: int
    last: int
    state: StageState


@dataclass(frozen=True, slots=True)
class Nothing:
    """Go on as it is."""


@dataclass(frozen=True, slots=True)
class _Move:
    """Something to do with [first, last)."""

    first: int
    last: int


class Acquire(_Move):
    """Load it beside what is held; its state is "loading" and then "ready"."""


class Drain(_Move):
    """Take no new request on it, and say so; its state is "draining"."""


class Resume(_Move):
    """Take requests on it again; its state is "ready"."""


class Release(_Move):
    """Unload it, which has drained."""


Action = Nothing | Acquire | Drain | Resume | Release


class AutoShard:
    """One node's moves. `tick` is called at a steady pace, and what it returns is done before the next call."""

    def __init__(self, node: NodeId, n_layers: int) -> None:
        self._node = node
        self._n_layers = n_layers
        self._wanted: Range | None = None
        self._same = 0
        self._drained = 0
        self._undone = 0
        """Drains that were undone one after another."""

    def tick(self, wanted: Range | None, stages: Sequence[HeldStage], *, fits: bool, idle: bool) -> Action:
        """What to do now.

        `wanted`: the range that the placement gives this node; None: none. `stages`: all of the swarm, this node's as
        they are. `fits`: memory holds `wanted` beside what is held. `idle`: no request runs on a draining range of this
        node."""
        self._same = self._same + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        own = sorted((s for s in stages if s.node == self._node), key=lambda s: (s.first, s.last))
        others = [s for s in stages if s.node != self._node]
        draining = next((s for s in own if s.state == "draining"), None)
        if draining is not None:
            self._drained += 1
            return self._while_draining(draining, own, others, idle)
        self._drained = 0
        if self._same < self._patience() or any(s.state == "loading" for s in own):
            return Nothing()
        return self._move(own, others, fits)

    def _patience(self) -> int:
        """Ticks that must want the same before something moves: drawn by the node's id from a window that doubles with
        each drain that was undone, as Ethernet's stations wait after a collision."""
        if not self._undone:
            return TICKS
        window = TICKS << min(self._undone, MAX_DOUBLINGS)
        drawn = blake3(f"{self._node} {self._undone}".encode()).digest(4)
        return TICKS + int.from_bytes(drawn, "little") % window

    def _while_draining(self, stage: HeldStage, own: list[HeldStage], others: list[HeldStage], idle: bool) -> Action:
        spared = self._spared(stage, own, others)
        # Also parts of two different routes: each alone can be missed, but not both.
        rivals = [s for s in others if s.state == "draining" and (not spared or _overlap(s, stage.first, stage.last))]
        rival = any(s.node < self._node for s in rivals)
        # Nodes that drain too, with greater ids, resume when they see this one.
        hopeful = spared or self._spared(stage, own, [replace(s, state="ready") if s in rivals else s for s in others])
        if rival or self._wanted == (stage.first, stage.last) or not hopeful:
            # From the start again: whoever this gives way to must be seen to have moved.
            self._same = 0
            self._undone += 1
            return Resume(stage.first, stage.last)
        if spared and idle and self._drained > TICKS:
            self._undone = 0
            return Release(stage.first, stage.last)
        return Nothing()

    def _move(self, own: list[HeldStage], others: list[HeldStage], fits: bool) -> Action:
        held = {(s.first, s.last) for s in own}
        if self._wanted is not None and self._wanted not in held:
            first, last = self._wanted
            if not held or (fits and not self._moving(first, last, others)):
                # A load that fails is tried again after as many ticks.
                self._same = 0
                return Acquire(first, last)
            if fits:
                return Nothing()
        for stage in own:
            spared = (stage.first, stage.last) != self._wanted and self._spared(stage, own, others)
            if spared and not self._moving(stage.first, stage.last, others):
                return Drain(stage.first, stage.last)
        return Nothing()

    def _spared(self, stage: HeldStage, own: list[HeldStage], others: list[HeldStage]) -> bool:
        """Whether a route exists without `stage`."""
        return has_route([s for s in (*own, *others) if s is not stage and s.state == "ready"], self._n_layers)

    def _moving(self, first: int, last: int, others: list[HeldStage]) -> bool:
        return any(s.state != "ready" and _overlap(s, first, last) for s in others)


def has_route(stages: Iterable[HeldStage], n_layers: int) -> bool:
    """Whether stages lead from the first layer to the last, each beginning where another one ends."""
    reached = {0}
    for stage in sorted(stages, key=lambda s: s.first):
        if stage.first in reached:
            reached.add(stage.last)
    return n_layers in reached


def _overlap(stage: HeldStage, first: int, last: int) -> bool:
    return stage.first < last and first < stage.last
