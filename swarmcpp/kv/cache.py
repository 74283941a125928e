"""A node's prefix cache: which blocks it has, which of them a prompt can use, and what is stored next.

It joins the arena (bytes) with the index (decisions). An engine reads and writes payloads itself; this side grants it
slots, enters what it wrote, and keeps blocks in place while an engine reads them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from swarmcpp.core import BlockRef
from swarmcpp.kv.arena import Arena, StoredBlock
from swarmcpp.kv.index import ROOT, Block, BlockIndex
from swarmcpp.kv.keys import KvIdentity, block_keys
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Lease:
    """Blocks that an engine may read until `PrefixCache.release`. `refs` is the beginning of a prompt."""

    refs: tuple[BlockRef, ...]
    blocks: tuple[Block, ...] = ()
    keys: tuple[bytes, ...] = ()
    open: bool = True


@dataclass(slots=True)
class Grant:
    """Arena slots that an engine may write: (block number, arena slot), and the reserved blocks behind them."""

    grants: tuple[tuple[int, int], ...]
    blocks: dict[int, Block] = field(default_factory=dict)
    """By arena slot."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the arena holds; sizes in bytes."""

    blocks: int
    capacity: int
    block_bytes: int
    evictions: int
    stored: int
    bad: int


class PrefixCache:
    """The cache of one model on one node. Methods are quick (no payload is read or written) and thread-safe."""

    def __init__(self, arena: Arena, identity: KvIdentity, max_entries: int = 0) -> None:
        self._arena = arena
        self._identity = identity
        self._lock = threading.Lock()
        self._index = BlockIndex(arena.geometry.n_blocks, max_entries)
        self._stored = 0
        self._bad = 0
        self._failing = False
        load_index(arena, self._index)

    @property
    def path(self) -> Path:
        """The arena file."""
        return self._arena.path

    @property
    def block_bytes(self) -> int:
        """Bytes of a payload."""
        return self._arena.geometry.block_bytes

    @property
    def n_blocks(self) -> int:
        """Blocks that the arena can hold."""
        return self._arena.geometry.n_blocks

    def stats(self) -> CacheStats:
        """Counts now."""
        with self._lock:
            index = self._index
            return CacheStats(len(index), self.n_blocks, self.block_bytes, index.evictions, self._stored, self._bad)

    def keys(self, tokens: Sequence[int], salt: str) -> list[bytes]:
        """Keys of the full blocks of a token sequence."""
        return block_keys(self._identity.root(salt), tokens, self._identity.block_tokens)

    # -- reading -------------------------------------------------------------------------------------------------

    def lease(self, tokens: Sequence[int], salt: str) -> Lease:
        """The stored beginning of `tokens`, kept in place until released. At least one token is left to compute."""
        begun = time.perf_counter()
        # The last token's logits are needed, so its block is never taken whole.
        keys = self.keys(tokens[: max(0, len(tokens) - 1)], salt)
        with self._lock:
            blocks = self._index.match(keys)
            self._index.use(blocks)
            for block in blocks:
                block.pins += 1
            refs = tuple(BlockRef(block.slot, block.digest, block.finite) for block in blocks)
            tick = self._index.tick
        if blocks:
            self._arena.touch(blocks[-1].slot, tick)
        event = "prefix-cache HIT" if blocks else "prefix-cache MISS"
        found = len(blocks) * self._identity.block_tokens
        diag(logger, event, tokens=found, of=len(tokens), ms=round(1000 * (time.perf_counter() - begun), 3))
        return Lease(refs, tuple(blocks), tuple(keys[: len(blocks)]))

    def release(self, lease: Lease, used_tokens: int | None = None) -> None:
        """The engine has read what it wanted. `used_tokens` (when it met a bad block) tells where the bad one is."""
        with self._lock:
            if not lease.open:
                return
            lease.open = False
            for block in lease.blocks:
                block.pins -= 1
            if used_tokens is None:
                return
            sound = used_tokens // self._identity.block_tokens
            for block in lease.blocks[:sound]:
                block.finite = True
            if sound < len(lease.blocks) and self._index.get(lease.keys[sound]) is lease.blocks[sound]:
                dropped = self._index.remove(lease.blocks[sound])
                self._bad += 1
                # A file that was damaged once has more such blocks: one line is enough.
                level = logging.WARNING if self._bad == 1 else logging.DEBUG
                logger.log(level, "%s: a block is damaged; %d blocks are dropped", self.path, len(dropped))
                for block in dropped:
                    self._arena.erase(block.slot)

    # -- writing -------------------------------------------------------------------------------------------------

    def grant(self, tokens: Sequence[int], salt: str) -> Grant:
        """Reserve arena slots for the full blocks of `tokens` that are not stored."""
        keys = self.keys(tokens, salt)
        grants: list[tuple[int, int]] = []
        blocks: dict[int, Block] = {}
        with self._lock:
            parent = ROOT
            for number, key in enumerate(keys):
                known = self._index.get(key)
                if known is None:
                    block, evicted = self._index.reserve(key, parent)
                    for gone in evicted:
                        self._arena.erase(gone.slot)
                        diag(logger, "prefix-cache evict", slot=gone.slot)
                    if block is None:
                        break
                    self._arena.erase(block.slot)
                    grants.append((number, block.slot))
                    blocks[block.slot] = block
                parent = key
        return Grant(tuple(grants), blocks)

    def enter(self, grant: Grant, written: Sequence[tuple[int, bytes]]) -> int:
        """Blocks of a grant that the engine wrote, with their digests; the rest is given back. The number entered."""
        digests = dict(written)
        entered = 0
        with self._lock:
            for _number, slot in grant.grants:
                block = grant.blocks[slot]
                if self._index.get(block.key) is not block:
                    continue
                digest = digests.get(slot)
                if digest is None or not self._enter(block, digest):
                    block.pins -= 1
                    self._index.remove(block)
                else:
                    entered += 1
            self._stored += entered
        if entered:
            diag(logger, "prefix-cache insert", blocks=entered, tokens=entered * self._identity.block_tokens)
        return entered

    def _enter(self, block: Block, digest: bytes) -> bool:
        try:
            self._arena.enter(StoredBlock(block.slot, block.key, block.parent, digest, block.tick))
        except OSError as error:
            if not self._failing:
                logger.warning("%s: cannot enter a block: %s", self.path, error)
            self._failing = True
            return False
        self._failing = False
        self._index.commit(block, digest)
        return True

    # -- care ----------------------------------------------------------------------------------------------------

    def in_place(self) -> bool:
        """Whether an engine that opens `path` finds this arena there; not so once somebody has deleted it."""
        return self._arena.in_place()

    def check_integrity(self) -> None:
        """Raise AssertionError when the index contradicts itself."""
        with self._lock:
            self._index.check_integrity()

    def close(self) -> None:
        """Release the arena."""
        self._arena.close()


def load_index(arena: Arena, index: BlockIndex) -> None:
    """Enter what an arena holds into an empty index; what cannot be used is erased."""
    for entry in arena.entries():
        if index.load(entry.key, entry.parent, entry.slot, entry.digest, entry.tick) is None:
            arena.erase(entry.slot)
    for block in index.finish_loading():
        arena.erase(block.slot)


def verify(arena: Arena) -> tuple[int, int]:
    """Read every payload of an arena and erase what is damaged, with its continuations: (sound, erased) blocks."""
    index = BlockIndex(arena.geometry.n_blocks)
    load_index(arena, index)
    erased = 0
    for block in index.all_blocks():
        if index.get(block.key) is block and blake3(arena.read(block.slot)).digest() != block.digest:
            gone = index.remove(block)
            erased += len(gone)
            for each in gone:
                arena.erase(each.slot)
    return len(index), erased
