"""The link between a node and one incarnation of its engine: a byte stream with messages and raw frames in it.

A Unix socket in a private directory where the platform has them and its path is short enough; loopback TCP elsewhere.
Whoever connects shows the secret of the engine's ticket first. Each incarnation gets an endpoint of its own, so nothing
of a dead engine can reach its successor.

Not ZeroMQ, which is for what crosses the network: its threads cost each message of a stage two more switches between
threads, just when the caches are full of weights (see docs/architecture.md).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from swarmcpp.errors import EngineFailed, WireError
from swarmcpp.supervisor.framing import HEADER, Ticket, pieces, sizes
from swarmcpp.wire.codec import Buffer
from swarmcpp.wire.engine import FromEngine, ToEngine, decode, encode

MAX_UNSENT: Final = 512 << 20
"""Bytes that may wait for an engine. Admission bounds what a node sends below; one that far behind does not read."""

RETRY_S: Final = 0.05
_SECRET_BYTES: Final = 32
_UNIX_PATH: Final = 100
"""Characters that the path of a Unix socket may have everywhere (macOS: 103)."""

logger = logging.getLogger(__name__)

OnMessage = Callable[[FromEngine, bytes | None], None]
"""Takes a message and the frame beside it. What it raises ends the link."""


class NodeLink:
    """The node's end, on its event loop, where it must be made."""

    def __init__(self) -> None:
        """Raises OSError when no endpoint can be made."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when no message comes any more; with the error that ended it, if it was one."""
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._listener, endpoint = self._listen()
        self._listener.setblocking(False)
        self.ticket: Ticket = {"endpoint": endpoint, "secret": self._secret.hex()}
        self._accepting: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._strangers: set[asyncio.Transport] = set()
        """Who has connected and not shown the secret yet."""
        self._on_message: OnMessage = lambda _message, _frame: None

    def _listen(self) -> tuple[socket.socket, str]:
        if path := self._unix_path():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            endpoint = f"unix:{path}"
        else:
            listener = socket.socket(socket.AF_INET)
            listener.bind(("127.0.0.1", 0))
            endpoint = f"tcp:{listener.getsockname()[1]}"
        listener.listen(8)
        return listener, endpoint

    def _unix_path(self) -> str | None:
        """A path in a directory of its own; None where the platform has none, or none as long as it would be."""
        if not hasattr(socket, "AF_UNIX"):
            return None
        # Short on purpose: TMPDIR may be most of what a path may have.
        for parent in (None, "/tmp"):
            directory = tempfile.TemporaryDirectory(prefix="swarmcpp-", dir=parent, ignore_cleanup_errors=True)
            path = Path(directory.name) / "engine"
            if len(os.fsencode(path)) <= _UNIX_PATH:
                self._directory = directory
                return str(path)
            directory.cleanup()
        return None

    @property
    def connected(self) -> bool:
        """The engine has been there."""
        return self._transport is not None

    def start(self, on_message: OnMessage) -> None:
        """Take messages from the engine, which may connect from now on (one that did before waits)."""
        self._on_message = on_message
        self._accepting = asyncio.create_task(self._accept(), name="engine link")
        # Not before: its number might be another socket's while the loop still watches it.
        self._accepting.add_done_callback(lambda _: self._listener.close())

    async def _accept(self) -> None:
        """Accept until one shows the secret. Strangers can connect where there are no Unix sockets."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
                if accepted.family == socket.AF_INET:
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.connect_accepted_socket(lambda: _Stream(self), accepted)
            except OSError as error:
                # Somebody who has gone again, or no file is free for a moment.
                logger.debug("a connection to an engine's link failed: %s", error)
                await asyncio.sleep(RETRY_S)

    def _admit(self, transport: asyncio.Transport, secret: bytes) -> bool:
        """Whether a connection that begins with `secret` is the engine's."""
        if self._transport is not None or not hmac.compare_digest(secret, self._secret):
            return False
        self._transport = transport
        self._strangers.discard(transport)
        self._shut()
        return True

    def _shut(self) -> None:
        """Let nobody in any more."""
        if self._accepting:
            self._accepting.cancel()
        else:
            self._listener.close()
        for stranger in self._strangers:
            stranger.abort()
        self._strangers.clear()

    def _take(self, message: bytes, frame: bytes | None) -> None:
        if not self.ended.done():
            try:
                self._on_message(decode(message), frame)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 - whoever waits for `ended` deals with it
                self.end(error)

    def end(self, error: Exception | None = None) -> None:
        """Take no more messages; those to the engine still go out."""
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
            # Read already: what the loop would complain of is that nobody asked.
            self.ended.exception()

    def send(self, message: ToEngine, frame: Buffer | None = None) -> None:
        """Queue a message, with at most one frame beside it. Raises EngineFailed when the engine is not there or has
        stopped reading, WireError for more than a message or a frame may have."""
        parts = pieces(encode(message), frame)
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT:
            raise EngineFailed("the engine does not read its messages")
        transport.write(b"".join(parts))

    def close(self) -> None:
        """Close the endpoint; unsent messages are dropped."""
        self.end()
        self._shut()
        # One that has ended after it was closed with something unsent cannot be aborted (CPython).
        if self._transport and not self._lost:
            self._transport.abort()
        if self._directory:
            self._directory.cleanup()


class _Stream(asyncio.Protocol):
    """One connection to a NodeLink."""

    def __init__(self, link: NodeLink) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._admitted = False
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._link._strangers.add(transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        if not self._admitted and self._transport is not None:
            if len(buffer) < _SECRET_BYTES:
                return
            if not self._link._admit(self._transport, bytes(buffer[:_SECRET_BYTES])):
                self._transport.abort()
                return
            self._admitted, at = True, _SECRET_BYTES
        # A slice of the buffer itself would be one more copy.
        with memoryview(buffer) as view:
            while len(view) - at >= HEADER.size:
                try:
                    size, beside = sizes(view, at)
                except WireError as error:
                    # Where the next message begins cannot be known any more.
                    self._link.end(error)
                    return
                start = at + HEADER.size
                middle, end = start + size, start + size + max(beside, 0)
                if len(view) < end:
                    break
                self._link._take(bytes(view[start:middle]), bytes(view[middle:end]) if beside >= 0 else None)
                at = end
        del buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport:
            self._link._strangers.discard(self._transport)
        if self._admitted:
            self._link._lost = True
            self._link.end()
