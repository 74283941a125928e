"""File operations that differ between systems: advisory locks, and reads and writes at an offset."""

from __future__ import annotations

import os
import sys
import threading
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt

    def try_lock(file: BinaryIO) -> bool:
        """Take an exclusive lock that lasts until the file is closed; False when another process holds it."""
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

    def try_lock(file: BinaryIO) -> bool:
        """Take an exclusive lock that lasts until the file is closed; False when another process holds it."""
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    _pwrite = os.pwrite

    def _pread_into(fd: int, target: memoryview, offset: int) -> int:
        return os.preadv(fd, [target], offset)


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
