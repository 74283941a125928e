"""The link between a node and one incarnation of its engine: a pair of DEALER sockets.

`ipc://` in a private directory where the platform has it and its path is short enough; elsewhere loopback TCP under
CURVE, with keys that only these two processes know. Each incarnation gets an endpoint of its own, so nothing of a dead
engine can reach its successor.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from swarmcpp.errors import EngineFailed
from swarmcpp.wire import MAX_FRAME, FromEngine, ToEngine, decode, encode

_HIGH_WATER = 10_000
"""Messages. Admission bounds what a node sends far below; an engine that far behind is not reading at all."""

_CURVE_OVERHEAD = 64
"""Bytes by which CURVE may lengthen a frame (33 now): ZeroMQ compares what is on the wire with its size limit, and a
frame beyond it ends the connection, with everything that was under way on it."""

Ticket = dict[str, str]
"""What an engine needs to connect; handed over on its stdin, never on the command line."""


@dataclass(slots=True)
class _Keys:
    public: str
    secret: str


def _keys() -> _Keys:
    public, secret = zmq.curve_keypair()
    return _Keys(public.decode(), secret.decode())


class NodeLink:
    """The node's end, on its event loop."""

    def __init__(self) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket)
        if endpoint := self._ipc_endpoint():
            self._socket.bind(endpoint)
            self.ticket: Ticket = {"endpoint": endpoint}
        else:
            server = _keys()
            self._socket.curve_server = True
            self._socket.curve_publickey = server.public.encode()
            self._socket.curve_secretkey = server.secret.encode()
            port = self._socket.bind_to_random_port("tcp://127.0.0.1")
            self.ticket = {"endpoint": f"tcp://127.0.0.1:{port}", "server_key": server.public}

    def _ipc_endpoint(self) -> str | None:
        """An address in a directory of its own; None where the platform has none, or none as long as it would be."""
        if not zmq.has("ipc"):
            return None
        # Short on purpose: a Unix socket path holds about 100 characters, and TMPDIR may be most of them.
        for parent in (None, "/tmp"):
            directory = tempfile.TemporaryDirectory(prefix="swarmcpp-", dir=parent, ignore_cleanup_errors=True)
            path = Path(directory.name) / "engine"
            if len(os.fsencode(path)) <= zmq.IPC_PATH_MAX_LEN:
                self._directory = directory
                return f"ipc://{path}"
            directory.cleanup()
        return None

    async def receive(self) -> FromEngine:
        """The engine's next message. Raises WireError on a frame that is none."""
        return decode(await self._socket.recv())  # type: ignore[return-value]

    def send(self, message: ToEngine) -> None:
        """Queue a message. Raises EngineFailed when the engine has stopped reading."""
        # The future is done at once: pyzmq tries to send before it queues, and NOBLOCK forbids queueing.
        sent = self._socket.send(encode(message), zmq.NOBLOCK)
        if isinstance(sent, asyncio.Future) and sent.done() and isinstance(sent.exception(), zmq.Again):
            raise EngineFailed("the engine does not read its messages")

    def close(self) -> None:
        """Close the socket; unsent messages are dropped."""
        self._socket.close(linger=0)
        self._context.term()
        if self._directory:
            self._directory.cleanup()


class WorkerLink:
    """The engine's end. Satisfies `wire.EngineLink`."""

    def __init__(self, ticket: Ticket) -> None:
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket)
        if "server_key" in ticket:
            own = _keys()
            self._socket.curve_serverkey = ticket["server_key"].encode()
            self._socket.curve_publickey = own.public.encode()
            self._socket.curve_secretkey = own.secret.encode()
        self._socket.connect(ticket["endpoint"])

    def receive(self, timeout_s: float) -> ToEngine | None:
        """See `wire.EngineLink`."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return decode(self._socket.recv(zmq.NOBLOCK))  # type: ignore[return-value]

    def send(self, message: FromEngine) -> None:
        """See `wire.EngineLink`."""
        self._socket.send(encode(message))

    def close(self) -> None:
        """Close after what was sent has left, within a second."""
        self._socket.close(linger=1000)
        self._context.term()


def _configure(socket: Any) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = _HIGH_WATER
    socket.maxmsgsize = MAX_FRAME + _CURVE_OVERHEAD
