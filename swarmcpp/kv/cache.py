"""A node's prefix cache: which blocks it has, which of them a prompt can use, and what is stored next.

It joins the arena (bytes) with the index (decisions). An engine reads and writes payloads itself; this side grants it
slots, enters what it wrote, and keeps blocks in place while an engine reads them. Blocks of peers come in and go out
through this side: `insert` stores what another node computed, `read_block` gives what this one holds.

Blocks that came quantised are not exact. They serve this node's own requests, but are neither announced nor handed on,
and nor is what an engine computed on top of them: no block is quantised twice, and errors do not travel.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from swarmcpp._native import all_finite_f16
from swarmcpp.core import BlockRef
from swarmcpp.errors import SnapshotError
from swarmcpp.kv.arena import Arena, Hashed, StoredBlock
from swarmcpp.kv.index import ROOT, Block, BlockIndex
from swarmcpp.kv.keys import KvIdentity, block_keys
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

MAX_DERIVED = 16384
"""Keys that are remembered as inexact in an engine: a million tokens in blocks of 64, about 3 MB."""

PIECE_VALUES = 2048
"""Of a payload, compared by themselves. K is often a hundred times as large as V: over a whole block a V that is all
wrong would drown. One layer's K or V of a block is this large or larger in all but toy models."""


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
    """The cache of one model on one node. Thread-safe. Methods are quick, since payloads are read and written by
    `insert`, `read_block` and `compare` only, and outside the lock.

    `on_change`, when set, is called with (keys gained, keys lost) of exact blocks, in order, in whatever thread made
    the change or a later one, without the lock. It must be quick and not raise.
    """

    def __init__(self, arena: Arena, identity: KvIdentity, max_entries: int = 0) -> None:
        self._arena = arena
        self._identity = identity
        self.path = arena.path
        self.block_tokens = identity.block_tokens
        """Tokens of a block."""
        self.root = identity.root()
        """The key before the first blocks without a salt: what KV of this cache depends on beside its tokens."""
        self.arena_root = arena.identity
        """What tells this cache from all that hold other KV under the same keys, such as that of other layers."""
        self.block_bytes = arena.geometry.block_bytes
        """Bytes of a payload."""
        self.n_blocks = arena.geometry.n_blocks
        """Blocks that the arena can hold."""
        self._lock = threading.Lock()
        self._index = BlockIndex(arena.geometry.n_blocks, max_entries)
        self._stored = 0
        self._bad = 0
        self._failing = False
        self.on_change: Callable[[list[bytes], list[bytes]], None] | None = None
        self._changes: deque[tuple[list[bytes], list[bytes]]] = deque()
        self._telling = threading.Lock()
        self._derived: dict[bytes, None] = {}
        load_index(arena, self._index)

    def stats(self) -> CacheStats:
        """Counts now."""
        with self._lock:
            index = self._index
            return CacheStats(len(index), self.n_blocks, self.block_bytes, index.evictions, self._stored, self._bad)

    def keys(self, tokens: Sequence[int], salt: str) -> list[bytes]:
        """Keys of the full blocks of a token sequence."""
        return block_keys(self._identity.root(salt), tokens, self.block_tokens)

    def _usable(self, tokens: Sequence[int], salt: str) -> list[bytes]:
        # The last token's logits are needed, so its block is never taken whole.
        return self.keys(tokens[: max(0, len(tokens) - 1)], salt)

    # -- reading -------------------------------------------------------------------------------------------------

    def held(self, tokens: Sequence[int], salt: str) -> tuple[list[bytes], int]:
        """Keys of the full blocks of a prompt that can be used, and how many of them, from the first, are here."""
        keys = self._usable(tokens, salt)
        return keys, self.held_keys(keys)

    def held_keys(self, keys: Sequence[bytes]) -> int:
        """How many blocks of a chain, from the first, are here."""
        with self._lock:
            return len(self._index.match(keys))

    def exact_keys(self, keys: Sequence[bytes]) -> int:
        """How many blocks of a chain, from the first, are here exactly as they were computed from exact rows."""
        with self._lock:
            blocks = self._index.match(keys)
        return next((number for number, block in enumerate(blocks) if not block.exact), len(blocks))

    def lease(self, tokens: Sequence[int], salt: str) -> Lease:
        """The stored beginning of `tokens`, kept in place until released. At least one token is left to compute."""
        return self.lease_keys(self._usable(tokens, salt), len(tokens))

    def lease_keys(self, keys: Sequence[bytes], n_tokens: int) -> Lease:
        """The stored beginning of a chain of blocks, which is that of `n_tokens` tokens, kept until released."""
        begun = time.perf_counter()
        with self._lock:
            blocks = self._index.match(keys)
            for number, block in enumerate(blocks):
                if not block.exact:
                    self._derive(keys[number : len(blocks)])
                    break
            self._index.use(blocks)
            for block in blocks:
                block.pins += 1
            refs = tuple(BlockRef(block.slot, block.digest, block.finite) for block in blocks)
            tick = self._index.tick
        if blocks:
            self._arena.touch(blocks[-1].slot, tick)
        event = "prefix-cache HIT" if blocks else "prefix-cache MISS"
        found = len(blocks) * self.block_tokens
        diag(logger, event, tokens=found, of=n_tokens, ms=round(1000 * (time.perf_counter() - begun), 3))
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
            sound = used_tokens // self.block_tokens
            for block in lease.blocks[:sound]:
                block.finite = True
            if sound < len(lease.blocks) and self._index.get(lease.keys[sound]) is lease.blocks[sound]:
                self._drop_damaged(lease.blocks[sound])
        self._tell()

    def _drop_damaged(self, block: Block) -> None:
        dropped = self._remove(block)
        self._bad += 1
        # A file that was damaged once has more such blocks: one line is enough.
        level = logging.WARNING if self._bad == 1 else logging.DEBUG
        logger.log(level, "%s: a block is damaged; %d blocks are dropped", self.path, dropped)

    # -- writing -------------------------------------------------------------------------------------------------

    def grant(self, tokens: Sequence[int], salt: str) -> Grant:
        """Reserve arena slots for the full blocks of `tokens` that are not stored."""
        return self.grant_keys(self.keys(tokens, salt))

    def grant_keys(self, keys: Sequence[bytes], *, exact: bool = True) -> Grant:
        """Reserve arena slots for those blocks of a chain that are not stored. `exact`: nothing that they were computed
        from was quantised, as far as the caller knows."""
        grants: list[tuple[int, int]] = []
        blocks: dict[int, Block] = {}
        with self._lock:
            parent = ROOT
            for number, key in enumerate(keys):
                exact = exact and key not in self._derived
                known = self._index.get(key)
                if known is None:
                    block = self._reserve(key, parent)
                    if block is None:
                        break
                    block.exact = exact
                    if not exact:
                        self._derive((key,))
                    grants.append((number, block.slot))
                    blocks[block.slot] = block
                parent = key
        self._tell()
        return Grant(tuple(grants), blocks)

    def grant_check(self, tokens: Sequence[int], salt: str) -> tuple[Grant, bytes]:
        """Reserve a slot for the last block of `tokens` alone, to be compared and dropped: (grant, its key).

        The block is not exact, so nobody hears of it; the grant is empty when there is no room.
        """
        key = self.keys(tokens, salt)[-1]
        with self._lock:
            block = self._reserve(key, ROOT, copy=True)
            if block:
                block.exact = False
        self._tell()
        number = len(tokens) // self.block_tokens - 1
        return (Grant(((number, block.slot),), {block.slot: block}) if block else Grant(())), key

    def _reserve(self, key: bytes, parent: bytes, *, copy: bool = False) -> Block | None:
        """`BlockIndex.reserve`, with the entries of what had to go and of the new slot erased."""
        block, evicted = self._index.reserve(key, parent, copy=copy)
        self._erase(evicted)
        for gone in evicted:
            diag(logger, "prefix-cache evict", slot=gone.slot)
        if block:
            self._arena.erase(block.slot)
        return block

    def _derive(self, keys: Iterable[bytes]) -> None:
        """An engine has KV of `keys` that is not exact, and keeps it for as long as it likes."""
        self._derived.update(dict.fromkeys(keys))
        while len(self._derived) > MAX_DERIVED:
            del self._derived[next(iter(self._derived))]

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
                    self._remove(block)
                else:
                    entered += 1
            self._stored += entered
        self._tell()
        if entered:
            diag(logger, "prefix-cache insert", blocks=entered, tokens=entered * self.block_tokens)
        return entered

    def _enter(self, block: Block, digest: bytes) -> bool:
        try:
            self._arena.enter(StoredBlock(block.slot, block.key, block.parent, digest, block.tick, block.exact))
        except OSError as error:
            self._cannot("enter", error)
            return False
        self._failing = False
        self._index.commit(block, digest)
        if block.exact:
            self._changes.append(([block.key], []))
        return True

    def _cannot(self, what: str, error: OSError) -> None:
        if not self._failing:
            logger.warning("%s: cannot %s a block: %s", self.path, what, error)
        self._failing = True

    # -- peers ---------------------------------------------------------------------------------------------------

    def all_keys(self) -> list[bytes]:
        """Keys of all exact blocks."""
        with self._lock:
            return [block.key for block in self._index.all_blocks() if block.exact]

    def insert(self, keys: Sequence[bytes], first: int, payloads: Sequence[Hashed], *, exact: bool) -> int:
        """Store the blocks of keys[first : first + len(payloads)], whose predecessors are here, as a peer sent them.

        Returns how many of them, from the first, are here now: fewer than payloads when there is no room, or when the
        file cannot be written. What is here already is left, but for a block that is not exact where an exact one
        comes. Raises SnapshotError for a payload that is no block; those before it are stored.
        """
        if first + len(payloads) > len(keys):
            raise SnapshotError(f"{len(payloads)} blocks from block {first} of a chain of {len(keys)}")
        chain: list[Block] = []
        try:
            for number, payload in enumerate(payloads, first):
                self._check(number, payload.data)
                with self._lock:
                    block = self._claim(keys[number], keys[number - 1] if number else ROOT, exact)
                    if block is None:
                        break
                    # Until the next one is there, nothing but this keeps the end of the chain from eviction.
                    block.pins += 1
                    chain.append(block)
                    wanted = not block.ready
                if wanted and not self._fill(block, payload, exact):
                    break
            else:
                return len(payloads)
            return number - first
        finally:
            with self._lock:
                for block in chain:
                    block.pins -= 1
            self._tell()

    def _check(self, number: int, payload: bytes | memoryview) -> None:
        size = memoryview(payload).nbytes
        if size != self.block_bytes:
            raise SnapshotError(f"block {number} has {size} bytes where {self.block_bytes} are right")
        if not all_finite_f16(np.frombuffer(payload, np.uint8)):
            raise SnapshotError(f"block {number} has values that are not finite")

    def _claim(self, key: bytes, parent: bytes, exact: bool) -> Block | None:
        """The block of a key: ready, or to be written by the caller. None when that cannot be."""
        known = self._index.get(key)
        if known is None:
            return self._reserve(key, parent, copy=True)
        if not known.ready:
            return None
        if exact and not known.exact and not known.pins:
            self._index.reopen(known)
            self._arena.erase(known.slot)
        return known

    def _fill(self, block: Block, payload: Hashed, exact: bool) -> bool:
        """Write a claimed block; a failure drops it with its continuations."""
        written = True
        try:
            self._arena.write(block.slot, payload.data)
        except OSError as error:
            self._cannot("write", error)
            written = False
        with self._lock:
            if self._index.get(block.key) is not block:
                return False
            block.exact = exact
            if written and self._enter(block, payload.digest):
                self._stored += 1
                return True
            self._remove(block)
        return False

    def read_block(self, key: bytes) -> Hashed | None:
        """The payload of an exact block, as another node may have it; None when there is none. A damaged one goes."""
        return self._read(key, exact=True)

    def _read(self, key: bytes, *, exact: bool = False) -> Hashed | None:
        with self._lock:
            block = self._index.get(key)
            if block is None or not block.ready or (exact and not block.exact):
                return None
            block.pins += 1
        payload = None
        try:
            payload = Hashed.of(self._arena.read(block.slot))
        except OSError as error:
            self._cannot("read", error)
        sound = payload is not None and payload.digest == block.digest
        with self._lock:
            block.pins -= 1
            if payload is not None and not sound and self._index.get(key) is block:
                self._drop_damaged(block)
        self._tell()
        return payload if sound else None

    def compare(self, key: bytes, reference: bytes) -> float | None:
        """How far a block is from another that should be its equal: RMS of the difference over RMS of the reference,
        in the worst of the pieces of PIECE_VALUES values. None when one of them is not here."""
        payload, expected = self._read(key), self._read(reference)
        return None if payload is None or expected is None else relative_rms(payload.data, expected.data)

    def drop(self, keys: Iterable[bytes]) -> int:
        """Forget blocks together with all that continues them; how many were dropped."""
        dropped = 0
        with self._lock:
            for key in keys:
                block = self._index.get(key)
                dropped += self._remove(block) if block else 0
        self._tell()
        return dropped

    def _remove(self, block: Block) -> int:
        gone = self._index.remove(block)
        self._erase(gone)
        return len(gone)

    def _erase(self, gone: Iterable[Block]) -> None:
        """Blocks that left the index leave the file."""
        dropped = []
        for block in gone:
            self._arena.erase(block.slot)
            if block.ready and block.exact:
                dropped.append(block.key)
        if dropped:
            self._changes.append(([], dropped))

    def _tell(self) -> None:
        """Report changes. Whoever finds another thread at it leaves its own to that one, so the order holds."""
        while self._changes and self._telling.acquire(blocking=False):
            try:
                while self._changes:
                    added, dropped = self._changes.popleft()
                    if self.on_change:
                        self.on_change(added, dropped)
            finally:
                self._telling.release()

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
        if index.load(entry.key, entry.parent, entry.slot, entry.digest, entry.tick, entry.exact) is None:
            arena.erase(entry.slot)
    for block in index.finish_loading():
        arena.erase(block.slot)


def verify(arena: Arena) -> tuple[int, int]:
    """Read every payload of an arena and erase what is damaged, with its continuations: (sound, erased) blocks."""
    index = BlockIndex(arena.geometry.n_blocks)
    load_index(arena, index)
    erased = 0
    for block in index.all_blocks():
        if index.get(block.key) is block and Hashed.of(arena.read(block.slot)).digest != block.digest:
            gone = index.remove(block)
            erased += len(gone)
            for each in gone:
                arena.erase(each.slot)
    return len(index), erased


def relative_rms(payload: bytes | memoryview, reference: bytes | memoryview) -> float:
    """RMS of the difference of two payloads of halves over RMS of the reference, in the worst piece of PIECE_VALUES."""
    got, expected = (np.frombuffer(each, "<f2").astype(np.float32) for each in (payload, reference))
    starts = np.arange(0, expected.size, PIECE_VALUES)
    # In double: the squares of large halves sum up to more than single precision tells apart.
    error, scale = (np.add.reduceat(each.astype(np.float64) ** 2, starts) for each in (got - expected, expected))
    ratio = np.divide(error, scale, out=np.where(error > 0, np.inf, 0.0), where=scale > 0)
    return float(np.sqrt(ratio.max()))
