"""Blocks of stages that are copied to a node with the same layers: two nodes that call each other directly."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3
from block_peers import Trusting, block_id
from swarm_support import until

from swarmcpp.errors import PeerLost, PeerTimeout
from swarmcpp.kv.arena import Arena, ArenaGeometry, Hashed
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity, block_keys
from swarmcpp.llama import kvwire
from swarmcpp.peers import StageOffer
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.sharing.copies import MAX_WAITING, StageCopies
from swarmcpp.sharing.fetchcontext import FetchContext, FetchSettings
from swarmcpp.sharing.shipping import KvWire
from swarmcpp.swarm.holders import Holders
from swarmcpp.swarm.links import LinkBook
from swarmcpp.testing import FakeClock
from swarmcpp.wire.peers import Ask, FetchBlocks, OfferBlocks, Pong, Reply, decode, encode

FINGERPRINT = b"f" * 32
IDENTITY = KvIdentity(FINGERPRINT, 64, (1, 1))
BLOCK_BYTES = 64 << 10
FRAME_BYTES = BLOCK_BYTES * 34 // 64
"""Of a block as Q8_0."""

KEYS = block_keys(IDENTITY.root(), list(range(64 * 5)), 64)


def payload(number: int) -> Hashed:
    return Hashed.of(bytes((number, 0x3C)) * (BLOCK_BYTES // 2))


@dataclass
class Wire:
    """A `Caller` to the other node."""

    there: Callable[[], Node]
    asked: list[Ask] = field(default_factory=list)
    broken: bool = False
    silent: bool = False

    async def ask(
        self, message: Ask, payload: Sequence[bytes | memoryview] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        asked = decode(encode(message))
        self.asked.append(asked)
        if self.silent:
            raise PeerTimeout("no answer")
        if self.broken:
            raise PeerLost("the link broke")
        if isinstance(asked, OfferBlocks):
            ref = StageRef(asked.stage.node, asked.fingerprint, asked.stage.first, asked.stage.last, 10)
            self.there().copies.offered(ref, asked.source, asked.keys)
            return Pong(), []
        assert isinstance(asked, FetchBlocks)
        reply, frames = await self.there().copies.answer(asked)
        return reply, [memoryview(frame) for frame in frames]

    def begin(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        raise NotImplementedError


class Node:
    """One node with layers 4 to 10, its arena, and the other one."""

    def __init__(self, name: str, path: Path, other: Callable[[], Node], replicate: str) -> None:
        self.name = name
        self.clock = FakeClock()
        self.ref = StageRef(name, FINGERPRINT, 4, 10, 10)
        size = ArenaGeometry(BLOCK_BYTES, 16).file_bytes
        self.caches: list[PrefixCache] = []

        def hosted(first: int, last: int) -> Any:
            arena = Arena.open(path, IDENTITY.arena_root(first, last), BLOCK_BYTES, size, 0)
            assert arena is not None
            self.caches.append(PrefixCache(arena, IDENTITY))
            status = SimpleNamespace(ctx_size=64 * len(KEYS))
            return SimpleNamespace(
                ref=StageRef(name, FINGERPRINT, first, last, 10),
                supervisor=SimpleNamespace(cache=self.caches[-1], status=status),
                # A row takes a millisecond, so a block 64 of them.
                times=SimpleNamespace(curve=lambda: ((64, 0.064), (128, 0.128))),
            )

        self.hosted = hosted
        self.stage = hosted(4, 10)
        self.cache = self.caches[0]
        self.wire = Wire(other)
        self.trust = Trusting()
        self.links = LinkBook(self.clock)
        context = FetchContext(
            holders=Holders(),
            callers=lambda node: self.wire if node == other().name else None,
            links=self.links,
            trust=self.trust,
            dequantise=kvwire.dequantise,
            block_id=block_id,
            settings=FetchSettings(),
            clock=self.clock,
        )
        self.other = other
        self.draining = False
        self.copies = StageCopies(name, self, context.callers, context, replicate=replicate, clock=self.clock)  # type: ignore[arg-type]

    # -- as `Pipelines` --

    def own(self, ref: StageRef) -> Any:
        return self.stage if ref == self.ref else None

    def seen(self, _fingerprint: bytes | None = None) -> Iterator[Any]:
        for node in (self, self.other()):
            offer = StageOffer("m", FINGERPRINT, 4, 10, 10, 512, 2, 2, (), node.draining)
            yield SimpleNamespace(ref=node.ref, offer=offer)

    # --

    def store(self, count: int, first: int = 0) -> None:
        """Blocks that its engine has stored."""
        self.cache.insert(KEYS, first, [payload(number) for number in range(first, count)], exact=True)
        self.copies.stored(self.stage, KEYS[:count])

    async def has(self, count: int) -> None:
        await until(lambda: self.cache.held_keys(KEYS) == count, f"{count} blocks")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., tuple[Node, Node]]]:
    made: list[Node] = []

    def make(replicate: str = "on") -> tuple[Node, Node]:
        made.append(Node("a" * 16, tmp_path / "a", lambda: made[1], replicate))
        made.append(Node("b" * 16, tmp_path / "b", lambda: made[0], replicate))
        return made[0], made[1]

    yield make
    for cache in (cache for node in made for cache in node.caches):
        cache.close()


async def idle(*nodes: Node) -> None:
    await until(lambda: not any(node.copies._tasks for node in nodes), "all is done")


Pair = Callable[..., tuple[Node, Node]]


async def test_what_one_stores_the_other_has_soon(pair: Pair) -> None:
    here, there = pair()
    here.store(2)
    await there.has(2)
    here.store(5, 2)
    await there.has(5)
    for number, key in enumerate(KEYS):
        assert there.cache.read_block(key) == payload(number)
    fetched = [each for each in there.wire.asked if isinstance(each, FetchBlocks)]
    assert sum(len(each.ids) for each in fetched) == 5, "nothing travels twice"
    await idle(here, there)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all blocks and frames of blocks that are hashed by whatever module."""
    sizes: list[int] = []

    def counted(data: bytes | memoryview, *args: Any, **kwargs: Any) -> Any:
        if len(data) >= FRAME_BYTES:
            sizes.append(len(data))
        return blake3(data, *args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("swarmcpp.") and getattr(module, "blake3", None) is blake3:
            monkeypatch.setattr(module, "blake3", counted)
    return sizes


@pytest.mark.parametrize(
    ("wire", "sizes"),
    [
        # Read from a disk, and come from a peer.
        ("f16", [BLOCK_BYTES, BLOCK_BYTES]),
        # Read from a disk, and a new frame; come from a peer, and a new payload.
        ("q8_0", [BLOCK_BYTES, FRAME_BYTES, FRAME_BYTES, BLOCK_BYTES]),
    ],
)
async def test_a_block_is_hashed_once_after_each_way(
    pair: Pair, hashed: list[int], wire: KvWire, sizes: list[int]
) -> None:
    here, there = pair()
    there.copies._context = replace(there.copies._context, settings=FetchSettings(kv_wire=wire))
    hashed.clear()
    here.store(1)
    stored, _ = len(hashed), hashed.clear()
    await there.has(1)
    await idle(here, there)
    assert (stored, hashed) == (1, sizes)
    (entry,) = there.cache._arena.entries()
    assert entry.digest == Hashed.of(there.cache._arena.read(entry.slot)).digest


@pytest.mark.parametrize(("replicate", "wanted"), [("auto", True), ("on", True), ("off", False)])
async def test_blocks_are_stored_for_copies_where_there_is_a_double(pair: Pair, replicate: str, wanted: bool) -> None:
    here, there = pair(replicate)
    assert here.copies.wanted([here.ref]) == wanted
    there.draining = True
    assert not here.copies.wanted([here.ref])


async def test_nobody_is_asked_for_what_is_there(pair: Pair) -> None:
    here, there = pair()
    there.cache.insert(KEYS, 0, [payload(number) for number in range(3)], exact=True)
    here.store(3)
    await idle(here, there)
    assert there.wire.asked == []


async def test_off_copies_nothing(pair: Pair) -> None:
    here, there = pair("off")
    here.store(3)
    there.copies.offered(there.ref, here.name, KEYS[:3])
    await idle(here, there)
    assert (here.wire.asked, there.wire.asked) == ([], [])
    assert not here.copies.wanted([here.ref])


@pytest.mark.parametrize(("bytes_per_s", "copied"), [(None, False), (1.8e6, False), (2.4e6, True)])
async def test_auto_copies_over_links_that_are_known_to_be_fast(
    pair: Pair, bytes_per_s: float | None, copied: bool
) -> None:
    """64 KiB take 36 ms or 27 ms, and half of computing them is 32 ms."""
    here, there = pair("auto")
    if bytes_per_s:
        there.links.add_transfer(here.name, int(bytes_per_s), 1.0)
    here.store(3)
    await idle(here, there)
    assert there.cache.held_keys(KEYS) == (3 if copied else 0)


async def test_what_was_offered_too_soon_is_offered_again(pair: Pair) -> None:
    """An offer names all blocks of the sequence, so the first one after the link was measured makes up for the rest."""
    here, there = pair("auto")
    here.store(2)
    await idle(here, there)
    there.links.add_transfer(here.name, 8_000_000, 1.0)
    here.store(3, 2)
    await there.has(3)


async def test_nothing_is_taken_from_who_is_not_trusted(pair: Pair) -> None:
    here, there = pair()
    there.trust.scores[here.name] = 0.2
    here.store(3)
    await idle(here, there)
    assert there.wire.asked == []


async def test_a_stage_that_drains_or_is_of_other_layers_gets_no_copies(pair: Pair) -> None:
    here, there = pair()
    there.draining = True
    here.store(1)
    there.draining = False
    there.ref = replace(there.ref, first=5)
    here.store(2, 1)
    await idle(here, there)
    assert here.wire.asked == []
    assert not here.copies.wanted([here.ref])


async def test_offers_that_cannot_be_used_do_no_harm(pair: Pair) -> None:
    here, there = pair()
    there.copies.offered(here.ref, here.name, KEYS)
    there.copies.offered(there.ref, there.name, KEYS)
    there.copies.offered(there.ref, "c" * 16, KEYS)
    here.ref = replace(here.ref, first=5)
    there.copies.offered(there.ref, here.name, KEYS)
    here.ref = replace(here.ref, first=4)
    await idle(there)
    assert there.wire.asked == []
    here.wire.broken = True
    here.store(2)
    await idle(here)
    there.wire.broken = True
    there.copies.offered(there.ref, here.name, KEYS[:2])
    await idle(there)
    assert there.cache.held_keys(KEYS) == 0


async def test_layers_are_not_mixed_up(pair: Pair) -> None:
    """A node that moves holds two ranges for a while, whose blocks have the same keys and may have the same size."""
    here, there = pair()
    other = here.hosted(0, 6)
    other.supervisor.cache.insert(KEYS, 0, [payload(100 + number) for number in range(5)], exact=True)
    here.copies.stored(other, KEYS)
    here.store(2)
    await there.has(2)
    await idle(here, there)
    assert [there.cache.read_block(key) for key in KEYS[:2]] == [payload(0), payload(1)]


async def test_blocks_of_rounded_rows_are_given_to_nobody(pair: Pair) -> None:
    here, there = pair()
    here.cache.insert(KEYS, 0, [payload(0)], exact=True)
    here.cache.insert(KEYS, 1, [payload(1)], exact=False)
    here.cache.insert(KEYS, 2, [payload(2)], exact=True)
    here.copies.stored(here.stage, KEYS[:3])
    await there.has(1)
    await idle(here, there)
    asked = here.wire.asked[0]
    assert isinstance(asked, OfferBlocks) and len(asked.keys) == 1


async def test_an_offer_of_what_its_source_has_not_costs_that_no_trust(pair: Pair) -> None:
    here, there = pair()
    here.store(1)
    await there.has(1)
    for _ in range(5):
        there.copies.offered(there.ref, here.name, KEYS)
        await idle(here, there)
    there.wire.silent = True
    there.copies.offered(there.ref, here.name, KEYS)
    await idle(there)
    there.wire.silent = False
    assert all(kind != "late" for kind, *_ in there.trust.told)
    before = len(there.wire.asked)
    there.copies.offered(there.ref, here.name, [*KEYS, KEYS[0]])
    await idle(there)
    assert len(there.wire.asked) == before, "more than a sequence has"


async def test_offers_that_wait_are_bounded(pair: Pair) -> None:
    here, there = pair()
    here.store(2)
    await there.has(2)
    await idle(here, there)
    for _ in range(MAX_WAITING + 50):
        there.copies.offered(there.ref, here.name, KEYS)
    assert len(there.copies._tasks) == MAX_WAITING
    await there.copies.close()
    await asyncio.sleep(0)
    assert not there.copies._tasks


async def test_blocks_that_are_gone_are_not_given(pair: Pair) -> None:
    here, there = pair()
    here.store(2)
    await there.has(2)
    await idle(here, there)
    here.cache.drop(KEYS[:1])
    there.cache.drop(KEYS[:1])
    there.copies.offered(there.ref, here.name, KEYS[:2])
    await idle(there)
    assert there.cache.held_keys(KEYS) == 0
    here.copies.drop(here.ref)
    _, frames = await here.copies.answer(FetchBlocks(here.cache.root, (block_id(KEYS[0]),), "f16", 1.0))
    assert frames == []
