"""A server and its clients over real sockets on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from swarmcpp.peers import Address
from swarmcpp.swarm.endpoint import AskLimits, Beginner, Endpoint, Handler, Responder
from swarmcpp.swarm.identity import KeyPair, SwarmKey, new_node_keys
from swarmcpp.swarm.peerlink import PeerLink
from swarmcpp.wire.peers import Ask, Gossip, Ping, Pong

HOST = "127.0.0.1"
DEADLINE_S = 60.0


async def until(condition: Callable[[], bool], what: str) -> None:
    """Until `condition` holds; fails the test after a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE_S:g} s"
        await asyncio.sleep(0.005)


async def pong(message: Ask, payload: list[memoryview], respond: Responder) -> None:
    """Answers Ping with that many bytes, after what came beside it."""
    assert isinstance(message, Ping)
    respond.send(Pong(), [*payload, b"x" * message.reply_bytes])


class Peers:
    """One swarm on loopback; whatever a test opened is closed after it."""

    def __init__(self) -> None:
        self.key = SwarmKey.new()
        self.context = zmq.asyncio.Context(io_threads=1)
        self._closing: list[Callable[[], Awaitable[None]]] = []

    async def endpoint(
        self,
        handler: Handler = pong,
        *,
        keys: KeyPair | None = None,
        port: int = 0,
        limits: AskLimits | None = None,
        begin: Beginner = lambda _ask, _payload, _respond: False,
    ) -> tuple[Endpoint, Address]:
        """A server, and where it is."""
        keys = keys or new_node_keys()
        endpoint = Endpoint(keys, self.key.member.public, handler, begin=begin, limits=limits)
        self._closing.append(endpoint.aclose)
        await endpoint.listen([HOST], port)
        return endpoint, Address(HOST, endpoint.port, keys.public)

    def link(
        self,
        address: Address,
        *,
        member: KeyPair | None = None,
        on_news: Callable[[Gossip], None] = lambda gossip: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> PeerLink:
        """A client."""
        link = PeerLink(address, member or self.key.member, context=self.context, on_news=on_news, on_lost=on_lost)
        self._closing.append(link.aclose)
        return link

    def raw_dealer(self, address: Address) -> Any:
        """A socket with the right keys that sends whatever a test wants."""
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_serverkey = address.key.encode()
        socket.curve_publickey = self.key.member.public.encode()
        socket.curve_secretkey = self.key.member.secret.encode()
        socket.connect(f"tcp://{address}")

        async def close() -> None:
            socket.close(linger=0)

        self._closing.append(close)
        return socket

    async def aclose(self) -> None:
        """Close everything, the last first."""
        for close in reversed(self._closing):
            await close()
        self.context.term()


@asynccontextmanager
async def swarm() -> AsyncIterator[Peers]:
    """A swarm for one test."""
    peers = Peers()
    try:
        yield peers
    finally:
        await peers.aclose()
