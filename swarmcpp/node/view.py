"""What a node tells people of its swarm: the rows of `swarmcpp status`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from swarmcpp.core import GenerateRequest, TokenPart
from swarmcpp.peers import Capability, ModelOffer, NodeId, StageOffer
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.status import NodeRow, RequestRow
from swarmcpp.swarm.membership import PeerView
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.trust import TrustBook

MAX_CHAIN: Final = 4
"""Stages of a route that are told one by one."""

MAX_NAME: Final = 24
"""Characters of a node's name in a route, as in the view."""


@dataclass(slots=True)
class RequestInView:
    """A request that this node answers, for its own clients or for a peer. `route` tells where it runs now; `begun` is
    on the node's clock."""

    request: GenerateRequest
    route: Callable[[], str]
    begun: float
    generated: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, part: TokenPart) -> None:
        """Add tokens that came."""
        self.generated += len(part.tokens)
        self.drafted += part.drafted
        self.accepted += part.accepted


def request_rows(running: Iterable[RequestInView], now: float) -> tuple[RequestRow, ...]:
    """Rows of the requests under way."""
    return tuple(
        RequestRow(
            id=each.request.id,
            model=each.request.model,
            route=each.route(),
            prompt_tokens=len(each.request.prompt),
            generated=each.generated,
            drafted=each.drafted,
            accepted=each.accepted,
            seconds=max(0.0, now - each.begun),
            state="decode" if each.generated > len(each.request.generated) else "prefill",
        )
        for each in running
    )


def chain_text(chain: Sequence[StageRef], names: Mapping[NodeId, str]) -> str:
    """A chain of stages as users see it, "stages alpha 0-12, beta 12-24": a route of the API. Of a long one, the first
    stages and the tail. Names are cut to what a header takes, and have no commas."""
    told = [f"{_plain(names.get(ref.node) or ref.node)} {ref.first}-{ref.last}" for ref in chain]
    if len(told) > MAX_CHAIN:
        told[MAX_CHAIN - 1 : -1] = [f"{len(told) - MAX_CHAIN} more"]
    return f"stages {', '.join(told)}"


def _plain(name: str) -> str:
    return "".join(char if " " <= char <= "~" and char != "," else "_" for char in name[:MAX_NAME])


def node_row(view: PeerView, mesh: Mesh, trust: TrustBook, *, is_self: bool) -> NodeRow:
    """The row of a node, with what this one knows of the link to it."""
    capability = view.capability
    offer, stages = _model(capability)
    node, load, hits, links = capability.node, capability.load, capability.hits, mesh.links
    link = mesh.caller(node)
    used = [str(link.address)] if link else []
    ranges = _ranges(offer, stages)
    shown = offer or (stages[0] if stages else None)
    # A stage has no load of its own: who has its sequences is how busy it is.
    busy = load.slots_busy if offer else max((each.slots - each.free for each in stages), default=0)
    return NodeRow(
        id=node,
        name=capability.name,
        addresses=tuple(dict.fromkeys(used + [str(each) for each in capability.addresses])),
        key=capability.addresses[0].key if capability.addresses else "",
        is_self=is_self,
        status=str(view.status),
        version=capability.version,
        cpu=capability.cpu,
        cores=capability.cores,
        memory_used=max(0, capability.memory_total - capability.memory_free),
        memory_total=capability.memory_total,
        model=offer.id if offer else stages[0].model if stages else "",
        first_layer=min((first for first, _ in ranges), default=0),
        last_layer=max((last for _, last in ranges), default=0),
        n_layers=shown.n_layers if shown else 0,
        ranges=tuple(f"{first}-{last}" for first, last in ranges),
        role=("head" if offer.pipeline else "replica") if offer else "stage" if stages else "",
        slots_busy=max(0, busy),
        slots=shown.slots if shown else 0,
        waiting=load.waiting,
        prefill_tps=load.prefill_tps,
        decode_tps=load.decode_tps,
        ttft_s=load.ttft_s,
        slot_tokens=hits.slot,
        arena_tokens=hits.arena,
        peer_tokens=hits.peer,
        computed_tokens=hits.computed,
        # What peers announce is newer than what they say of themselves from time to time.
        blocks=capability.blocks if is_self else mesh.holders.count(node),
        rtt_s=0.0 if is_self else links.rtt_s(node),
        bytes_per_s=links.bytes_per_s(node) if not is_self and links.rate_known(node) else 0.0,
        trust=0.0 if is_self else trust.score(node),
    )


def _model(capability: Capability) -> tuple[ModelOffer | None, Sequence[StageOffer]]:
    """What a node offers of the one model that its row tells of."""
    offer = capability.models[0] if capability.models else None
    of = offer or (capability.stages[0] if capability.stages else None)
    return offer, [each for each in capability.stages if of and each.fingerprint == of.fingerprint]


def _ranges(offer: ModelOffer | None, stages: Sequence[StageOffer]) -> list[tuple[int, int]]:
    whole = [(offer.first, offer.last)] if offer and not offer.pipeline else []
    return sorted({*whole, *((each.first, each.last) for each in stages)})
