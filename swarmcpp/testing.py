"""Fakes for tests of code that stands on swarmcpp: no model, no network, no real time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmcpp.core import (
    ChatMessage,
    Done,
    EngineState,
    Event,
    GenerateRequest,
    Limits,
    ModelInfo,
    NodeSnapshot,
    TextEvent,
    Timings,
    Token,
    Usage,
)
from swarmcpp.errors import NotReady, QueueFull, SwarmError, UnknownModel

FAKE_MODEL = ModelInfo(
    id="fake",
    path="fake.gguf",
    architecture="bytes",
    description="one token per byte",
    n_params=0,
    size_bytes=0,
    n_vocab=256,
    n_ctx_train=4096,
    n_layers=1,
    created=1_700_000_000,
)


class FakeClock:
    """A `core.Clock` that moves only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


@dataclass(slots=True)
class FakeService:
    """A `core.Service` whose tokens are UTF-8 bytes and whose every answer is `script`, one character per event.

    `script` is a text, or a function of the request. Stop strings and `max_tokens` (in bytes, rounded down to whole
    characters) cut it. The other fields steer it; what happened is read from `requests`, `finished`, `cancelled`.
    """

    script: str | Callable[[GenerateRequest], str] = "Hello, world."
    ctx_size: int = 4096
    max_running: int = 1_000_000
    """Requests at one time; one more raises QueueFull with `retry_after`."""
    retry_after: float = 2.5
    gate: asyncio.Event | None = None
    """While it is not set, answers wait before event `gate_at`."""
    gate_at: int = 0
    fail_at: tuple[int, SwarmError] | None = None
    """Raise the error instead of the event with this index."""
    event_chars: int = 1
    """Characters per event."""
    state: EngineState = "ready"
    requests: list[GenerateRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    conversations: list[tuple[ChatMessage, ...]] = field(default_factory=list)
    running: int = 0

    def models(self) -> tuple[ModelInfo, ...]:
        """The one fake model, once `state` is ready."""
        return (FAKE_MODEL,) if self.state == "ready" else ()

    def snapshot(self) -> NodeSnapshot:
        """State now; as many slots as fit `max_running`."""
        return NodeSnapshot(
            state=self.state,
            detail=f"fake engine {self.state}",
            model=FAKE_MODEL if self.state == "ready" else None,
            slots=self.max_running,
            slots_busy=self.running,
            ctx_size=self.ctx_size,
            queued=0,
            running=self.running,
            restarts=0,
            prefill_tps=100.0,
            decode_tps=10.0,
        )

    def limits(self, model: str | None = None) -> Limits:
        """Limits of the fake model."""
        return Limits(ctx_size=self.ctx_size, n_vocab=FAKE_MODEL.n_vocab)

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Bytes of `role: content` lines. Raises UnknownModel, NotReady."""
        self.conversations.append(tuple(messages))
        return await self.tokenize_text(model, "".join(f"{one.role}: {one.content}\n" for one in messages))

    async def tokenize_text(self, model: str, text: str) -> tuple[int, ...]:
        """Bytes of `text`. Raises UnknownModel, NotReady."""
        self._check(model)
        return tuple(text.encode())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """The script, event by event. Raises QueueFull, UnknownModel, NotReady, and the error of `fail_at`."""
        self.requests.append(request)
        self._check(request.model)
        if self.running >= self.max_running:
            raise QueueFull(
                f"{self.running} requests run and {self.max_running} may; try again later", retry_after=self.retry_after
            )
        self.running += 1
        try:
            text, done = self._answer(request)
            pieces = [text[start : start + self.event_chars] for start in range(0, len(text), self.event_chars)]
            for index, piece in enumerate(pieces):
                await self._step(index)
                yield TextEvent(piece, tuple(map(Token, piece.encode())))
            await self._step(len(pieces))
            self.finished.append(request.id)
            yield done
        except (asyncio.CancelledError, GeneratorExit):
            if request.id not in self.finished:
                self.cancelled.append(request.id)
            raise
        finally:
            self.running -= 1

    def _check(self, model: str) -> None:
        if self.state != "ready":
            raise NotReady(f"the fake engine is {self.state}")
        if model != FAKE_MODEL.id:
            raise UnknownModel(f"model {model!r} is not served here; available: {FAKE_MODEL.id}", param="model")

    async def _step(self, index: int) -> None:
        # One turn of the loop per event, so that streams interleave as they do on a real engine.
        await asyncio.sleep(0)
        if self.gate is not None and index == self.gate_at:
            await self.gate.wait()
        if self.fail_at is not None and index == self.fail_at[0]:
            raise self.fail_at[1]

    def _answer(self, request: GenerateRequest) -> tuple[str, Done]:
        text = self.script if isinstance(self.script, str) else self.script(request)
        stops = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
        text = text[: min(stops, default=len(text))]
        kept = text.encode()[: request.max_tokens].decode(errors="ignore")
        usage = Usage(len(request.prompt), len(kept.encode()))
        done = Done("stop" if kept == text else "length", usage, Timings(queue_s=0.0, prefill_s=0.5, decode_s=0.25))
        return kept, done
