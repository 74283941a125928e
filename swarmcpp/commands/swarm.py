"""Starting a node's part in a swarm: which key, which addresses, and what a terminal is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from swarmcpp.config import Config, SwarmConfig, is_loopback
from swarmcpp.errors import BadConfig, PortInUse
from swarmcpp.node.member import Swarm
from swarmcpp.peers import Address
from swarmcpp.swarm.discovery import lan_addresses
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.store import Identity, SwarmStore

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = SwarmConfig().port
TWIN_S = 1.0
"""How long a start waits to hear that another node has its identity: from that node, or from one that knows it."""


def listen_hosts(config: Config, *, lan: bool) -> Sequence[str]:
    """Where the swarm port listens. Raises BadConfig when it shall be on the network and there is none."""
    if config.swarm.host:
        return (config.swarm.host,)
    if not lan:
        return (LOOPBACK,)
    found = lan_addresses()
    if not found:
        raise BadConfig("this machine is in no network: connect it, or name an address with --swarm-host")
    return found


@asynccontextmanager
async def in_swarm(
    config: Config, store: SwarmStore, key: SwarmKey, known: Sequence[Address], *, lan: bool
) -> AsyncIterator[Swarm]:
    """A started part in the swarm of `key`, closed at the end. Raises BadConfig, PortInUse."""
    hosts = listen_hosts(config, lan=lan)
    identity = await asyncio.to_thread(store.take_identity)
    try:
        swarm = await _started(config, store, key, identity, hosts, known)
        try:
            yield swarm
        finally:
            await swarm.close()
    finally:
        store.close()


async def _started(
    config: Config,
    store: SwarmStore,
    key: SwarmKey,
    identity: Identity,
    hosts: Sequence[str],
    known: Sequence[Address],
) -> Swarm:
    """A part in the swarm that listens, with an identity that nobody else has. Raises PortInUse, BadConfig."""
    port = config.swarm.port
    while True:
        swarm = Swarm(config, key, store, identity)
        try:
            await _start(swarm, config, hosts, port, known)
            # Nobody can have a copy of an identity that is new.
            if known and identity.boot > 1:
                await _hear_of_twin(swarm)
            if swarm.mesh.twin is None:
                return swarm
        except PortInUse:
            await swarm.close()
            # Nobody chose the default: a second node on this machine takes another port.
            if port != DEFAULT_PORT:
                raise
            port = 0
        except BaseException:
            await swarm.close()
            raise
        else:
            await swarm.close()
            identity = await asyncio.to_thread(store.renew_identity)


async def _start(swarm: Swarm, config: Config, hosts: Sequence[str], port: int, known: Sequence[Address]) -> None:
    discover = config.swarm.discovery and not all(is_loopback(host) for host in hosts)
    await swarm.start(hosts, port, known, discover=discover)


async def _hear_of_twin(swarm: Swarm) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TWIN_S):
            while swarm.mesh.twin is None:
                swarm.mesh.changed.clear()
                await swarm.mesh.changed.wait()
