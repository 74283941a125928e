"""The unfinished file of a download: NAME.part, a sidecar that says what it is a part of, and a lock."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from swarmcpp.errors import DownloadFailed
from swarmcpp.files import try_lock


@dataclass(frozen=True, slots=True)
class Source:
    """What a server said the bytes belong to. `validator` is a strong ETag or a date; empty when it gave none."""

    url: str
    validator: str
    size: int | None
    """Bytes of the whole file; None when the server did not say."""


class PartialFile:
    """NAME.part and NAME.part.json beside the final NAME. Blocking; the caller holds the lock."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + ".part")
        self._sidecar = final.with_name(final.name + ".part.json")

    @property
    def size(self) -> int:
        """Bytes so far; 0 when there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def resumable(self, url: str) -> Source | None:
        """What the existing part belongs to, when it can be continued: same URL, and a validator to ask with."""
        try:
            source = msgspec.json.decode(self._sidecar.read_bytes(), type=Source)
        except (OSError, ValueError, msgspec.DecodeError):
            return None
        if source.url != url or not source.validator or self.size == 0:
            return None
        return source

    def open(self, source: Source, *, append: bool) -> BinaryIO:
        """The part, to be written to: at its end, or from the start with `source` as its new origin."""
        if not append:
            self.path.unlink(missing_ok=True)
            self._sidecar.write_bytes(msgspec.json.encode(source))
        return self.path.open("ab")

    def sha256(self) -> str:
        """Hex digest of the bytes so far."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def start(self, n_bytes: int) -> bytes:
        """The first bytes of the part."""
        with self.path.open("rb") as file:
            return file.read(n_bytes)

    def discard(self) -> None:
        """Remove the part and its sidecar."""
        self.path.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def commit(self) -> Path:
        """Give the part its final name, after its bytes are on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(self.final)
        self._sidecar.unlink(missing_ok=True)
        return self.final


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Only one download of `final` at a time, in this process or another; ends with the process that holds it.

    Creates the directory. Raises DownloadFailed when another holds the lock.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(final.name + ".lock")
    file = path.open("ab")
    try:
        # A holder that has just finished has removed the file: its lock on the removed one would keep nobody out.
        if not try_lock(file) or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise DownloadFailed(f"{final}: another swarmcpp is downloading it now; wait for it, or stop it first")
        try:
            yield
        finally:
            _remove_lock(path, file)
    finally:
        file.close()


def _remove_lock(path: Path, file: BinaryIO) -> None:
    if sys.platform == "win32":
        # An open file cannot be removed on Windows; an empty lock file is left behind.
        return
    # Removed while still held, so that nobody can lock the old file and miss the new one.
    path.unlink(missing_ok=True)
