"""A small cache on a real file, with a stand-in for its engine: blocks whose payload follows from their key."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from swarmcpp._native import all_finite_f16
from swarmcpp.core import BlockFile
from swarmcpp.kv.arena import Arena, ArenaFile, ArenaGeometry
from swarmcpp.kv.cache import Grant, Lease, PrefixCache
from swarmcpp.kv.keys import KvIdentity

BLOCK_BYTES = 600
BLOCK_TOKENS = 4
IDENTITY = KvIdentity(fingerprint=bytes(range(32)), block_tokens=BLOCK_TOKENS, kv_types=(1, 1))


def payload_of(key: bytes) -> bytes:
    """BLOCK_BYTES of finite halves."""
    raw = bytearray(blake3(key).digest(length=BLOCK_BYTES))
    # An exponent with a bit that is not set is neither infinite nor NaN.
    raw[1::2] = bytes(byte & 0xBF for byte in raw[1::2])
    return bytes(raw)


def size_of(n_blocks: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Bytes of an arena of so many blocks."""
    return ArenaGeometry(block_bytes, n_blocks).file_bytes


def open_arena(directory: Path, n_blocks: int | None = 16, identity: KvIdentity = IDENTITY) -> Arena:
    """`n_blocks` None takes an arena as it is."""
    size = None if n_blocks is None else size_of(n_blocks)
    arena = Arena.open(directory, identity.root(), BLOCK_BYTES, size, size_of(16))
    assert arena is not None
    return arena


def chain(name: int, n_blocks: int) -> tuple[int, ...]:
    """Tokens of exactly `n_blocks` blocks."""
    return tuple(range(1000 * name, 1000 * name + BLOCK_TOKENS * n_blocks))


@dataclass(slots=True)
class Rig:
    """A cache and what an engine does with it. `file` may be any BlockFile."""

    cache: PrefixCache
    file: BlockFile

    def payloads(self, tokens: Sequence[int], grant: Grant, salt: str = "") -> list[tuple[int, bytes]]:
        """Write the blocks of a grant; (arena slot, digest) of each that could be written."""
        keys = self.cache.keys(tokens, salt)
        written = []
        for number, slot in grant.grants:
            payload = payload_of(keys[number])
            if self.file.write(slot, memoryview(payload)):
                written.append((slot, blake3(payload).digest()))
        return written

    def store(self, tokens: Sequence[int], salt: str = "") -> int:
        """Store what is not there; the number of blocks entered."""
        grant = self.cache.grant(tokens, salt)
        return self.cache.enter(grant, self.payloads(tokens, grant, salt))

    def sound(self, lease: Lease) -> int:
        """How many blocks of a lease are sound, from the first, as `LlamaBackend.load_blocks` judges.

        Whatever is judged sound must be the very payload of its key.
        """
        payload = np.empty(BLOCK_BYTES, np.uint8)
        for count, (ref, key) in enumerate(zip(lease.refs, lease.keys, strict=True)):
            read = self.file.read_into(ref.slot, payload.data)
            if not read or blake3(payload).digest() != ref.digest or not (ref.finite or all_finite_f16(payload)):
                return count
            assert payload.tobytes() == payload_of(key), "a wrong payload under a right key"
        return len(lease.refs)

    def recall(self, tokens: Sequence[int], salt: str = "") -> int:
        """Blocks of `tokens` that a request can use now; the node is told what was bad."""
        # One more token, since a lease leaves one to compute.
        lease = self.cache.lease((*tokens, 0), salt)
        count = self.sound(lease)
        self.cache.release(lease, count * BLOCK_TOKENS)
        return count

    def close(self) -> None:
        """Release everything."""
        if isinstance(self.file, ArenaFile):
            self.file.close()
        self.cache.close()


def open_rig(
    directory: Path, n_blocks: int | None = 16, *, max_entries: int = 0, identity: KvIdentity = IDENTITY
) -> Rig:
    """A rig on the arena of `directory`."""
    arena = open_arena(directory, n_blocks, identity)
    cache = PrefixCache(arena, identity, max_entries)
    return Rig(cache, ArenaFile(cache.path, arena.geometry))


def filled(directory: Path, *chains: tuple[int, ...], n_blocks: int = 16) -> Path:
    """An arena that holds `chains` and that nobody uses."""
    with closing(open_rig(directory, n_blocks)) as rig:
        for tokens in chains:
            assert rig.store(tokens) == len(tokens) // BLOCK_TOKENS
        return rig.cache.path
