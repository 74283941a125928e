"""Links of a node to the others of its swarm: real endpoints on loopback, and pauses that never end by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from swarm_support import HOST, until

from swarmcpp.peers import Address, Capability
from swarmcpp.swarm.identity import SwarmKey, new_node_keys, node_id
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.store import Identity
from swarmcpp.testing import FakeClock


class Member:
    """A node that does nothing for its peers; it can start again with the same key."""

    def __init__(self, key: SwarmKey) -> None:
        self._key = key
        self._keys = new_node_keys()
        self._boot = 0
        self.id = node_id(self._keys.public)
        self.pauses: list[float] = []
        self.addresses: tuple[Address, ...] = ()

    async def start(self, port: int = 0) -> None:
        self._boot += 1
        identity = Identity(self._keys, self.id, self._boot)
        self.mesh = Mesh(self._key, identity, self, clock=FakeClock(), sleep=self._sleep)  # type: ignore[arg-type]
        await self.mesh.endpoint.listen([HOST], port)
        self.addresses = (Address(HOST, self.mesh.endpoint.port, self._keys.public),)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.Event().wait()

    def capability(self) -> Capability:
        return Capability(
            self.id, self._boot, "n", self.addresses, self.mesh.endpoint.pub_port, "v", "ready", "cpu", 1, 1, 1, ()
        )

    def sees(self, other: Member) -> bool:
        return self.mesh.caller(other.id) is not None and other.id in self.mesh.callers()


@pytest.fixture
async def member() -> AsyncIterator[Callable[[], Member]]:
    key, made = SwarmKey.new(), []

    def make() -> Member:
        made.append(Member(key))
        return made[-1]

    yield make
    for each in made:
        await each.mesh.close()


@pytest.mark.parametrize("same_port", [True, False])
async def test_a_node_that_says_hello_is_not_waited_for(member: Callable[[], Member], same_port: bool) -> None:
    """Whoever has tried in vain to reach it would let a pause go by first."""
    here, there = member(), member()
    await here.start()
    await there.start()
    here.mesh.dial(there.addresses)
    await until(lambda: here.sees(there) and there.sees(here), "they meet")
    await there.mesh.close()
    await until(lambda: bool(here.pauses), "a try in vain")
    assert not here.sees(there)
    await there.start(there.addresses[0].port if same_port else 0)
    there.mesh.dial(here.addresses)
    await until(lambda: here.sees(there) and there.sees(here), "they meet again")
