"""What a node tells people of its swarm: the rows of `swarmcpp status`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarmcpp.core import GenerateRequest
from swarmcpp.status import NodeRow, RequestRow
from swarmcpp.swarm.membership import PeerView
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.trust import TrustBook


@dataclass(slots=True)
class Running:
    """A request that this node answers, for its own clients or for a peer. `begun` on the node's clock."""

    request: GenerateRequest
    route: str
    begun: float
    generated: int = 0


def request_rows(running: Iterable[Running], now: float) -> tuple[RequestRow, ...]:
    """Rows of the requests under way."""
    return tuple(
        RequestRow(
            id=each.request.id,
            model=each.request.model,
            route=each.route,
            prompt_tokens=len(each.request.prompt),
            generated=each.generated,
            seconds=max(0.0, now - each.begun),
            state="decode" if each.generated > len(each.request.generated) else "prefill",
        )
        for each in running
    )


def node_row(view: PeerView, mesh: Mesh, trust: TrustBook, *, is_self: bool) -> NodeRow:
    """The row of a node, with what this one knows of the link to it."""
    capability = view.capability
    offer = capability.models[0] if capability.models else None
    node, load, hits, links = capability.node, capability.load, capability.hits, mesh.links
    link = mesh.caller(node)
    used = [str(link.address)] if link else []
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
        model=offer.id if offer else "",
        first_layer=offer.first if offer else 0,
        last_layer=offer.last if offer else 0,
        n_layers=offer.n_layers if offer else 0,
        slots_busy=load.slots_busy,
        slots=offer.slots if offer else 0,
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
