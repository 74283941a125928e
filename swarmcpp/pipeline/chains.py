"""The stages of a swarm as one node sees them, its own among them, and the chains that lead through a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from swarmcpp.errors import NotReady
from swarmcpp.peers import NodeId, StageOffer
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.contract import StageCaller, StageRef
from swarmcpp.pipeline.runs import Ask, Chain
from swarmcpp.pipeline.service import StageService
from swarmcpp.route.parallax import DEFAULT_LINK, Link, Stage, Work, chain_exists, find_route, known_links
from swarmcpp.route.parallax import missing_layers as gaps
from swarmcpp.route.passes import Curve, PassTimes, pass_s, sound_curve
from swarmcpp.route.replicas import EXPECTED_TOKENS
from swarmcpp.supervisor.books import GuessDone
from swarmcpp.supervisor.stage import StageSupervisor
from swarmcpp.swarm.membership import Status
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.engine import GuessPart

COMPRESS_BELOW: Final = 40e6
"""Bytes/s of a link below which 8-bit rows are worth their rounding: there a pass of 16 rows of 4,096 values waits more
than 5 ms for its rows."""

MAX_TOLD: Final = 8
"""Ranges of layers that one sentence tells."""

Room = Callable[[Sequence[tuple[int, int]]], str]
"""What to do about layers [first, last) that nobody holds, in words."""


@dataclass(slots=True)
class OwnStage:
    """A stage that this node runs, or loads, with the times of its passes."""

    ref: StageRef
    model: str
    """The id of the model."""
    supervisor: StageSupervisor
    times: PassTimes
    draining: bool = False

    @property
    def offer(self) -> StageOffer:
        """What peers are told of it."""
        ref, supervisor = self.ref, self.supervisor
        return StageOffer(
            model=self.model,
            fingerprint=ref.fingerprint,
            first=ref.first,
            last=ref.last,
            n_layers=ref.n_layers,
            ctx_size=supervisor.status.ctx_size,
            slots=supervisor.slots,
            free=supervisor.free,
            pass_s=tuple((rows, float(f"{seconds:.2g}")) for rows, seconds in self.times.curve()),
            draining=self.draining,
        )


@dataclass(frozen=True, slots=True)
class SeenStage:
    """A stage of the swarm that can be asked, and the node that runs it."""

    ref: StageRef
    name: str
    """Of the node; empty for this one."""
    offer: StageOffer


class Pipelines:
    """Used on the event loop's thread."""

    def __init__(self, own: NodeId, mesh: Mesh, service: StageService, *, compression: str) -> None:
        """`compression` is the setting `activation_compression`."""
        self._own = own
        self._mesh = mesh
        self._service = service
        self._compression = compression
        self._hosted: dict[StageRef, OwnStage] = {}

    # -- this node's own -------------------------------------------------------------------------------------------

    def host(self, stage: OwnStage, bounds: StageBounds) -> None:
        """Run a stage for the swarm from now on; its engine is ready."""
        self._hosted[stage.ref] = stage
        supervisor = stage.supervisor
        self._service.host(stage.ref, supervisor, bounds, supervisor.guess if supervisor.guesses else None)

    def own(self, ref: StageRef) -> OwnStage | None:
        """A stage of this node."""
        return self._hosted.get(ref)

    def drop(self, ref: StageRef) -> None:
        """Run it no more."""
        self._hosted.pop(ref, None)
        self._service.drop(ref)

    def offers(self) -> tuple[StageOffer, ...]:
        """This node's stages that are ready, for its capability."""
        ready = (each for each in self._hosted.values() if each.supervisor.status.state == "ready")
        return tuple(sorted((each.offer for each in ready), key=lambda each: (each.first, each.last)))

    @property
    def resident_bytes(self) -> int:
        """Memory of the engines of this node's stages when they had loaded."""
        return sum(each.supervisor.status.resident_bytes for each in self._hosted.values())

    # -- all -------------------------------------------------------------------------------------------------------

    def seen(self, fingerprint: bytes | None = None) -> Iterator[SeenStage]:
        """Stages that can be asked now, of one model or of all."""
        for offer in self.offers():
            if fingerprint in (None, offer.fingerprint):
                yield SeenStage(_ref(self._own, offer), "", offer)
        callers = self._mesh.callers()
        for view in self._mesh.membership.peers():
            node = view.capability.node
            if view.status is Status.ALIVE and node in callers:
                for offer in view.capability.stages:
                    if fingerprint in (None, offer.fingerprint):
                        yield SeenStage(_ref(node, offer), view.capability.name or node, offer)

    def route(self, fingerprint: bytes, n_layers: int, row_bytes: int, ask: Ask, room: Room) -> Chain:
        """The chain that finishes a request first. Raises NotReady, which says which layers are missing."""
        seen = list(self.seen(fingerprint))
        work = Work(row_bytes, prompt_tokens=ask.tokens, passes=max(1, min(ask.answer, EXPECTED_TOKENS)))
        links = self._links()
        # What drains still computes: better than nothing, while layers move.
        for usable in ([each for each in seen if not each.offer.draining], seen):
            stages = {_stage(each): each.ref for each in usable}
            found = find_route(stages, n_layers, self._own, links, DEFAULT_LINK, work, ask.avoid)
            if found is not None:
                return tuple(stages[stage] for stage in found.stages)
        raise NotReady(missing_text([_stage(each) for each in seen], n_layers, room))

    def covered(self, fingerprint: bytes, n_layers: int) -> bool:
        """Whether there is a chain."""
        return chain_exists([_stage(each) for each in self.seen(fingerprint)], n_layers)

    def missing(self, fingerprint: bytes, n_layers: int, room: Room) -> str:
        """What is missing for a chain, in words; empty when there is one."""
        stages = [_stage(each) for each in self.seen(fingerprint)]
        return "" if chain_exists(stages, n_layers) else missing_text(stages, n_layers, room)

    def caller(self, ref: StageRef) -> StageCaller:
        """A stage as a head drives it."""
        return self._service.caller(ref)

    def guess(self, fingerprint: bytes, parts: Sequence[GuessPart], done: GuessDone) -> bool:
        """See `StageService.guess`."""
        return self._service.guess(fingerprint, parts, done)

    def pass_times(self, ref: StageRef) -> Curve:
        """The measured times of a stage's passes."""
        found = next((each for each in self.seen(ref.fingerprint) if each.ref == ref), None)
        return sound_curve(found.offer.pass_s) if found else ()

    def rtt(self, chain: Chain) -> float:
        """Delays of a chain's links, from this node round to it again, in seconds."""
        links = self._links()
        nodes = [self._own, *(ref.node for ref in chain), self._own]
        return math.fsum(links.get(hop, DEFAULT_LINK).rtt_s / 2 for hop in pairwise(nodes) if hop[0] != hop[1])

    def encodings(self, chain: Chain) -> tuple[RowEncoding, RowEncoding]:
        """How rows travel to the first stage of a chain, and between the others; never rounded within this node."""
        nodes = [self._own, *(ref.node for ref in chain)]
        hops = [hop for hop in pairwise(nodes) if hop[0] != hop[1]]
        small = self._compression == "on"
        if self._compression == "auto":
            links = self._links()
            small = any(0 < links[hop].bytes_per_s < COMPRESS_BELOW for hop in hops if hop in links)
        onward: RowEncoding = "q8_0" if small else "f32"
        return ("f32" if nodes[1] == self._own else onward), onward

    def _links(self) -> dict[tuple[NodeId, NodeId], Link]:
        told = {view.capability.node: view.capability.observed_latencies for view in self._mesh.membership.peers()}
        return known_links(self._own, self._mesh.links.observed(), told)


