"""Holders of a model in this process, with a real server behind each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from swarmcpp.errors import BadRequest, SwarmError
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.wire.peers import Ask, GetChunk, GetManifest, Reply

Fault = Callable[[GetChunk, bytes], "bytes | SwarmError | None"]
"""What becomes of a chunk: other bytes, an error, or no answer at all."""

FAST = 0.01
"""Of a transfer's waits, what a test really waits."""

TURNS = 50
"""Of the loop, in each wait: four times what a chunk takes from the question to its place on the disk."""


class AtOnce(ThreadPoolExecutor):
    """Does what it is given where it is given it, so that it ends after as many turns of the loop every time."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **more))
        except Exception as error:  # noqa: BLE001 (whoever waits for it raises it)
            future.set_exception(error)
        return future


class Time:
    """A transfer's clock. However busy the machine is, what peers answer at once is there before it has moved twice."""

    def __init__(self) -> None:
        self.now = 0.0

    def begin(self) -> None:
        """Let no thread of this loop take time of its own."""
        asyncio.get_running_loop().set_default_executor(AtOnce())

    async def sleep(self, seconds: float) -> None:
        """The only way that time passes."""
        self.now += seconds
        await asyncio.sleep(seconds * FAST)
        for _ in range(TURNS):
            await asyncio.sleep(0)


async def at_once(_message: GetChunk) -> None:
    """No need to wait."""


class Peer:
    """A holder in this process, with a real server behind it."""

    def __init__(self, server: ModelServer, fault: Fault = lambda _, data: data) -> None:
        self.server = server
        self.fault = fault
        self.ready: Callable[[GetChunk], Awaitable[None]] = at_once
        """Waited for before each answer."""
        self.asked: list[int] = []
        self.busy = self.most = self.refused = 0

    async def ask(
        self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        assert isinstance(message, GetChunk | GetManifest)
        try:
            reply, (data,) = await self.server.answer(message)
        except BadRequest:
            self.refused += 1
            raise
        if isinstance(message, GetManifest):
            return reply, [memoryview(data)]
        self.asked.append(message.index)
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await asyncio.sleep(0)
            await self.ready(message)
            outcome = self.fault(message, data)
            if outcome is None:
                await asyncio.Event().wait()
            if isinstance(outcome, SwarmError):
                raise outcome
            assert outcome is not None
            return reply, [memoryview(outcome)]
        finally:
            self.busy -= 1

    def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        raise NotImplementedError
