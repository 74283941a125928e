"""Models of a node without an engine: what answers is a script, the text side is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from engine_support import part_of

from swarmcpp.core import EngineStats, GenerateRequest, TokenPart
from swarmcpp.errors import NotReady, SwarmError
from swarmcpp.models.inspect import inspect
from swarmcpp.models.manifest import manifest_of
from swarmcpp.node.hosted import Hosted
from swarmcpp.node.member import Swarm
from swarmcpp.node.preparing import model_info
from swarmcpp.peers import Load
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.runner import LOCAL, Fetch


@dataclass
class FakeRunner:
    """A `Runner` that answers with `text`, a byte a token, and waits before each while `gate` is not set."""

    text: str
    ctx_size: int = 256
    fail_at: tuple[int, SwarmError] | None = None
    """Raise the error instead of the token with this number."""
    slots: int = 2
    status: EngineStatus = field(default_factory=lambda: EngineStatus(state="ready"))
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    ahead: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def stats(self) -> EngineStats:
        return EngineStats(self.slots, self.ahead, 0)

    @property
    def usable(self) -> bool:
        return self.status.state not in ("failed", "stopped")

    def load(self, ttft_s: float = 0.0) -> Load:
        return Load(slots_busy=self.ahead, ttft_s=ttft_s)

    def route(self, request_id: str) -> str:
        return LOCAL

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        if not self.usable:
            raise NotReady(self.status.detail)
        return request

    async def tokens(self, request: GenerateRequest, fetch: Fetch | None = None) -> AsyncGenerator[TokenPart, None]:
        self.requests.append(request)
        self.ahead += 1
        try:
            for number in range(len(request.generated), len(self.text)):
                await self.gate.wait()
                if self.fail_at and number == self.fail_at[0]:
                    raise self.fail_at[1]
                yield part_of((ord(self.text[number]),), "length" if number == len(self.text) - 1 else None)
        finally:
            self.ahead -= 1


class FakeHosted(Hosted):
    """The model at `path`, as `runner` answers for it."""

    def __init__(self, path: Path, runner: FakeRunner, swarm: Swarm | None = None) -> None:
        self.file = inspect(path)
        self.fake = runner
        self._swarm = swarm
        super().__init__(model_info(path.stem, self.file, self.file.size_bytes), runner)

    async def open(self) -> None:
        """Only the vocabulary is loaded."""
        await self.read_text(self.file.path, self.file.chat_template)
        if self._swarm:
            manifest = manifest_of(self.file.files, self.file.path.parent)
            self._swarm.give(manifest, self.file.files)
            self.offer(self._swarm, manifest.fingerprint, root=b"")
