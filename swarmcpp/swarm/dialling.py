"""Reaching the other nodes of a swarm: whom a node dials, at which addresses, and one link to each, which is greeted,
watched until it is lost, and greeted again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import zmq.asyncio

from swarmcpp.errors import SwarmError, WireError
from swarmcpp.peers import Address, Capability, NodeId
from swarmcpp.swarm.identity import SwarmKey, node_id, valid_address
from swarmcpp.swarm.membership import check_capability
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.wire.peers import Gossip, Hello, Welcome

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 3.0
REDIAL_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Pauses between tries to reach a node. zmq itself reconnects sooner; this is for nodes that answer wrongly or not."""

FORGET_TRIES = 40
"""Tries in a row (about ten minutes) after which an address that only others named is not dialled any more."""

MAX_PEERS = 1024


@dataclass(slots=True)
class _Dial:
    """A node that is or will be dialled; `kept` ones are never given up."""

    addresses: deque[Address]
    kept: bool
    link: PeerLink | None = None
    node: NodeId | None = None
    """Set while the link is greeted."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    boot: int = 0
    """The newest life in which it has said hello itself."""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """It has, in a new life: there is no reason to wait with the next try."""
    task: asyncio.Task[None] | None = None
    refused: str = ""


class Greeter(Protocol):
    """What a node says to those that it reaches, and does about them."""

    changed: asyncio.Event

    def hello(self) -> Hello:
        """What it says of itself now."""

    def met_self(self, addresses: Sequence[Address]) -> None:
        """Somebody announces this node's own key at these addresses."""

    def greeted(self, address: Address, capability: Capability) -> None:
        """A node answers. Raises WireError when it is none that may be there."""

    def lost(self, node: NodeId) -> None:
        """The link to a node that was greeted is lost."""

    def hear(self, gossip: Gossip) -> None:
        """News from the socket of the node that it is about."""


