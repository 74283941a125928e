"""Keeps a node's layers where the placement wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from swarmcpp.errors import SwarmError
from swarmcpp.node.layerhost import LayerHost, Range
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import machines_of
from swarmcpp.peers import NodeId
from swarmcpp.route.autoshard import Acquire, AutoShard, Drain, HeldStage, Release, Resume
from swarmcpp.route.costs import Machine, ModelShape, Placement, stage_bytes
from swarmcpp.route.placement import place

TICK_S: Final = 5.0
"""Between two looks at the placement; a node moves after three that want the same."""

Loader = Callable[[int, int], Awaitable[None]]
"""Loads a range of layers, and does what this node can do with them. Raises SwarmError."""


async def keep_placed(host: LayerHost, load: Loader, shape: ModelShape, swarm: Swarm) -> None:
    """Move this node's layers where the placement wants them, a step at a time, for ever."""
    shard = AutoShard(swarm.node_id, shape.n_layers)
    while True:
        await asyncio.sleep(TICK_S)
        try:
            await _tick(host, load, shard, shape, swarm)
        except SwarmError as error:
            swarm.mesh.note(f"layers could not be moved: {error}")


async def _tick(host: LayerHost, load: Loader, shard: AutoShard, shape: ModelShape, swarm: Swarm) -> None:
    capabilities = swarm.capabilities()
    machines = machines_of(capabilities, shape.fingerprint)
    placement = await asyncio.to_thread(place, shape, machines)
    kept = next(iter(host.stages), None)
    wanted = placement.wanted(swarm.node_id) if movable(shape, placement, machines) else None
    # What this node has beside the placement's pipelines helps them all the same.
    wanted = wanted or kept
    stages = [
        HeldStage(capability.node, each.first, each.last, "draining" if each.draining else "ready")
        for capability in capabilities
        for each in capability.stages
        if each.fingerprint == shape.fingerprint
    ]
    own = next((each for each in machines if each.node == swarm.node_id), None)
    held = sum(stage_bytes(shape, *each, shape.slots, shape.ctx_size) for each in host.stages)
    needed = stage_bytes(shape, *wanted, shape.slots, shape.ctx_size) if wanted else 0
    fits = own is not None and held + needed <= own.memory
    action = shard.tick(wanted, stages, fits=fits, idle=host.idle)
    match action:
        case Acquire(first=first, last=last):
            swarm.mesh.note(f"loading layers {first}-{last}: the swarm is faster with them here")
            await load(first, last)
        case Drain(first=first, last=last):
            host.stages[first, last].draining = True
        case Resume(first=first, last=last):
            host.stages[first, last].draining = False
        case Release(first=first, last=last):
            swarm.mesh.note(f"layers {first}-{last} are held by others and unloaded here")
            await host.release(first, last)


def movable(shape: ModelShape, placement: Placement, machines: Sequence[Machine]) -> bool:
    """Whether every machine that is to hold other layers can load them beside those that it has.

    One that cannot would have to let its layers go first, which nobody else has.
    """
    for machine in machines:
        wanted = placement.wanted(machine.node)
        if machine.holds and wanted is not None and wanted not in machine.holds:
            ranges = (*machine.holds, wanted)
            if sum(stage_bytes(shape, *each, shape.slots, shape.ctx_size) for each in ranges) > machine.memory:
                return False
    return True


def slowest_range(shape: ModelShape, machines: Sequence[Machine], own: NodeId) -> Range | None:
    """The range that others hold, that `own` has memory for, and whose passes take longest for each who holds it."""
    room = next((each.memory for each in machines if each.node == own), 0)
    holders: dict[Range, list[float]] = {}
    for machine in machines:
        for first, last in machine.holds if machine.node != own else ():
            holders.setdefault((first, last), []).append(machine.pass_s * (last - first))
    fitting = [each for each in holders if stage_bytes(shape, *each, shape.slots, shape.ctx_size) <= room]
    return max(fitting, key=lambda each: (1 / sum(1 / seconds for seconds in holders[each]), each), default=None)
