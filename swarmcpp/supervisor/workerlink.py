"""The engine's end of the link to its node (nodelink.py). Without asyncio, which no engine needs: 9 MiB of each."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from swarmcpp.supervisor.framing import HEADER, READ_BYTES, Ticket, pieces, sizes
from swarmcpp.wire.codec import Buffer
from swarmcpp.wire.engine import FromEngine, Stop, ToEngine, decode, encode

LINGER_S: Final = 1.0

_yield: Final[Callable[[], None]] = getattr(os, "sched_yield", lambda: time.sleep(0))


class WorkerLink:
    """The engine's end. Satisfies `EngineLink` and `StageLink`."""

    def __init__(self, ticket: Ticket) -> None:
        """Raises OSError when the node is not there."""
        self.frame: bytes | None = None
        kind, _, where = ticket["endpoint"].partition(":")
        if kind == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(where)
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(where)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(bytes.fromhex(ticket["secret"]))
        self._buffer = b""
        """What was read beyond the last message."""

    def receive(self, timeout_s: float, poll_s: float = 0.0) -> ToEngine | None:
        """See `StageLink`. Stop when the node has closed its end."""
        if not self._buffer and not (poll_s and self._watch(poll_s)) and not self._wait(timeout_s):
            return None
        if not self._fill(HEADER.size):
            return Stop()
        size, beside = sizes(self._buffer, 0)
        middle = HEADER.size + size
        end = middle + max(beside, 0)
        if not self._fill(end):
            return Stop()
        buffer, self._buffer = self._buffer, self._buffer[end:]
        self.frame = buffer[middle:end] if beside >= 0 else None
        return decode(buffer[HEADER.size : middle])  # type: ignore[return-value]

    def _wait(self, timeout_s: float) -> bool:
        """Whether there is something to read within that time."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def _watch(self, poll_s: float) -> bool:
        """The same without sleeping; other processes get the core all the same, as the node may need it."""
        end = time.monotonic() + poll_s
        while not self._wait(0):
            if time.monotonic() >= end:
                return False
            _yield()
        return True

    def _fill(self, size: int) -> bool:
        """Read until `size` bytes are there; False at the end of the stream. A node writes whole messages."""
        if len(self._buffer) >= size:
            return True
        read, count = [self._buffer], len(self._buffer)
        while count < size:
            piece = self._socket.recv(max(READ_BYTES, size - count))
            if not piece:
                return False
            read.append(piece)
            count += len(piece)
        self._buffer = b"".join(read)
        return True

    def send(self, message: FromEngine, frame: Buffer | None = None) -> None:
        """See `StageLink`. Waits while the node does not read. Raises ConnectionError when it is gone."""
        self._socket.sendall(b"".join(pieces(encode(message), frame)))

    def close(self, linger_s: float = LINGER_S) -> None:
        """Close when the node has read all, or after `linger_s`: what it writes meanwhile must not cost it that."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(linger_s)
            while linger_s and self._socket.recv(READ_BYTES):
                pass
        self._socket.close()
