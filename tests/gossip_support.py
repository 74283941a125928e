"""What the tests of membership, gossip and the index of holders share."""

from __future__ import annotations

import hashlib
from typing import Any

from swarmcpp.peers import Address, Capability, Load, ModelOffer, ObservedLatency
from swarmcpp.wire.peers import Gossip, PrefixCacheAnnounce

OWN = "00000000000000aa"
PEER = "00000000000000bb"
OTHER = "00000000000000cc"
ROOT = b"r" * 32


def offer(**changes: Any) -> ModelOffer:
    given: dict[str, Any] = {
        "id": "tiny",
        "fingerprint": b"f" * 32,
        "root": ROOT,
        "architecture": "llama",
        "description": "a model",
        "size_bytes": 10**9,
        "n_params": 10**9,
        "n_vocab": 32000,
        "n_ctx_train": 4096,
        "n_layers": 24,
        "first": 0,
        "last": 24,
        "token_bytes": 12288,
        "ctx_size": 4096,
        "slots": 4,
    }
    return ModelOffer(**(given | changes))


def capability(node: str = PEER, boot: int = 1, **changes: Any) -> Capability:
    given: dict[str, Any] = {
        "node": node,
        "boot": boot,
        "name": f"node {node[-2:]}",
        "addresses": (Address("192.0.2.1", 17610, "k" * 40),),
        "pub_port": 47611,
        "version": "0.1.0",
        "state": "ready",
        "cpu": "a CPU",
        "cores": 4,
        "memory_total": 16 << 30,
        "memory_free": 8 << 30,
        "models": (offer(),),
        "load": Load(),
        "observed_latencies": (ObservedLatency(OTHER, 0.001, 1e8),),
    }
    return Capability(**(given | changes))


def block_id(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def announce(
    sequence: int, added: tuple[bytes, ...] = (), dropped: tuple[bytes, ...] = (), node: str = PEER, root: bytes = ROOT
) -> Gossip:
    return Gossip(node, 1, sequence, PrefixCacheAnnounce(root, added=added, dropped=dropped))
