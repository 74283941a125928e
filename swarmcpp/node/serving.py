"""A node that serves models, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.api.swarm import add_routes
from swarmcpp.config import Config
from swarmcpp.errors import SwarmError
from swarmcpp.node.hosted import Hosted
from swarmcpp.node.member import Swarm
from swarmcpp.node.node import Node
from swarmcpp.node.whereabouts import Entry, Whereabouts


async def run(
    config: Config,
    models: Sequence[Hosted],
    *,
    swarm: Swarm | None = None,
    on_ready: Callable[[str], None] = lambda _url: None,
    stop: asyncio.Event,
) -> None:
    """Serve `models` until `stop` is set. Raises StartupError when they cannot start, and SwarmError.

    The port is bound before they load, so a port in use is reported at once and /health answers meanwhile. `on_ready`
    is told the API's URL when all have loaded. A `swarm` has been started; the caller closes it.
    """

    async def open_all() -> None:
        # One after the other: each reads the same disk.
        for model in models:
            await model.open()

    async with AsyncExitStack() as stack:
        server = await start_api(config, Node(config, models, swarm), swarm)
        stack.push_async_callback(server.close)
        for model in models:
            stack.push_async_callback(model.close)
        if await until_stopped(asyncio.create_task(open_all()), stop):
            on_ready(server.url)
            await stop.wait()


async def until_stopped(starting: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Whether `starting` has ended before `stop` was set, which cancels it. Raises what it raises."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            return True
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, SwarmError):
            await starting
        return False
    finally:
        stopping.cancel()


async def start_api(config: Config, node: Node, swarm: Swarm | None) -> RunningServer:
    """The API of `node`, which commands find by the data directory until it is closed. Raises PortInUse."""
    server = config.server
    options = ServerOptions(
        api_key=server.api_key,
        cors_origins=server.cors_origins,
        max_body_bytes=server.max_body_bytes,
        write_timeout_s=server.write_timeout_s,
    )
    app = build_app(node, options)
    add_routes(app, node)
    entry = Entry(config.storage.data_dir)

    async def forget(_app: object) -> None:
        await asyncio.to_thread(entry.close)

    app.on_shutdown.append(forget)
    running = await start_server(app, server.host, server.port)
    if server.findable:
        await asyncio.to_thread(entry.write, _whereabouts(running.url, swarm))
    return running


def _whereabouts(url: str, swarm: Swarm | None) -> Whereabouts:
    pid, now = os.getpid(), time.time()
    if swarm is None:
        return Whereabouts(url, pid, now)
    addresses = tuple(str(each) for each in swarm.token.addresses)
    return Whereabouts(url, pid, now, swarm.key.swarm_id, addresses, swarm.public_key)
