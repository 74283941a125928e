"""The proxy that makes a network slower."""

from __future__ import annotations

import asyncio
import time

from bench.proxy import DelayProxy


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def test_every_round_trip_takes_twice_the_delay_and_bytes_keep_their_order() -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(seconds)

    async with server, DelayProxy("127.0.0.1", server.sockets[0].getsockname()[1], 0.02, sleep) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for message in (b"first", b"second"):
            begun = time.perf_counter()
            writer.write(message)
            assert await reader.readexactly(len(message)) == message
            assert time.perf_counter() - begun >= 0.04
        many = bytes(range(256)) * 16384
        slept.clear()
        writer.write(many)
        assert await reader.readexactly(len(many)) == many
        # The delay is one of time, not of rate: 64 pieces do not take as many round trips.
        assert 0 < sum(slept) < 64 * 0.04 / 2
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_target_that_is_not_there_closes_the_connection() -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with DelayProxy("127.0.0.1", port, 0.0) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_connections_that_are_still_open_are_closed_in_silence() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with server:
        async with DelayProxy("127.0.0.1", server.sockets[0].getsockname()[1], 0.0) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"here")
            assert await reader.readexactly(4) == b"here"
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert not complaints
