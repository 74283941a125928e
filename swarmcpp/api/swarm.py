"""GET /swarm/status: the swarm as this node sees it, for `swarmcpp status` and other tools."""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from swarmcpp.api.replies import encode
from swarmcpp.status import SwarmStatus, to_json


class StatusSource(Protocol):
    """Who knows the swarm. Called on the event loop's thread."""

    def swarm_status(self) -> SwarmStatus:
        """State now; cheap enough to be asked every second by several people."""
        ...


def add_routes(app: web.Application, source: StatusSource) -> None:
    """Answer GET /swarm/status from `source`; the application's key and errors apply."""

    async def show_status(request: web.Request) -> web.Response:
        return web.Response(body=encode(to_json(source.swarm_status())), content_type="application/json")

    app.router.add_get("/swarm/status", show_status)
