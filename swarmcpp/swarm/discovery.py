"""Finding members on the local network by multicast DNS, and being found.

An announcement shows where a node is, its public key and its swarm's id; never the swarm key. It proves nothing:
whoever is found still has to prove the key that it announced, and who looks has to be a member.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import psutil
from zeroconf import Error, IPVersion, ServiceInfo, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from swarmcpp.peers import Address
from swarmcpp.swarm.identity import node_id, valid_address
from swarmcpp.wire.peers import PROTOCOL

logger = logging.getLogger(__name__)

SERVICE: Final = "_swarmcpp._tcp.local."
_MAX_HOSTS = 8
"""Addresses of one announcement."""

_MAX_LOOKUPS = 32
"""At the same time. A flood of names on the network costs this much; real nodes announce themselves again."""

_LOOKUP_MS = 3000
_CLOSE_S = 3.0


class Discovery:
    """Announces `own` (nothing when None) and tells `on_found` every address that a member of the swarm announces.

    `interfaces`: IP addresses of the interfaces to use; None: those of the LAN. An address may be told again. Without
    multicast nothing is found, with one warning; the node goes on. All on the event loop that calls start().
    """

    def __init__(
        self,
        swarm_id: str,
        own: Address | None,
        on_found: Callable[[Address], None],
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._swarm_id = swarm_id
        self._own = own
        self._on_found = on_found
        self._interfaces = interfaces
        self._hosts: list[str] = []
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._lookups: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Look for members, then announce; takes about a second, while it makes sure that its name is free."""
        # It reports a taken port itself, and everything odd that somebody sends.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        self._hosts = hosts = self._usable()
        try:
            if not hosts:
                raise OSError("no network interface to use")
            # By IPv4 wherever there is IPv4: a socket for both fails on systems where IPv6 is off.
            self._zeroconf = AsyncZeroconf([host for host in hosts if ":" not in host] or hosts)
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._changed])
            if self._own:
                info = announcement(self._swarm_id, self._own, hosts)
                # A second node with our keys is found too, under another name, and the swarm sorts it out.
                await (await self._zeroconf.async_register_service(info, allow_name_change=True))
        except (Error, OSError, RuntimeError) as error:
            logger.warning(
                "members on this network are not found by themselves (multicast DNS: %s); join tokens still work",
                error or type(error).__name__,
            )
            await self.close()

    async def refresh(self) -> None:
        """Start again if this machine's addresses have changed since (a network that came late, another Wi-Fi)."""
        if self._usable() != self._hosts:
            await self.close()
            await self.start()

    async def close(self) -> None:
        """Take the announcement back and stop. May be called again."""
        for task in self._lookups:
            task.cancel()
        await asyncio.gather(*self._lookups, return_exceptions=True)
        browser, self._browser = self._browser, None
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                if browser:
                    await browser.async_cancel()
                await zeroconf.async_close()
        except (Error, OSError) as error:
            logger.debug("multicast DNS did not close: %s", error or type(error).__name__)

    def _usable(self) -> list[str]:
        if self._interfaces is None:
            return lan_addresses()
        return [host for host in self._interfaces if _reachable(host)]

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        # That an announcement is gone says little: heartbeats tell whether the node is.
        if state_change is ServiceStateChange.Removed or len(self._lookups) >= _MAX_LOOKUPS:
            return
        task = asyncio.get_running_loop().create_task(self._look_up(zeroconf, service_type, name))
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        try:
            info = AsyncServiceInfo(service_type, name)
            if not await info.async_request(zeroconf, _LOOKUP_MS):
                return
        except (Error, OSError) as error:
            logger.debug("an announcement cannot be read: %s", error or type(error).__name__)
            return
        own_key = self._own.key if self._own else None
        for address in announced(info.properties, info.parsed_addresses(IPVersion.All), info.port, self._swarm_id):
            if address.key != own_key:
                self._on_found(address)


def announcement(swarm_id: str, own: Address, hosts: Sequence[str]) -> ServiceInfo:
    """What a node tells everybody on the network: `own` at its host, or at all `hosts` where that is no one address."""
    try:
        specific = not ipaddress.ip_address(own.host).is_unspecified
    except ValueError:
        specific = False
    name = node_id(own.key)
    return ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=own.port,
        properties={"swarm": swarm_id, "key": own.key, "protocol": str(PROTOCOL)},
        server=f"{name}.local.",
        parsed_addresses=[own.host] if specific else list(hosts[:_MAX_HOSTS]),
    )


def announced(
    properties: Mapping[bytes, bytes | None], hosts: Sequence[str], port: int | None, swarm_id: str
) -> tuple[Address, ...]:
    """The addresses in an announcement; none when it is of another swarm, or garbage.

    A different protocol is no reason to ignore a node: the greeting settles it, or says clearly why not.
    """
    if properties.get(b"swarm") != swarm_id.encode():
        return ()
    key = (properties.get(b"key") or b"").decode("ascii", "replace")
    found = (Address(host, port or 0, key) for host in hosts[:_MAX_HOSTS] if _reachable(host))
    return tuple(address for address in found if valid_address(address))


def lan_addresses() -> list[str]:
    """Addresses of this machine that others may reach: private IPv4, other IPv4, self-assigned IPv4, then IPv6."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and _reachable(entry.address)
    }
    return sorted(found, key=_preference)


def _reachable(host: str) -> bool:
    """Whether `host` can be another machine's address; an IPv6 of the link needs a scope, which is nobody else's."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    scoped = ip.version == 6 and ip.is_link_local
    return not (scoped or ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_reserved)


def _preference(host: str) -> tuple[int, bool, bool, str]:
    ip = ipaddress.ip_address(host)
    return ip.version, ip.is_link_local, not ip.is_private, host
