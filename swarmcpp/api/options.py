"""Options of the HTTP server, and the keys under which an application carries what its listener needs."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the operator chooses; times in seconds."""

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers; "*" means every origin. Empty: CORS is off."""
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout_s: float = 30.0
    """A body that has not arrived by then is refused with 408."""
    write_timeout_s: float = 60.0
    """A client that takes no data for so long loses its request."""
    idle_timeout_s: float = 75.0
    """A connection that has sent no whole request header for so long is closed."""
    max_connections: int = 2048
    """Beyond it the connection that has been idle longest is closed; with none idle, new ones get a 503."""


OPTIONS = web.AppKey("OPTIONS", ServerOptions)
BUSY: web.AppKey[set[object]] = web.AppKey("BUSY", set)
"""Protocols of the connections on which a request is being handled."""
