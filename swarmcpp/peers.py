"""The vocabulary of the swarm: who a node is, what it says of itself, and what others know of it.

Standard library only, frozen, as everything that crosses a module boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmcpp.core import EngineState

NodeId = str
"""16 hex digits: the first 8 bytes of the BLAKE3 of a node's public key. Who proves the key is that node."""

BLOCK_ID_BYTES = 16
"""Of a block's id on the wire: BLAKE3 of its key, keyed with a key that only members of the swarm can derive. 16 bytes:
among a million blocks the chance of a collision is 1e-27, and a wrong payload would still have to be of that shape."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node's swarm port is, and the public key (Z85, 40 characters) that it must prove there."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model that a node serves: `fingerprint` says which bytes, `first` and `last` which layers, [first, last).

    `root` is the root of its block keys without a salt, so that only KV of one shape and one way is shared.
    """

    id: str
    fingerprint: bytes
    root: bytes
    architecture: str
    description: str
    size_bytes: int
    n_params: int
    n_vocab: int
    n_ctx_train: int
    n_layers: int
    first: int
    last: int
    token_bytes: int
    """KV bytes of one token over the layers held; 0: its KV cannot be shared."""
    ctx_size: int
    slots: int
    created: int = 0
    pipeline: bool = False
    """The node answers through stages, of which it may hold some: it has not all layers itself."""


@dataclass(frozen=True, slots=True)
class StageOffer:
    """A stage that a node runs: layers [first, last) of `model` with `fingerprint`, for `slots` sequences."""

    model: str
    fingerprint: bytes
    first: int
    last: int
    n_layers: int
    ctx_size: int
    slots: int
    free: int
    """Sequences that nobody has."""
    pass_s: tuple[tuple[int, float], ...] = ()
    """(rows, seconds) of its passes as measured, by rising rows, at most 16 entries."""
    draining: bool = False
    """It takes no new sequences, and ends when it has none."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a node's engine is. Rates are moving averages in tokens/s, 0: not measured yet."""

    slots_busy: int = 0
    waiting: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    """All streams together."""
    ttft_s: float = 0.0
    """Moving average of the time to the first token; 0: none yet."""
    backlog: int = 0
    """Prompt tokens of requests that have no token yet: what a new prompt waits for, or shares the engine with."""


@dataclass(frozen=True, slots=True)
class ObservedLatency:
    """What a node measured of its link to `peer`: round trip in seconds, rate in bytes/s (0: not measured)."""

    peer: NodeId
    rtt_s: float
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Prompt tokens since the start by where their KV came from, and how many had to be computed."""

    slot: int = 0
    arena: int = 0
    peer: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Capability:
    """What a node says of itself: in full when something but its load changed, and from time to time.

    `boot` counts the starts of a node and never falls, so news of an earlier life is told from that of this one.
    """

    node: NodeId
    boot: int
    name: str
    addresses: tuple[Address, ...]
    pub_port: int
    """Port of its gossip, at the same hosts."""
    version: str
    state: EngineState
    cpu: str
    cores: int
    memory_total: int
    memory_free: int
    models: tuple[ModelOffer, ...]
    load: Load = Load()
    hits: CacheHits = CacheHits()
    blocks: int = 0
    """Blocks in its arena."""
    observed_latencies: tuple[ObservedLatency, ...] = ()
    heartbeat_s: float = 1.0
    """The longest that it keeps silent, in seconds."""
    stages: tuple[StageOffer, ...] = ()
    memory_model: int = 0
    """Bytes that parts of models may take in all, those that are loaded included; 0: not said."""
    sequence: int = 0
    """That of its last gossip when it said this, so that what was said later is told from what arrives later."""
