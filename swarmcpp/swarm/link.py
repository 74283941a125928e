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

from swarmcpp.errors import EngineFailed, WireError
from swarmcpp.wire import MAX_FRAME, MAX_TENSOR, Buffer, FromEngine, ToEngine, decode, encode

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
        self.frame: bytes | None = None
        """Beside the message that `receive` returned last."""
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
        """The engine's next message; `frame` is what came beside it. Raises WireError on a frame that is none."""
        message, self.frame = _split(await self._socket.recv_multipart())
        return decode(message)  # type: ignore[return-value]

    def send(self, message: ToEngine, frame: Buffer | None = None) -> None:
        """Queue a message, with at most one frame beside it. Raises EngineFailed when the engine has stopped reading,
        WireError for more than a message or a frame may have."""
        # The future is done at once: pyzmq tries to send before it queues, and NOBLOCK forbids queueing.
        sent = self._socket.send_multipart(_join(encode(message), frame), zmq.NOBLOCK)
        if isinstance(sent, asyncio.Future) and sent.done() and isinstance(sent.exception(), zmq.Again):
            raise EngineFailed("the engine does not read its messages")

    def close(self) -> None:
        """Close the socket; unsent messages are dropped."""
        self._socket.close(linger=0)
        self._context.term()
        if self._directory:
            self._directory.cleanup()


class WorkerLink:
    """The engine's end. Satisfies `wire.EngineLink` and `wire.StageLink`."""

    def __init__(self, ticket: Ticket) -> None:
        self.frame: bytes | None = None
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
        message, self.frame = _split(self._socket.recv_multipart(zmq.NOBLOCK))
        return decode(message)  # type: ignore[return-value]

    def send(self, message: FromEngine, frame: Buffer | None = None) -> None:
        """See `wire.StageLink`."""
        self._socket.send_multipart(_join(encode(message), frame))

    def close(self) -> None:
        """Close after what was sent has left, within a second."""
        self._socket.close(linger=1000)
        self._context.term()


def _split(frames: list[bytes]) -> tuple[bytes, bytes | None]:
    if len(frames) > 2:
        raise WireError(f"{len(frames)} frames where a message and one beside it are the most")
    return frames[0], frames[1] if len(frames) == 2 else None


def _join(message: bytes, frame: Buffer | None) -> list[Buffer]:
    if frame is None:
        return [message]
    size = memoryview(frame).nbytes
    if size > MAX_TENSOR:
        raise WireError(f"{size} bytes beside a message, where {MAX_TENSOR} are the limit; send fewer rows")
    return [message, frame]


def _configure(socket: Any) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = _HIGH_WATER
    socket.maxmsgsize = max(MAX_FRAME, MAX_TENSOR) + _CURVE_OVERHEAD
