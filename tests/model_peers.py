"""Holders of a model in this process, with a real server behind each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from swarmcpp.errors import BadRequest, SwarmError
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.wire.peers import Ask, GetChunk, GetManifest, Reply

Fault = Callable[[GetChunk, bytes], "bytes | SwarmError | None"]
"""What becomes of a chunk: other bytes, an error, or no answer at all."""


class Peer:
    """A holder in this process, with a real server behind it."""

    def __init__(self, server: ModelServer, fault: Fault = lambda _, data: data) -> None:
        self.server = server
        self.fault = fault
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
