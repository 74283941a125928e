"""A way with a delay between namespaces, for real. Only root on Linux can make it."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench import netns
from bench.farlink import far

REASON = netns.missing()
ONE_WAY_S = 0.02


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
async def test_a_round_trip_takes_both_ways_and_bulk_is_not_slowed_by_each_packet() -> None:
    try:
        with netns.namespaces(2) as spaces:
            async with far((spaces[0], spaces[1]), ONE_WAY_S) as (a, b):
                await _exchange(a, b)
    except netns.NoNamespaces as error:
        # Root of a container may not do it either.
        pytest.skip(str(error))


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
    many = bytes(range(256)) * 32768
    begun = time.perf_counter()
    writer.write(many)
    assert await reader.readexactly(len(many)) == many
    # 130 packets and more each way: one after another they would take 5 s.
    assert time.perf_counter() - begun < 4.0
    writer.close()
    await writer.wait_closed()
    await closed.wait()
    server.close()
    await server.wait_closed()
