"""GET /swarm/status and /swarm/plan: the swarm as this node sees it, for `swarmcpp status`, `plan` and other tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from aiohttp import web

from swarmcpp.api.replies import encode
from swarmcpp.status import SwarmPlan, SwarmStatus, to_json


class SwarmSource(Protocol):
    """Who knows the swarm. Called on the event loop's thread."""

    def swarm_status(self) -> SwarmStatus:
        """State now; cheap enough to be asked every second by several people."""

    async def swarm_plan(self, added: Sequence[str]) -> SwarmPlan:
        """Who would hold what of its model, with the machines of `added`. Raises SwarmError."""


def add_routes(app: web.Application, source: SwarmSource) -> None:
    """Answer GET /swarm/status, and GET /swarm/plan?with=MACHINE&with=..., from `source`; the application's key and
    errors apply."""

    async def show_status(request: web.Request) -> web.Response:
        return _json(source.swarm_status())

    async def show_plan(request: web.Request) -> web.Response:
        return _json(await source.swarm_plan(request.query.getall("with", [])))

    app.router.add_get("/swarm/status", show_status)
    app.router.add_get("/swarm/plan", show_plan)


def _json(found: SwarmStatus | SwarmPlan) -> web.Response:
    return web.Response(body=encode(to_json(found)), content_type="application/json")
