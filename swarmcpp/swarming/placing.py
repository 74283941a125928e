"""What the swarm knows of its machines, as placement wants it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from swarmcpp.models.capacity import embedding_bytes, head_bytes, kv_bytes_per_token, layer_bytes, stage_memory
from swarmcpp.models.inspect import ModelFile
from swarmcpp.peers import Capability, NodeId
from swarmcpp.route.passes import pass_s, sound_curve
from swarmcpp.route.pipelines import Machine, ModelShape

TILE_ROWS: Final = 64


def shape_of(file: ModelFile, fingerprint: bytes, ctx_size: int, slots: int) -> ModelShape:
    """A model for placement, with the same contexts on all stages. Raises BadModel."""
    n_layers = file.n_layers
    return ModelShape(
        fingerprint=fingerprint,
        n_layers=n_layers,
        layer_bytes=layer_bytes(file),
        embedding_bytes=embedding_bytes(file),
        head_bytes=head_bytes(file),
        kv_bytes_per_token_layer=-(-kv_bytes_per_token(file) // n_layers),
        n_embd=file.n_embd,
        ctx_size=ctx_size,
        slots=slots,
        # The tail's are the largest.
        compute_buffer_bytes=stage_memory(file, n_layers - 1, n_layers, ctx_size, slots).compute,
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
