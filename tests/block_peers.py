"""Peers that serve blocks over links of a simulated rate: the real server and messages, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from swarmcpp.errors import PeerLost, PeerTimeout, SnapshotError
from swarmcpp.kv.arena import Hashed
from swarmcpp.sharing.blockserver import BlockServer, Governor
from swarmcpp.sharing.fetch import PrefixQuery
from swarmcpp.sharing.fetchcontext import FetchContext, FetchSettings
from swarmcpp.swarm.links import LinkBook
from swarmcpp.wire.peers import Ask, Blocks, FetchBlocks, Ping, Pong, Reply, decode, encode

ROOT = b"r" * 32
BLOCK_BYTES = 64 << 10
BLOCK_TOKENS = 64
NAN = b"\x00\x7e"

Answer = Callable[[FetchBlocks, Reply, list[memoryview]], tuple[Reply, list[memoryview]]]


def block_id(key: bytes) -> bytes:
    return blake3(b"id" + key).digest()[:16]


def key(i: int) -> bytes:
    return blake3(i.to_bytes(4, "little")).digest()


def payload(i: int) -> bytes:
    return bytes((i % 256, 0x3C)) * (BLOCK_BYTES // 2)


def quantise(data: bytes | memoryview) -> bytes:
    """Half the size; right for payloads that repeat one value."""
    return bytes(data[: len(data) * 34 // 64])


def dequantise(data: bytes | memoryview, size: int) -> bytes:
    if len(data) * 64 != size * 34:
        raise SnapshotError("not the size of a quantised block")
    return bytes(data[:2]) * (size // 2)


class SteppedClock:
    """Moves when a link carries something, and when somebody sleeps on it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def make_server(clock: SteppedClock, n: int, *, busy: Callable[[], bool] = lambda: False) -> BlockServer:
    blocks = {key(i): Hashed.of(payload(i)) for i in range(n)}
    server = BlockServer(ROOT, blocks.get, quantise, block_id, Governor(busy, clock, clock.sleep))
    server.add(blocks)
    return server


@dataclass
class Peer:
    """A `Caller` to a node with a BlockServer; `bend` changes what it answers."""

    server: BlockServer
    clock: SteppedClock
    bytes_per_s: float = 100e6
    bend: Answer = lambda message, reply, frames: (reply, frames)
    asked: list[FetchBlocks] = field(default_factory=list)
    dies_after: int | None = None
    silent: bool = False
    cancelled: int = 0
    line: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(
        self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        message = decode(encode(message))
        assert isinstance(message, FetchBlocks | Ping)
        if isinstance(message, FetchBlocks):
            self.asked.append(message)
        if self.dies_after is not None and len(self.asked) > self.dies_after:
            raise PeerLost("the link broke")
        if self.silent:
            await self._never(timeout_s)
        reply: Reply = Pong()
        frames = [memoryview(bytes(getattr(message, "reply_bytes", 0)))]
        async with self.line:
            if isinstance(message, FetchBlocks):
                reply, data = await self.server.answer(message)
                frames = [memoryview(each) for each in data]
            taken = 0.001 + sum(map(len, frames)) / self.bytes_per_s
            # In steps, so that an asker, whose own loop waits in real time, sees a slow answer on its way.
            steps = 20 if taken > 1 else 1
            for _ in range(steps):
                self.clock.now += taken / steps
                await asyncio.sleep(0.01 if taken > 1 else 0)
        if isinstance(message, FetchBlocks):
            reply, frames = self.bend(message, reply, frames)
        received = decode(encode(reply))
        assert isinstance(received, Blocks | Pong)
        return received, frames

    async def _never(self, timeout_s: float) -> None:
        until = self.clock.now + timeout_s
        try:
            while self.clock.now < until:
                async with self.line:
                    self.clock.now += 0.03
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        raise PeerTimeout("no answer")

    def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        raise NotImplementedError


class Trusting:
    """Scores as they are set; notes what was told."""

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.told: list[tuple[str, str]] = []

    def score(self, peer: str) -> float:
        return self.scores.get(peer, 0.6)

    def trusted(self, peer: str, minimum: float) -> bool:
        return self.score(peer) >= minimum

    def ok(self, peer: str) -> None:
        self.told.append(("ok", peer))

    def late(self, peer: str) -> None:
        self.told.append(("late", peer))

    def wrong(self, peer: str, why: str) -> None:
        self.told.append(("wrong", peer))


@dataclass
class Swarm:
    """One node that fetches, and peers that say to have blocks: `claims` gives how many each of them says."""

    clock: SteppedClock = field(default_factory=SteppedClock)
    peers: dict[str, Peer] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)
    dropped: list[tuple[str, list[bytes]]] = field(default_factory=list)
    trust: Trusting = field(default_factory=Trusting)
    stored: dict[int, bytes] = field(default_factory=dict)
    exact: set[bool] = field(default_factory=set)
    room: int = 10_000

    def __post_init__(self) -> None:
        self.links = LinkBook(self.clock)

    def join(self, name: str, n: int, *, claim: int | None = None, rate: float = 100e6, known: float = 0) -> Peer:
        """A peer with the first `n` blocks at `rate` bytes/s; its link was measured at `known`, or at that."""
        peer = self.peers[name] = Peer(make_server(self.clock, n), self.clock, rate)
        self.claims[name] = n if claim is None else claim
        self.links.add_rtt(name, 0.001)
        self.links.add_transfer(name, 1 << 20, (1 << 20) / (known or rate))
        return peer

    def holders(self, root: bytes, ids: Sequence[bytes]) -> list[tuple[bytes, tuple[str, ...]]]:
        index = {block_id(key(i)): i for i in range(1000)}
        found = []
        for each in ids:
            names = tuple(name for name, n in self.claims.items() if index[each] < n)
            if root != ROOT or not names:
                break
            found.append((each, names))
        return found

    def drop(self, root: bytes, ids: Sequence[bytes], peer: str) -> None:
        self.dropped.append((peer, list(ids)))

    async def store(self, first: int, payloads: Sequence[Hashed], *, exact: bool) -> int:
        await asyncio.sleep(0)
        self.exact.add(exact)
        for offset, data in enumerate(bytes(each.data) for each in payloads):
            assert payloads[offset] == Hashed.of(data), "the digest is that of the payload"
            if data[:2] == NAN:
                raise SnapshotError(f"block {first + offset} holds values that are not finite")
            if len(self.stored) >= self.room:
                return offset
            assert all(i in self.stored for i in range(min(self.stored, default=first), first + offset))
            self.stored[first + offset] = data
        return len(payloads)

    def context(self, settings: FetchSettings | None = None) -> FetchContext:
        return FetchContext(
            self,
            self.peers.get,
            self.links,
            self.trust,
            dequantise,
            block_id,
            settings or FetchSettings(),
            self.clock,
        )


def query(n: int, **changes: object) -> PrefixQuery:
    fields: dict[str, object] = {
        "root": ROOT,
        "keys": [key(i) for i in range(n)],
        "have": 0,
        "block_bytes": BLOCK_BYTES,
        "block_tokens": BLOCK_TOKENS,
        "prefill_tps": 100.0,
    }
    return PrefixQuery(**{**fields, **changes})  # type: ignore[arg-type]
