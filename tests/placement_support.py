"""Small models and machines for the tests of placement."""

from __future__ import annotations

from swarmcpp.route.costs import Machine, ModelShape

MB = 10**6


def shape(n_layers: int = 8, *, layer: int = 100 * MB, head: int = 0, slots: int = 4, **changes: object) -> ModelShape:
    """A model without KV and buffers unless `changes` says so."""
    fields: dict[str, object] = {
        "fingerprint": bytes(32),
        "n_layers": n_layers,
        "layer_bytes": (layer,) * n_layers,
        "embedding_bytes": 0,
        "head_bytes": head,
        "kv_bytes_per_token_layer": 0,
        "n_embd": 896,
        "ctx_size": 1024,
        "slots": slots,
        "compute_buffer_bytes": 0,
    }
    return ModelShape(**(fields | changes))  # type: ignore[arg-type]


def machine(number: int, layers: float, *, ms: float = 10.0, rtt_ms: float = 0.0, **changes: object) -> Machine:
    """A machine with room for `layers` layers of 100 MB that takes `ms` for a pass of one."""
    fields: dict[str, object] = {
        "node": f"{number:016x}",
        "name": f"m{number}",
        "memory": int(layers * 100 * MB),
        "layer_s": ms / 1000,
        "prefill_layer_s": ms / 1000,
        "link_s": rtt_ms / 1000,
        "joined_at": float(number),
    }
    return Machine(**(fields | changes))  # type: ignore[arg-type]
