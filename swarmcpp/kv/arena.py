"""The arena: one file of fixed-size blocks for one model, hot in the page cache, cold on disk, there after a restart.

Layout, little-endian: a header page; a table of entries, one for each block; then the payloads, page-aligned. A block
is written payload first, entry last, and an entry carries the BLAKE3 of its payload, which is checked before every
use. So whatever a crash, a full disk or a stray program leaves behind is a miss, never a wrong answer.

Payloads are read and written with positioned reads and writes, not through a mapping: a mapped file that somebody
truncates, or a disk that is full, kills a process with SIGBUS, while a read just comes back short.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from swarmcpp.files import read_at, read_into, try_lock, write_at

logger = logging.getLogger(__name__)

MAGIC = b"SWARMKV\x02"
PAGE = 4096
_HEADER = struct.Struct("<8sQQ32s")
_CHECK_BYTES = 15
_ENTRY = struct.Struct(f"<32s32s32sQB{_CHECK_BYTES}s")
_NO_KEY = bytes(32)
_BINARY = getattr(os, "O_BINARY", 0)
DIGEST_BYTES = 32
LABEL_AT = 1024
"""Where in the header page the label is: two bytes of length, then UTF-8."""

MAX_LABEL = 1024
MAX_TICK = 2**62
MAX_ARENAS = 8
"""Nodes on one machine that may serve the same model from one data directory, each with an arena of its own."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """An entry of the table. `digest` is the BLAKE3 of the payload; `tick` orders entries by last use; `exact` says
    that the payload is what the model computes, bit by bit, and not what a quantised copy of it became."""

    slot: int
    key: bytes
    parent: bytes
    digest: bytes
    tick: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Hashed:
    """Bytes of a block with their BLAKE3, which whoever made this has computed of them, or compared with them."""

    data: bytes | memoryview
    digest: bytes

    @staticmethod
    def of(data: bytes | memoryview) -> Hashed:
        """Bytes that nobody has hashed yet."""
        return Hashed(data, blake3(data).digest())


@dataclass(frozen=True, slots=True)
class ArenaGeometry:
    """Where things are in the file; sizes in bytes."""

    block_bytes: int
    n_blocks: int

    @property
    def stride(self) -> int:
        """From one payload to the next."""
        return -(-self.block_bytes // PAGE) * PAGE

    @property
    def payload_start(self) -> int:
        """Offset of the first payload."""
        return PAGE + -(-self.n_blocks * _ENTRY.size // PAGE) * PAGE

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.payload_start + self.n_blocks * self.stride

    def offset(self, slot: int) -> int:
        """Offset of a payload. Raises IndexError for a slot that the arena does not have."""
        if not 0 <= slot < self.n_blocks:
            raise IndexError(f"block slot {slot} of {self.n_blocks}")
        return self.payload_start + slot * self.stride

    @staticmethod
    def within(block_bytes: int, max_bytes: int) -> ArenaGeometry:
        """The largest arena of at most `max_bytes`; it may have no block."""
        # With room for the header and a last page of table that is not full.
        room = max_bytes - 2 * PAGE
        geometry = ArenaGeometry(block_bytes, max(0, room // (ArenaGeometry(block_bytes, 0).stride + _ENTRY.size)))
        while (larger := ArenaGeometry(block_bytes, geometry.n_blocks + 1)).file_bytes <= max_bytes:
            geometry = larger
        return geometry


class Arena:
    """The writer's side of an arena file, held by one node process (a lock file keeps others out). Thread-safe."""

    def __init__(self, path: Path, geometry: ArenaGeometry, identity: bytes, lock: BinaryIO) -> None:
        self.path = path
        self.geometry = geometry
        self.identity = identity
        """Whose KV it holds, 32 bytes."""
        self._lock_file = lock
        self._lock = threading.Lock()
        self._fd = -1

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: Path,
        identity: bytes,
        block_bytes: int,
        max_bytes: int | None,
        default_bytes: int,
        label: str = "",
    ) -> Arena | None:
        """The first arena for `identity` (32 bytes) that no other node holds; created, or emptied, where needed.

        `max_bytes` None keeps the size of an existing arena and makes a new one of `default_bytes`. None when the size
        allows no block. `label` tells people what it is of; empty leaves the old one. Raises OSError when the directory
        cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for number in range(MAX_ARENAS):
            path = directory / (identity.hex()[:16] + (f"-{number}" if number else "") + ".arena")
            if lock := _try_lock(path.with_suffix(".lock")):
                return cls._open(path, identity, block_bytes, max_bytes, default_bytes, lock, label)
        raise OSError(f"{directory}: {MAX_ARENAS} other nodes hold the arenas of this model; use another --data-dir")

    @classmethod
    def open_file(cls, path: Path) -> Arena | None:
        """An existing arena as it is, for its care; None when a node holds it. Raises OSError when it is no arena."""
        known = read_header(path)
        if known is None:
            raise OSError(f"{path} is no arena of this version of swarmcpp; `swarmcpp cache clear` removes it")
        lock = _try_lock(path.with_suffix(".lock"))
        return cls._open(path, known[1], known[0].block_bytes, None, 0, lock) if lock else None

    @staticmethod
    def count(path: Path, geometry: ArenaGeometry) -> int:
        """Entries of an arena that another process may be using; 0 when it cannot be read."""
        try:
            with path.open("rb") as file:
                table = read_at(file.fileno(), geometry.n_blocks * _ENTRY.size, PAGE)
        except OSError:
            return 0
        return sum(1 for _ in _sound_entries(table))

    @staticmethod
    def remove(path: Path) -> bool:
        """Delete an arena file; False when a node holds it."""
        lock_path = path.with_suffix(".lock")
        lock = _try_lock(lock_path)
        if lock is None:
            return False
        with lock:
            path.unlink(missing_ok=True)
        return True

    @classmethod
    def _open(
        cls,
        path: Path,
        identity: bytes,
        block_bytes: int,
        max_bytes: int | None,
        default_bytes: int,
        lock: BinaryIO,
        label: str = "",
    ) -> Arena | None:
        with ExitStack() as undo:
            undo.callback(lock.close)
            existing = read_header(path)
            known = (
                existing[0] if existing and (existing[0].block_bytes, existing[1]) == (block_bytes, identity) else None
            )
            geometry = known if max_bytes is None else None
            geometry = geometry or ArenaGeometry.within(block_bytes, default_bytes if max_bytes is None else max_bytes)
            if not geometry.n_blocks:
                return None
            arena = cls(path, geometry, identity, lock)
            arena._fd = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o600)
            undo.callback(arena.close)
            arena._prepare(known, label)
            undo.pop_all()
            return arena

    def _prepare(self, existing: ArenaGeometry | None, label: str) -> None:
        """Make the open file an arena of this geometry; `existing` is what it has."""
        size = os.fstat(self._fd).st_size
        if existing != self.geometry:
            if size:
                logger.warning("%s is of another model, version or size: starting it empty", self.path)
            self._format()
        # A file that was cut short reads as zeros where it was cut, and zeros match no digest.
        elif size < self.geometry.file_bytes:
            os.truncate(self._fd, self.geometry.file_bytes)
        if label:
            self._write_label(label)

    def _format(self) -> None:
        os.truncate(self._fd, 0)
        # Sparse: blocks take disk only once they are written.
        os.truncate(self._fd, self.geometry.file_bytes)
        header = _HEADER.pack(MAGIC, self.geometry.block_bytes, self.geometry.n_blocks, self.identity)
        write_at(self._fd, header + blake3(header).digest(), 0)

    def _write_label(self, label: str) -> None:
        data = label.encode("utf-8", "replace")[:MAX_LABEL]
        write_at(self._fd, len(data).to_bytes(2, "little") + data, LABEL_AT)

    def entries(self) -> Iterator[StoredBlock]:
        """Every sound entry of the table, in slot order. Payloads are not read."""
        yield from _sound_entries(read_at(self._fd, self.geometry.n_blocks * _ENTRY.size, PAGE))

    # -- blocks --------------------------------------------------------------------------------------------------

    def write(self, slot: int, payload: bytes | memoryview) -> None:
        """Put a payload into a slot whose entry was erased. Raises OSError (a full disk, say)."""
        with self._descriptor() as fd:
            write_at(fd, payload, self.geometry.offset(slot))

    def enter(self, block: StoredBlock) -> None:
        """Enter a block whose payload is in its slot. Raises OSError; the slot is then as good as empty."""
        check = _check(block.slot, block.key, block.parent, block.digest, block.exact)
        entry = _ENTRY.pack(block.key, block.parent, block.digest, block.tick, block.exact, check)
        with self._lock:
            write_at(self._fd, entry, PAGE + block.slot * _ENTRY.size)

    def read(self, slot: int) -> bytes:
        """A payload as it is in the file; shorter than a block when the file was cut. Raises OSError."""
        with self._descriptor() as fd:
            return read_at(fd, self.geometry.block_bytes, self.geometry.offset(slot))

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        # One of its own: payloads take long, and the number of a descriptor that `close` closes meanwhile may be
        # another file's before the payload is through.
        with self._lock:
            fd = os.dup(self._fd)
        try:
            yield fd
        finally:
            os.close(fd)

    def erase(self, slot: int) -> None:
        """Forget a block, as must be done before its slot is written again; its bytes stay until then."""
        with self._lock, suppress(OSError):
            write_at(self._fd, bytes(_ENTRY.size), PAGE + slot * _ENTRY.size)

    def touch(self, slot: int, tick: int) -> None:
        """Note a use, so that the order of eviction survives a restart."""
        with self._lock, suppress(OSError):
            write_at(self._fd, struct.pack("<Q", tick), PAGE + slot * _ENTRY.size + 96)

    def in_place(self) -> bool:
        """Whether the open file is still the one that its path names, for others to open."""
        try:
            return self._fd >= 0 and os.path.samestat(os.fstat(self._fd), self.path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Release the file and the lock."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._lock_file.close()


class ArenaFile:
    """An engine's view of its node's arena: payloads only. Satisfies `core.BlockFile`."""

    def __init__(self, path: Path, geometry: ArenaGeometry) -> None:
        """Raises OSError when the file cannot be opened."""
        self._geometry = geometry
        self._failing = False
        self._fd = os.open(path, os.O_RDWR | _BINARY)

    def read_into(self, slot: int, target: memoryview) -> bool:
        """See `core.BlockFile`."""
        try:
            return read_into(self._fd, target, self._geometry.offset(slot)) == len(target)
        except (OSError, IndexError):
            return False

    def write(self, slot: int, payload: memoryview) -> bool:
        """See `core.BlockFile`."""
        if len(payload) != self._geometry.block_bytes:
            return False
        try:
            write_at(self._fd, payload, self._geometry.offset(slot))
        except (OSError, IndexError) as error:
            # Once: a disk that is full stays so for a while.
            if not self._failing:
                logger.warning("cannot write a block: %s", error)
            self._failing = True
            return False
        self._failing = False
        return True

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)


def read_header(path: Path) -> tuple[ArenaGeometry, bytes] | None:
    """Geometry and identity of an arena file; None when it is no sound arena of this version."""
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER.size + DIGEST_BYTES)
    except OSError:
        return None
    if len(raw) < _HEADER.size + DIGEST_BYTES or blake3(raw[: _HEADER.size]).digest() != raw[_HEADER.size :]:
        return None
    magic, block_bytes, n_blocks, identity = _HEADER.unpack_from(raw)
    return (ArenaGeometry(block_bytes, n_blocks), identity) if magic == MAGIC and block_bytes and n_blocks else None


def _sound_entries(table: bytes) -> Iterator[StoredBlock]:
    for slot in range(len(table) // _ENTRY.size):
        key, parent, digest, tick, exact, check = _ENTRY.unpack_from(table, slot * _ENTRY.size)
        if key != _NO_KEY and check == _check(slot, key, parent, digest, exact)[:_CHECK_BYTES]:
            # No check covers a tick, which changes with every use. A damaged one must leave room to count on.
            yield StoredBlock(slot, key, parent, digest, tick if tick <= MAX_TICK else 0, bool(exact))


def read_label(path: Path) -> str:
    """What an arena file says it is of; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            page = file.read(PAGE)
    except OSError:
        return ""
    length = int.from_bytes(page[LABEL_AT : LABEL_AT + 2], "little")
    return page[LABEL_AT + 2 : LABEL_AT + 2 + min(length, MAX_LABEL)].decode("utf-8", "replace")


def _check(slot: int, key: bytes, parent: bytes, digest: bytes, exact: int) -> bytes:
    # With the slot: an entry that was copied elsewhere in the table is not sound there.
    return blake3(slot.to_bytes(8, "little") + key + parent + digest + bytes((exact,))).digest()


def _try_lock(path: Path) -> BinaryIO | None:
    """An open file that is locked until it is closed; None when another process has it."""
    file = path.open("a+b")
    if try_lock(file):
        return file
    file.close()
    return None
