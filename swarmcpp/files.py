"""File operations that differ between systems: advisory locks, files that are replaced as a whole, and reads and writes
at an offset."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt

    def try_lock(file: BinaryIO, *, shared: bool = False) -> bool:
        """Take a lock that lasts until the file is closed; False when another process holds it. Here none is shared."""
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    # Windows has no pread: the position of a descriptor is shared, so its users take turns.
    _turn = threading.Lock()

    def _pwrite(fd: int, data: memoryview, offset: int) -> int:
        with _turn:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)

    def _pread_into(fd: int, target: memoryview, offset: int) -> int:
        with _turn:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(target))
        target[: len(data)] = data
        return len(data)
else:
    import fcntl

    def try_lock(file: BinaryIO, *, shared: bool = False) -> bool:
        """Take a lock that lasts until the file is closed, or its process ends; False when another process holds it.

        A `shared` one bears others that are, and no exclusive one.
        """
        try:
            fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    _pwrite = os.pwrite

    def _pread_into(fd: int, target: memoryview, offset: int) -> int:
        return os.preadv(fd, [target], offset)


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`, for this user only; a crash leaves the old or the new. Raises OSError."""
    # mkstemp's files are for this user only.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_directory(path.parent)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """Make a rename in it last. Windows cannot open a directory, and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = _pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def read_into(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; the bytes read, fewer only at the end of the file. Raises OSError."""
    done = 0
    while done < len(target):
        got = _pread_into(fd, target[done:], offset + done)
        if not got:
            break
        done += got
    return done


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes from `offset`, fewer only at the end of the file. Raises OSError."""
    buffer = bytearray(size)
    return bytes(buffer[: read_into(fd, memoryview(buffer), offset)])
