"""A node that serves a whole model, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.api.swarm import add_routes
from swarmcpp.config import Config
from swarmcpp.core import KvLayout
from swarmcpp.errors import SwarmError
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.models.manifest import manifest_of
from swarmcpp.node.member import Swarm
from swarmcpp.node.node import Node
from swarmcpp.node.placing import PlannedModel
from swarmcpp.node.preparing import Prepared, open_cache, prepare, whole_offer
from swarmcpp.node.whereabouts import Entry, Whereabouts
from swarmcpp.sharing.offers import Served
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.swarm.identity import JoinToken


@dataclass(frozen=True, slots=True)
class Serving:
    """A node that answers, and what its ready line says."""

    prepared: Prepared
    status: EngineStatus
    url: str
    cache_bytes: int
    """Size of the arena on disk; 0: none."""
    token: JoinToken | None = None
    """What another machine needs to join; None: the node is in no swarm."""


async def run(
    config: Config,
    path: Path,
    *,
    name: str | None = None,
    swarm: Swarm | None = None,
    on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    on_ready: Callable[[Serving], None] = lambda _serving: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve `path` until `stop` is set. Raises StartupError when it cannot start, SwarmError when it cannot go on.

    The port is bound before the model loads, so a port in use is reported at once and /health answers meanwhile. A
    `swarm` has been started; the caller closes it.
    """
    prepared = await asyncio.to_thread(prepare, config, path, name)
    loop = asyncio.get_running_loop()

    def open_for(layout: KvLayout) -> PrefixCache | None:
        manifest = manifest_of(prepared.model.files, config.storage.data_dir)
        cache = open_cache(config, manifest.fingerprint, layout, prepared.info.path)
        if swarm and cache:
            loop.call_soon_threadsafe(swarm.blocks.use, cache, layout.token_bytes)
        return cache

    supervisor = EngineSupervisor(prepared.options, on_change=on_progress, open_cache=open_for)
    replica = LocalReplica(config, prepared.options, supervisor)
    node = Node(config, prepared.info, replica, swarm)

    async def start() -> None:
        supervisor.start()
        await supervisor.wait_ready()
        await node.read_text(Path(prepared.options.model_path), prepared.model.chat_template)

    server = await start_api(config, node, swarm)
    stop = stop or asyncio.Event()
    try:
        if not await until_stopped(asyncio.create_task(start()), stop):
            return
        cache = supervisor.cache
        cache_bytes = cache.n_blocks * cache.block_bytes if cache else 0
        on_ready(Serving(prepared, supervisor.status, server.url, cache_bytes, swarm.token if swarm else None))
        if swarm:
            await _offer(swarm, node, replica, prepared, config)
        await stop.wait()
    finally:
        await supervisor.close()
        node.close()
        await server.close()


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


async def _offer(swarm: Swarm, node: Node, replica: LocalReplica, prepared: Prepared, config: Config) -> None:
    """Tell the swarm what this node serves now."""
    manifest = await asyncio.to_thread(manifest_of, prepared.model.files, config.storage.data_dir)
    offer = whole_offer(
        prepared.info,
        fingerprint=manifest.fingerprint,
        root=swarm.blocks.root,
        token_bytes=swarm.blocks.token_bytes,
        ctx_size=replica.ctx_size,
        slots=replica.slots,
    )
    swarm.give(manifest, prepared.model.files)
    swarm.serve(Served(replica, offer, node.names, replica))
    node.planned = PlannedModel(prepared.info.id, prepared.model, manifest.fingerprint, replica.ctx_size, replica.slots)


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
