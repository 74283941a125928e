"""What a model's files are made of: chunks with digests, and from these the fingerprint that says which model it is.

Two models with one fingerprint give the same KV for the same tokens, and every chunk can be checked alone.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from swarmcpp.errors import BadModel
from swarmcpp.files import read_into

CHUNK_BYTES = 4 << 20
"""Bytes that have one digest: a thirtieth of a second at 1 Gbit/s, and 32 bytes of manifest for each 4 MiB."""
DIGEST_BYTES = blake3.digest_size
SUFFIX = ".gguf"

MAX_FILES = 4096
MAX_FILE_BYTES = 1 << 42
MAX_NAME_BYTES = 200
"""Below the 255 of file systems: a fingerprint's beginning, ".part" and the like are added to names."""
MAX_MANIFEST_BYTES = 16 << 20
"""Of an encoded manifest: models up to 2 TiB."""

_MAGIC = b"swarmcpp manifest 1\n"
_FINGERPRINT = b"swarmcpp model 1\n"
_COUNT = struct.Struct("<I")
_FILE = struct.Struct("<HQ")
"""Bytes of the name, bytes of the file; name and digests follow."""
_SIZE = struct.Struct("<Q")
_SEPARATORS = frozenset('/\\:*?"<>|')
"""What separates paths, or is not allowed in a name, on some system."""
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file: its plain name, its bytes, and the BLAKE3 of each of its chunks in order."""

    name: str
    size: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FileChunk:
    """`size` bytes from `offset` of file number `file`, with their BLAKE3."""

    file: int
    offset: int
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one model, those of a split in their order. Raises BadModel when it could not be of any model."""

    files: tuple[ManifestFile, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.files) <= MAX_FILES:
            raise _bad(f"has {len(self.files)} files, possible are 1 to {MAX_FILES}")
        if len({file.name.casefold() for file in self.files}) != len(self.files):
            raise _bad("has two files of one name")
        for file in self.files:
            if plain_name(file.name) != file.name:
                raise _bad(f"has the file name {file.name[:80]!r}, which is not plain")
            if not 1 <= file.size <= MAX_FILE_BYTES:
                raise _bad(f"has a file of {file.size} bytes, possible are 1 to {MAX_FILE_BYTES}")
            if len(file.digests) != n_chunks(file.size) or any(len(one) != DIGEST_BYTES for one in file.digests):
                raise _bad(f"has {len(file.digests)} digests for a file of {file.size} bytes, or wrong ones")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def n_chunks(self) -> int:
        """Chunks of all files."""
        return sum(len(file.digests) for file in self.files)

    @property
    def fingerprint(self) -> bytes:
        """BLAKE3 over sizes and digests, 32 bytes. Names are no part of it: a renamed copy is the same model."""
        whole = blake3(_FINGERPRINT + _COUNT.pack(len(self.files)))
        for file in self.files:
            whole.update(_SIZE.pack(file.size) + b"".join(file.digests))
        return whole.digest()

    def chunk(self, index: int) -> FileChunk:
        """Chunk `index`, counted over all files. Raises IndexError outside 0 to n_chunks - 1."""
        left = index
        for number, file in enumerate(self.files):
            if 0 <= left < len(file.digests):
                offset = left * CHUNK_BYTES
                return FileChunk(number, offset, min(CHUNK_BYTES, file.size - offset), file.digests[left])
            left -= len(file.digests)
        raise IndexError(index)

    def to_bytes(self) -> bytes:
        """The manifest as peers and memos have it."""
        parts = [_MAGIC, _COUNT.pack(len(self.files))]
        for file in self.files:
            name = file.name.encode()
            parts += (_FILE.pack(len(name), file.size), name, *file.digests)
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Manifest:
        """The manifest that `to_bytes` wrote. Raises BadModel on anything else."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise _bad(f"has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
        data = bytes(data)
        if not data.startswith(_MAGIC):
            raise _bad(f"starts with {data[:20]!r}")
        try:
            files, end = _files(data, len(_MAGIC))
        except (struct.error, UnicodeDecodeError) as error:
            raise _bad(f"cannot be decoded ({error})") from None
        if end != len(data):
            raise _bad("is not as long as its files say")
        return cls(files)


def _files(data: bytes, at: int) -> tuple[tuple[ManifestFile, ...], int]:
    (count,) = _COUNT.unpack_from(data, at)
    at += _COUNT.size
    files: list[ManifestFile] = []
    # Each turn takes bytes, so a wrong count ends at the end of the data.
    for _ in range(count):
        name_bytes, size = _FILE.unpack_from(data, at)
        at += _FILE.size
        name = data[at : at + name_bytes].decode()
        at += name_bytes
        end = at + n_chunks(size) * DIGEST_BYTES
        if end > len(data):
            raise _bad("ends before its digests")
        digests = tuple(data[start : start + DIGEST_BYTES] for start in range(at, end, DIGEST_BYTES))
        files.append(ManifestFile(name, size, digests))
        at = end
    return tuple(files), at


def n_chunks(size: int) -> int:
    """Chunks of a file of `size` bytes."""
    return -(-size // CHUNK_BYTES)


def plain_name(name: str) -> str:
    """`name` as a file name for every system: printable, no separators, not hidden, ending in .gguf, and not too long.

    The end is kept when it is too long: it has the numbers of a split.
    """
    stem = "".join(c if c.isprintable() and c not in _SEPARATORS else "_" for c in name.removesuffix(SUFFIX))
    stem = stem.encode()[-(MAX_NAME_BYTES - len(SUFFIX)) :].decode(errors="ignore")
    return ("_" + stem[1:] if stem.startswith(".") else stem or "model") + SUFFIX


def manifest_of(files: Sequence[Path], cache_dir: Path) -> Manifest:
    """The manifest of a model's files. Blocking: hashes them with several threads, which can take seconds.

    Remembered in `cache_dir` by path, size and time of change. Raises BadModel when a file cannot be read.
    """
    facts: list[tuple[str, int, int]] = []
    for path in files:
        try:
            status = path.stat()
            facts.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise BadModel(f"{path}: cannot read it: {error.strerror}") from error
    key = blake3(json.dumps(facts).encode()).hexdigest()
    memo = cache_dir / "fingerprints" / f"{key}.manifest"
    known = _recall(memo)
    if known is None:
        known = Manifest(tuple(_hashed(path, size) for path, (_, size, _) in zip(files, facts, strict=True)))
        _remember(memo, known)
    return known


def _recall(memo: Path) -> Manifest | None:
    with suppress(OSError, BadModel):
        data = memo.read_bytes()
        if blake3(data[DIGEST_BYTES:]).digest() == data[:DIGEST_BYTES]:
            return Manifest.from_bytes(data[DIGEST_BYTES:])
    return None


def _remember(memo: Path, manifest: Manifest) -> None:
    data = manifest.to_bytes()
    # Without a memo the next start hashes again, no more.
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        scratch = memo.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(blake3(data).digest() + data)
        scratch.replace(memo)


def _hashed(path: Path, size: int) -> ManifestFile:
    if not size:
        raise BadModel(f"{path}: is empty (0 bytes), not a GGUF file; download it again")
    try:
        digests = chunk_digests(path, size)
    except OSError as error:
        raise BadModel(f"{path}: cannot read it: {error.strerror}") from error
    whole = tuple(digest for digest in digests if digest is not None)
    if len(whole) < len(digests):
        raise BadModel(f"{path}: became shorter while it was read; wait until nothing writes to it")
    return ManifestFile(plain_name(path.name), size, whole)


def chunk_digests(path: Path, size: int) -> list[bytes | None]:
    """BLAKE3 of each chunk of the first `size` bytes; None for a chunk that the file ends in. Raises OSError."""
    own = threading.local()
    with path.open("rb") as file:
        fd = file.fileno()
        # What does not exist at all is not worth a turn each: an unfinished file may lack most of it.
        there = n_chunks(min(size, os.fstat(fd).st_size))

        def digest(number: int) -> bytes | None:
            # One buffer for each thread: fresh pages for every chunk would cost as much as hashing it.
            if not hasattr(own, "buffer"):
                own.buffer = memoryview(bytearray(CHUNK_BYTES))
            offset = number * CHUNK_BYTES
            chunk = own.buffer[: min(CHUNK_BYTES, size - offset)]
            return blake3(chunk).digest() if read_into(fd, chunk, offset) == len(chunk) else None

        # Neither reading nor hashing holds the GIL.
        with ThreadPoolExecutor(_THREADS) as pool:
            return [*pool.map(digest, range(there)), *[None] * (n_chunks(size) - there)]


def _bad(fault: str) -> BadModel:
    return BadModel(f"a model's manifest {fault}; it is damaged, or of another version: update swarmcpp on both sides")
