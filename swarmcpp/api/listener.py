"""The listening socket of the API: binding, the bound on connections, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from swarmcpp.api.options import BUSY, OPTIONS, ServerOptions
from swarmcpp.errors import BadConfig, PortInUse, StartupError

_log = logging.getLogger(__name__)

_LINGER_S = 5.0
"""How long a refused body is read and dropped, so that the client sees the answer and not a reset."""

_BACKLOG = 1024
"""Connections that may wait to be accepted: more than any burst of clients that is meant well."""

_SPARE_DESCRIPTORS = 256
"""Files and sockets of the node besides its HTTP connections."""

_REFUSAL_BODY = (
    b'{"error":{"message":"too many connections; try again later","type":"unavailable_error",'
    b'"code":"too_many_connections","param":null}}'
)
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that listens; `port` is the real one when 0 was asked for."""

    host: str
    port: int
    _runner: web.AppRunner
    _server: asyncio.Server

    @property
    def url(self) -> str:
        """The base URL as a client on this machine would write it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def close(self) -> None:
        """Stop listening, give running requests the grace that `start_server` was told, then cancel them."""
        self._server.close()
        await self._runner.cleanup()
        await self._server.wait_closed()


async def start_server(app: web.Application, host: str, port: int, *, grace_s: float = 1.0) -> RunningServer:
    """Serve an application of `build_app` on `host`:`port` (0: any free port).

    `grace_s` is how long close() lets running requests go on. Raises PortInUse, BadConfig (an address that cannot
    be bound). Raises the process's soft limit of open files where `max_connections` needs it.
    """
    options = app[OPTIONS]
    runner = web.AppRunner(
        app,
        # A client that leaves cancels its handler, and with it the work.
        handler_cancellation=True,
        access_log=None,
        logger=_aiohttp_logger(),
        keepalive_timeout=options.idle_timeout_s,
        lingering_time=_LINGER_S,
        shutdown_timeout=grace_s,
    )
    await runner.setup()
    door = _Door(runner, app[BUSY], _affordable(options))
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(door.admit, host or None, port, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise _bind_error(error, host, port) from error
    return RunningServer(host, server.sockets[0].getsockname()[1], runner, server)


class _Door:
    """Makes the protocol of each new connection, within the bound on their number."""

    def __init__(self, runner: web.AppRunner, busy: set[object], max_connections: int) -> None:
        assert runner.server is not None
        self._server = runner.server
        self._busy = busy
        self._max = max_connections

    def admit(self) -> asyncio.BaseProtocol:
        """A handler for a new connection, at the cost of the oldest idle one when there are too many."""
        connections = self._server.connections
        if len(connections) >= self._max:
            # In order of arrival. A connection that was aborted has no transport and leaves the list by itself.
            idle = (one for one in connections if one not in self._busy and one.transport is not None)
            oldest = next(idle, None)
            if oldest is None:
                return _Refusal()
            transport = oldest.transport
            oldest.force_close()
            if transport is not None:
                # force_close() would wait until a client that does not read has taken what is buffered for it.
                transport.abort()
        return self._server()


class _Refusal(asyncio.Protocol):
    """One connection too many: says so and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(_REFUSAL)
            transport.close()


def _affordable(options: ServerOptions) -> int:
    """`max_connections`, or as many of them as the limit of open files allows."""
    if sys.platform == "win32":
        return options.max_connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return options.max_connections
    needed = options.max_connections + _SPARE_DESCRIPTORS
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        except (OSError, ValueError) as error:
            _log.warning("cannot raise the limit of open files from %d to %d: %s", soft, raised, error)
        else:
            soft = raised
    return max(1, min(options.max_connections, soft - _SPARE_DESCRIPTORS))


def _bind_error(error: OSError | OverflowError, host: str, port: int) -> StartupError:
    where = f"{host or '*'}:{port}"
    if isinstance(error, OverflowError):
        return BadConfig(f"port {port} does not exist; use --port with 0 to 65535")
    if isinstance(error, socket.gaierror):
        return BadConfig(f"host {host!r} has no address ({error.strerror}); use --host 127.0.0.1 or --host 0.0.0.0")
    if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)):
        return PortInUse(f"{where} is in use; choose another port with --port, or --port 0 for any free one")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadConfig(f"{where} may not be opened by this user; choose a --port of 1024 or more")
    if error.errno == errno.EADDRNOTAVAIL:
        return BadConfig(f"{host!r} is no address of this machine; use --host 127.0.0.1 or --host 0.0.0.0")
    return BadConfig(f"cannot listen on {where}: {error.strerror or error}; choose another --host or --port")


def _aiohttp_logger() -> logging.Logger:
    logger = _log.getChild("http")
    if not logger.filters:
        logger.addFilter(_not_client_noise)
    return logger


def _not_client_noise(record: logging.LogRecord) -> bool:
    """False for what aiohttp logs with a traceback because a client sent something that is not HTTP."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