class Dialler:
    """The links of the node with the public key `own` to all others. Every method runs on the event loop's thread."""

    def __init__(
        self, key: SwarmKey, own: str, greeter: Greeter, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._key = key
        self._own = own
        self._greeter = greeter
        self._sleep = sleep
        self._context = zmq.asyncio.Context(io_threads=1)
        self._dials: dict[str, _Dial] = {}
        self._closed = False

    def tasks(self) -> list[asyncio.Task[None]]:
        """What keeps the links."""
        return [dial.task for dial in self._dials.values() if dial.task]

    async def aclose(self) -> None:
        """Dial nobody any more, and close every link."""
        self._closed = True
        tasks = self.tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for dial in self._dials.values():
            if dial.link:
                await dial.link.aclose()
        self._context.destroy(linger=0)

    def caller(self, node: NodeId) -> PeerLink | None:
        """The link to a peer that has been greeted and is not lost."""
        for dial in self._dials.values():
            if dial.node == node and dial.link is not None:
                return dial.link
        return None

    def callers(self) -> dict[NodeId, PeerLink]:
        """All greeted links."""
        return {dial.node: dial.link for dial in self._dials.values() if dial.node and dial.link}

    def refusals(self) -> dict[Address, str]:
        """Why addresses that were dialled could not be greeted, so far."""
        return {dial.addresses[0]: dial.refused for dial in self._dials.values() if not dial.node and dial.refused}

    def dial(self, addresses: Sequence[Address], *, kept: bool = False) -> None:
        """Try to reach a node at these addresses (all of one key), now and again. `kept`: for ever."""
        # Most come from other machines, and zmq reads more in a host than its name.
        addresses = [address for address in addresses if valid_address(address)]
        if self._closed or not addresses:
            return
        key = addresses[0].key
        if key == self._own:
            self._greeter.met_self(addresses)
            return
        known = self._dials.get(key)
        if known is None:
            if len(self._dials) >= MAX_PEERS:
                return
            known = self._dials[key] = _Dial(deque(maxlen=16), kept)
            known.task = asyncio.create_task(self._attend(key, known), name=f"peer {addresses[0]}")
        known.kept |= kept
        for address in addresses:
            if address.key == key and address not in known.addresses:
                known.addresses.append(address)

    def link(self, address: Address, on_lost: Callable[[], None] = lambda: None) -> PeerLink:
        """A new link, which the caller closes."""
        return PeerLink(address, self._key.member, context=self._context, on_news=self._greeter.hear, on_lost=on_lost)

    async def _attend(self, key: str, dial: _Dial) -> None:
        """Keep one link: greet, wait until it is lost, greet again."""
        failures = 0
        while dial.kept or failures < FORGET_TRIES:
            address = dial.addresses[0]
            try:
                await self._greet(address, dial)
            except SwarmError as error:
                reason = (dial.link.refusal if dial.link else "") or str(error)
                if reason != dial.refused:
                    logger.info("swarm: %s cannot be greeted: %s", address, reason)
                dial.refused = reason
                self._greeter.changed.set()
                failures += 1
                # Another one may be in front by now, which it has said itself.
                if address in dial.addresses:
                    dial.addresses.remove(address)
                    dial.addresses.append(address)
                # Jitter: nodes that lost each other at one moment shall not meet at one moment again and again.
                pause = REDIAL_S[min(failures, len(REDIAL_S)) - 1]
                if await self._pause(pause * random.uniform(0.8, 1.2), dial.heard):
                    failures = 0
                    if dial.link:
                        # It may be waiting itself before it connects again.
                        await dial.link.aclose()
                        dial.link = None
                continue
            failures = 0
            dial.heard.clear()
            await dial.lost.wait()
            if dial.node:
                self._greeter.lost(dial.node)
                dial.node = None
            self._greeter.changed.set()
        if dial.link:
            await dial.link.aclose()
        self._dials.pop(key, None)

    async def _pause(self, seconds: float, end: asyncio.Event) -> bool:
        """Sleep until `end` is set, if that is sooner; whether it was. Clears it."""
        waiting = (asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(end.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        ended = end.is_set()
        end.clear()
        return ended

    async def _greet(self, address: Address, dial: _Dial) -> None:
        """Say hello, and hear the news from then on. Raises SwarmError."""
        if dial.link is None or dial.link.address != address:
            if dial.link is not None:
                await dial.link.aclose()
            dial.link = self.link(address, dial.lost.set)
        link = dial.link
        dial.lost.clear()
        reply, _ = await link.ask(self._greeter.hello(), timeout_s=HELLO_TIMEOUT_S)
        if not isinstance(reply, Welcome):
            raise WireError(f"{address} answers Hello with {type(reply).__name__}; run the same swarmcpp on both sides")
        capability = check_capability(reply.capability)
        if capability.node != node_id(address.key):
            raise WireError(f"{address} says that it is {capability.node}, which its key denies")
        self._greeter.greeted(address, capability)
        dial.node, dial.refused = capability.node, ""
        link.subscribe(capability.pub_port)
        for each in reply.peers:
            self.dial((each,))
        self._greeter.changed.set()

    def greet_again(self, node: NodeId) -> None:
        """A node that is in a new life, which the link may not have noticed."""
        for dial in self._dials.values():
            if dial.node == node:
                dial.lost.set()

    def expect(self, capability: Capability) -> None:
        """A node says where it is. In a new life that goes before what was known of it, and is tried at once."""
        addresses = [each for each in capability.addresses if node_id(each.key) == capability.node]
        self.dial(addresses)
        dial = self._dials.get(addresses[0].key) if addresses else None
        # Once in each life: nodes that greet each other in vain would do so without a pause.
        if dial is None or capability.boot <= dial.boot:
            return
        dial.boot = capability.boot
        for address in reversed(addresses):
            if address in dial.addresses:
                dial.addresses.remove(address)
                dial.addresses.appendleft(address)
        dial.heard.set()
