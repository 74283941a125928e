"""What a fetch of blocks works with: who holds what, how far peers are trusted, where blocks go, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swarmcpp.core import Clock
from swarmcpp.kv.arena import Hashed
from swarmcpp.peers import NodeId
from swarmcpp.sharing.shipping import KvWire
from swarmcpp.swarm.holders import Holders
from swarmcpp.swarm.links import LinkBook
from swarmcpp.swarm.trust import TrustBook
from swarmcpp.wire.peers import Caller


class Store(Protocol):
    """Where blocks go."""

    async def __call__(self, first: int, payloads: Sequence[Hashed], *, exact: bool) -> int:
        """Store payloads of the prompt's blocks from number `first`, whose predecessors are there.

        Returns how many from `first` are there now. Raises SnapshotError when a payload is not sound.
        """


Front = Callable[[int], Coroutine[Any, Any, bool]]
"""Computes so many blocks of a prompt here, the first that are missing; whether they are stored now. Cancelling it ends
the work at once."""

Dequantise = Callable[[bytes | memoryview, int], bytes]
"""(Q8_0 frame, bytes of the F16 payload) -> payload. Raises SnapshotError on a frame that is not that."""


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """Time-outs in seconds: the whole fetch, one request on the network, and the peer's own part in it.

    Where a link's rate is known, they grow with what is expected over it: the whole to 1 + 1.5 x the estimate, a
    request to 2 x (rtt + the bytes under way / rate), the peer's part with the request.
    A `trust_min` above 1 turns fetching off.
    """

    kv_wire: KvWire = "auto"
    trust_min: float = 0.5
    fetch_s: float = 3.0
    request_s: float = 2.5
    server_s: float = 2.0


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What fetches of a node work with. `callers` gives the link to a peer, None when there is none."""

    holders: Holders
    callers: Callable[[NodeId], Caller | None]
    links: LinkBook
    trust: TrustBook
    dequantise: Dequantise
    block_id: Callable[[bytes], bytes]
    settings: FetchSettings
    clock: Clock
