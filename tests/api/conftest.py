"""A real server on an ephemeral loopback port, over a FakeService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.core import Service
from swarmcpp.testing import FakeService

Serve = Callable[..., Awaitable[RunningServer]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(service, **options)`; afterwards no server and no request of a FakeService is left."""
    running: list[tuple[RunningServer, Service]] = []

    async def start(service: Service, **options: Any) -> RunningServer:
        app = build_app(service, ServerOptions(**options), draw_seed=lambda bits: 7)
        server = await start_server(app, "127.0.0.1", 0, grace_s=0.05)
        running.append((server, service))
        return server

    yield start
    for server, service in running:
        await server.close()
        if isinstance(service, FakeService):
            assert service.running == 0


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client without a bound on connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
def until() -> Until:
    """`await until(condition)`: poll what a real socket brings about, with a deadline."""

    async def poll(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - sockets set no Event
                await asyncio.sleep(0.005)

    return poll
