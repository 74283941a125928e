"""What the swarm knows of its machines, as placement wants it, and what placement says of them, as people read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Final

from swarmcpp.config import parse_size
from swarmcpp.core import TILE_ROWS
from swarmcpp.errors import BadRequest
from swarmcpp.models.capacity import embedding_bytes, head_bytes, kv_bytes_per_token, layer_bytes, stage_memory
from swarmcpp.models.inspect import ModelFile
from swarmcpp.peers import Capability, NodeId
from swarmcpp.route.costs import UNKNOWN_HOP_RTT_S, Machine, ModelShape, stage_bytes
from swarmcpp.route.passes import pass_s, sound_curve
from swarmcpp.route.placement import Placement, expected, place
from swarmcpp.route.placement_words import explain, size
from swarmcpp.route.replicas import SLOW_PASS_S
from swarmcpp.status import PlanRates, PlanRow, SwarmPlan

MAX_ADDED: Final = 16
"""Machines that one plan adds."""

MAX_MEMORY: Final = 1 << 50

FORM: Final = "a memory such as 16G, NAME=16G, or the name of a node that serves nothing"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model that plans are made for, with the contexts that its stages have everywhere."""

    id: str
    file: ModelFile
    fingerprint: bytes
    ctx_size: int
    slots: int

    def shape(self) -> ModelShape:
        """As placement sees it. Blocking. Raises BadModel."""
        file, n_layers = self.file, self.file.n_layers
        return ModelShape(
            fingerprint=self.fingerprint,
            n_layers=n_layers,
            layer_bytes=layer_bytes(file),
            embedding_bytes=embedding_bytes(file),
            head_bytes=head_bytes(file),
            kv_bytes_per_token_layer=-(-kv_bytes_per_token(file) // n_layers),
            n_embd=file.n_embd,
            ctx_size=self.ctx_size,
            slots=self.slots,
            # The tail's are the largest.
            compute_buffer_bytes=stage_memory(file, n_layers - 1, n_layers, self.ctx_size, self.slots).compute,
        )


def machines_of(capabilities: Sequence[Capability], fingerprint: bytes) -> list[Machine]:
    """Nodes that serve nothing else, in the order of their ids. What nobody measured yet is priced as the others."""
    found = [_machine(each, fingerprint) for each in capabilities if _may_hold(each, fingerprint)]
    decode = [each.layer_s for each in found if each.layer_s]
    prefill = [each.prefill_layer_s for each in found if each.prefill_layer_s]
    return [
        Machine(
            node=each.node,
            name=each.name,
            memory=each.memory,
            layer_s=each.layer_s or (median(decode) if decode else 0.0),
            prefill_layer_s=each.prefill_layer_s or (median(prefill) if prefill else 0.0),
            holds=each.holds,
            link_s=each.link_s,
        )
        for each in found
    ]


def _may_hold(capability: Capability, fingerprint: bytes) -> bool:
    offered = [*(each.fingerprint for each in capability.models), *(each.fingerprint for each in capability.stages)]
    return all(each == fingerprint for each in offered)


def _machine(capability: Capability, fingerprint: bytes) -> Machine:
    layer_s = tile_s = 0.0
    holds: list[tuple[int, int]] = []
    for stage in capability.stages:
        if stage.draining:
            continue
        holds.insert(0, (stage.first, stage.last))
        curve, n_layers = sound_curve(stage.pass_s), stage.last - stage.first
        if curve:
            layer_s, tile_s = (pass_s(curve, rows, n_layers) / n_layers for rows in (1, TILE_ROWS))
    for offer in capability.models:
        if not offer.pipeline:
            holds.append((0, offer.n_layers))
            if capability.load.decode_tps:
                streams = max(1, capability.load.slots_busy)
                layer_s = streams / capability.load.decode_tps / offer.n_layers
            if capability.load.prefill_tps:
                tile_s = TILE_ROWS / capability.load.prefill_tps / offer.n_layers
    links: dict[NodeId, float] = {each.peer: each.rtt_s for each in capability.observed_latencies}
    return Machine(
        node=capability.node,
        name=capability.name or capability.node,
        memory=capability.memory_model or capability.memory_free,
        layer_s=layer_s,
        prefill_layer_s=tile_s,
        holds=tuple(holds),
        link_s=links,
    )


def plan(model: PlannedModel, capabilities: Sequence[Capability], added: Sequence[str]) -> SwarmPlan:
    """Who would hold what with the machines that are there and those of `added`, each as FORM says. Blocking: it takes
    as long as one placement more than there are machines added. Raises BadRequest and BadModel.
    """
    shape = model.shape()
    known = machines_of(capabilities, shape.fingerprint)
    extra = _added(added, capabilities, known)
    named = {machine.node for machine in extra}
    machines = [machine for machine in known if machine.node not in named]
    steps = [place(shape, [*machines, *extra[:count]]) for count in range(len(extra) + 1)]
    first, last = steps[0], steps[-1]
    sentences = explain(last, first) if extra else explain(last)
    if not any(machine.layer_s for machine in known):
        slow = f"{1000 * SLOW_PASS_S:g} ms a layer"
        sentences.insert(0, f"No machine has been measured yet, so all are taken for slow ({slow}): ask again later.")
    if len(extra) > 1:
        # Each by itself, in the order in which they were named, before all together.
        sentences[-1:-1] = [explain(after, before)[-1] for before, after in pairwise(steps)]
    return SwarmPlan(
        model=model.id,
        n_layers=shape.n_layers,
        ctx_size=shape.ctx_size,
        slots=shape.slots,
        rates=_rates(last),
        before=_rates(first),
        rows=_rows(last),
        added=tuple(machine.name for machine in extra),
        missing=tuple(f"{a}-{b}" for a, b in last.missing),
        missing_bytes=last.missing_bytes,
        sentences=tuple(sentences),
    )


def _rates(placement: Placement) -> PlanRates:
    found = expected(placement)
    return PlanRates(found.one_tps, found.all_tps, found.ttft_s if math.isfinite(found.ttft_s) else 0.0)


def _rows(placement: Placement) -> tuple[PlanRow, ...]:
    groups = [(number, each.stages) for number, each in enumerate(placement.pipelines, 1)]
    return tuple(
        PlanRow(stage.node, stage.name, number, stage.first, stage.last, stage.n_bytes, stage.pass_s)
        for number, stages in [*groups, (0, placement.partial)]
        for stage in stages
    )


def _added(texts: Sequence[str], capabilities: Sequence[Capability], known: Sequence[Machine]) -> list[Machine]:
    """The machines that are named, as those that join last. Raises BadRequest."""
    if len(texts) > MAX_ADDED:
        raise BadRequest(f"{len(texts)} machines to add; a plan takes {MAX_ADDED}, leave some out", param="with")
    found: list[Machine] = []
    for number, text in enumerate(texts, 1):
        name, equals, memory = text.rpartition("=")
        n_bytes = parse_size(memory)
        if not equals and (n_bytes is None or any(text in (each.name, each.node) for each in capabilities)):
            machine = _idle(text, capabilities, known)
        else:
            if not n_bytes or n_bytes > MAX_MEMORY or bool(equals) != bool(name.strip()):
                raise BadRequest(f"with {text[:80]!r}: is no machine to add; say {FORM}", param="with")
            if any(name in (each.name, each.node) for each in capabilities):
                raise BadRequest(
                    f"with {text[:80]!r}: {name[:40]!r} is a node of the swarm; say {name[:40]!r} alone, "
                    "or another name for a machine that does not exist yet",
                    param="with",
                )
            machine = _typical(f"+{number}", name.strip()[:40] or _unnamed(memory, found), n_bytes, known)
        if any(machine.node == each.node or machine.name == each.name for each in found):
            raise BadRequest(f"with {text[:80]!r}: is named twice; give each machine a name of its own", param="with")
        found.append(replace(machine, joined_at=float(number)))
    return found


def _unnamed(memory: str, found: Sequence[Machine]) -> str:
    names = {each.name for each in found}
    wanted = (f"new-{memory.strip()}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, MAX_ADDED + 1))))
    return next(name for name in wanted if name not in names)


def _idle(text: str, capabilities: Sequence[Capability], known: Sequence[Machine]) -> Machine:
    """The node of this name or id that serves nothing yet. Raises BadRequest."""
    named = [each for each in capabilities if text.strip() in (each.name, each.node)]
    if not named:
        idle = ", ".join(each.name[:40] for each in capabilities if not each.models and not each.stages)
        raise BadRequest(
            f"with {text[:80]!r}: is no size and no node of the swarm (nodes that serve nothing: "
            f"{idle[:200] or 'none'}); say {FORM}",
            param="with",
        )
    if len(named) > 1:
        ids = ", ".join(each.node for each in named[:MAX_ADDED])
        raise BadRequest(
            f"with {text[:80]!r}: {len(named)} nodes have that name; say which by its id: {ids}", param="with"
        )
    node = named[0]
    if node.models or node.stages:
        serves = node.models[0].id if node.models else node.stages[0].model
        raise BadRequest(
            f"with {text[:80]!r}: that node serves {serves[:60]!r} already, so it is in every plan for that model; "
            f"say {FORM}",
            param="with",
        )
    return next(each for each in known if each.node == node.node)


def _typical(node: NodeId, name: str, memory: int, known: Sequence[Machine]) -> Machine:
    """A machine that does not exist, as fast and as near as those that do."""
    rtts = [rtt for each in known if isinstance(each.link_s, Mapping) for rtt in each.link_s.values() if rtt > 0]
    return Machine(
        node=node,
        name=name,
        memory=memory,
        layer_s=median(each.layer_s for each in known) if known else 0.0,
        prefill_layer_s=median(each.prefill_layer_s for each in known) if known else 0.0,
        link_s=median(rtts) if rtts else UNKNOWN_HOP_RTT_S,
    )


def memory_text(shape: ModelShape, capabilities: Sequence[Capability], missing: Sequence[tuple[int, int]]) -> str:
    """Whether missing layers fit into the memory that the machines of the swarm have left, and what to do about it."""
    need = sum(stage_bytes(shape, first, last, shape.slots, shape.ctx_size) for first, last in missing)
    room = sum(
        max(0, machine.memory - sum(stage_bytes(shape, *each, shape.slots, shape.ctx_size) for each in machine.holds))
        for machine in machines_of(capabilities, shape.fingerprint)
    )
    if need > room:
        return (
            f"memory is what is missing: they need {size(need)} and the machines of the swarm have {size(room)} left; "
            "start another with `swarmcpp join`, or give one more --memory"
        )
    return (
        f"the swarm has room for them ({size(need)} of {size(room)} left): nodes that were started without --layers "
        "take them within a minute, and `swarmcpp join` brings another node"
    )