def missing_text(stages: Sequence[Stage], n_layers: int, room: Room) -> str:
    """Why no chain leads through a model. Ranges are as in --layers: without their last number."""
    missing = gaps(stages, n_layers)
    if missing:
        ranges = ", ".join(f"{first}-{last}" for first, last in missing[:MAX_TOLD])
        more = ", ..." if len(missing) > MAX_TOLD else ""
        return f"layers {ranges}{more} of {n_layers} are on no node that runs now; {room(missing)}"
    if not chain_exists(stages, n_layers):
        held = ", ".join(sorted({f"{each.first}-{each.last}" for each in stages})[:MAX_TOLD])
        return (
            f"every layer is there, but in ranges that do not follow one another ({held} of {n_layers}): start one of "
            "these nodes without --layers, or with others"
        )
    return "the stages of the model do not answer now; try again in a moment"


def _ref(node: NodeId, offer: StageOffer) -> StageRef:
    return StageRef(node, offer.fingerprint, offer.first, offer.last, offer.n_layers)


def _stage(seen: SeenStage) -> Stage:
    offer = seen.offer
    curve = sound_curve(offer.pass_s)
    busy = max(0, offer.slots - offer.free)
    # A full stage is waited for: about one answer of those that run there.
    pass_at = pass_s(curve, max(1, busy), offer.last - offer.first)
    wait = 0.0 if offer.free else EXPECTED_TOKENS * pass_at / max(1, busy)
    return Stage(
        node=seen.ref.node,
        first=offer.first,
        last=offer.last,
        pass_s=curve,
        queue_s=wait,
        slots_free=1,
        streams=busy,
        name=seen.name or "this node",
    )
