"""A way with a delay between namespaces, for real. Only root on Linux can make it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from bench import netns
from bench.farlink import far

REASON = netns.missing()
ONE_WAY_S = 0.02


class Packets:
    """Those on their way: a loop's `call_later` that keeps count."""

    def __init__(self) -> None:
        self.on_way = 0
        self.most = 0

    def __call__(self, seconds: float, arrive: Callable[[int, bytes], None], target: int, packet: bytes) -> object:
        assert seconds == ONE_WAY_S
        self.on_way += 1
        self.most = max(self.most, self.on_way)
        return asyncio.get_running_loop().call_later(seconds, self._arrived, arrive, target, packet)

    def _arrived(self, arrive: Callable[[int, bytes], None], target: int, packet: bytes) -> None:
        self.on_way -= 1
        arrive(target, packet)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
async def test_a_round_trip_takes_both_ways_and_packets_travel_together() -> None:
    packets = Packets()
    try:
        with netns.namespaces(2) as spaces:
            async with far((spaces[0], spaces[1]), ONE_WAY_S, packets) as (a, b):
                await _exchange(a, b)
    except netns.NoNamespaces as error:
        # Root of a container may not do it either.
        pytest.skip(str(error))
    # One after another they would make a long way a slow one.
    assert packets.most > 2


async def _exchange(a: netns.Namespace, b: netns.Namespace) -> None:
    closed = asyncio.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
        writer.close()
        await writer.wait_closed()
        closed.set()

    listener, out = b.socket(), a.socket()
    listener.bind((b.address, 0))
    server = await asyncio.start_server(echo, sock=listener)
    out.setblocking(False)
    begun = time.perf_counter()
    await asyncio.get_running_loop().sock_connect(out, listener.getsockname())
    assert time.perf_counter() - begun >= 2 * ONE_WAY_S
    reader, writer = await asyncio.open_connection(sock=out)
    begun = time.perf_counter()
    writer.write(b"there")
    assert await reader.readexactly(5) == b"there"
    assert time.perf_counter() - begun >= 2 * ONE_WAY_S
    many = bytes(range(256)) * 8192
    writer.write(many)
    assert await reader.readexactly(len(many)) == many
    writer.close()
    await writer.wait_closed()
    await closed.wait()
    server.close()
    await server.wait_closed()
