"""A TCP proxy that holds every byte back for a while: a network with a longer way, without a kernel module for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType

PIECE = 65536
IN_FLIGHT = 1024
"""Pieces that may be on their way in one direction; then the sender has to wait."""

Flight = asyncio.Queue[tuple[float, bytes]]
Sleep = Callable[[float], Awaitable[object]]


class DelayProxy:
    """Forwards connections from 127.0.0.1:`port` to `host`:`target`, each direction `one_way_s` late.

    Used as an async context manager. The round trip grows by twice `one_way_s`, also that of the first request of a
    connection; the TCP handshake itself is not delayed. `sleep` waits so many seconds.
    """

    def __init__(self, host: str, target: int, one_way_s: float, sleep: Sleep = asyncio.sleep) -> None:
        self._host, self._target, self._one_way_s, self._sleep = host, target, one_way_s, sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> DelayProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: the one that the server makes of a coroutine complains when it is cancelled.
        task = asyncio.create_task(self._connected(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        # Either side may break the connection at any time; the other then sees it closed.
        with contextlib.suppress(OSError):
            try:
                back, there = await asyncio.open_connection(self._host, self._target)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(reader, there))
                    group.create_task(self._carry(back, writer))
            except* OSError:
                pass
            finally:
                for each in (writer, there):
                    if each is not None:
                        each.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, to its end. Raises OSError when either side breaks."""
        flight: Flight = asyncio.Queue(IN_FLIGHT)
        clock = asyncio.get_running_loop().time

        async def land() -> None:
            while True:
                due, piece = await flight.get()
                if (left := due - clock()) > 0:
                    await self._sleep(left)
                if not piece:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(piece)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(land())
            while True:
                piece = await reader.read(PIECE)
                await flight.put((clock() + self._one_way_s, piece))
                if not piece:
                    break
