"""Fakes for tests of code that stands on swarmcpp: no model, no network, no real time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

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
from swarmcpp.errors import NotReady, QueueFull, StageLost, SwarmError, UnknownModel, WireError

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

    async def tokenize_text(self, model: str, text: str, *, begins: bool = True) -> tuple[int, ...]:
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


Rows = npt.NDArray[np.float32]


def summed(rows: Rows, first: int, last: int) -> Rows:
    """What layers [first, last) of a `FakeStage` make of all rows (n, n_embd) of a sequence, which are integers."""
    for layer in range(first, last):
        rows = (rows.cumsum(axis=0, dtype=np.float64) * 3 + layer) % 61
    return rows.astype(np.float32)


def summed_token(rows: Rows) -> int:
    """What the tail samples after all `rows` that it made of a sequence."""
    return int(rows.sum()) % FAKE_MODEL.n_vocab


@dataclass(slots=True)
class FakeSequence:
    """A sequence of a `FakeStage`: the rows that came in are its KV; `keys` are of those blocks that the arena has."""

    rows: Rows
    epoch: int = -1
    keys: tuple[bytes, ...] = ()
    resumed: bool = False
    drawn: tuple[int, int] = (-1, -1)
    """The position of the token that was drawn last, and its id."""


@dataclass
class FakeStage:
    """A `pipeline.calls.StageHost` whose layers [first, last) do sums, on f32. Passes are computed when they are begun,
    and end some turns of the loop later, while `gate` is set."""

    first: int
    last: int
    n_layers: int
    n_embd: int = 4
    slots: int = 64
    block_tokens: int = 64
    held: dict[bytes, FakeSequence] = field(default_factory=dict)
    arena: dict[bytes, Rows] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _chance: random.Random = field(default_factory=lambda: random.Random(1))
    _last: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        if sequence not in self.held and len(self.held) >= self.slots:
            raise QueueFull(f"all {self.slots} sequences are in use", retry_after=1.0)
        held = self.held.setdefault(sequence, FakeSequence(np.zeros((0, self.n_embd), np.float32)))
        if epoch < held.epoch:
            raise StageLost(f"epoch {epoch} of a sequence that is open in epoch {held.epoch}")
        held.epoch, held.keys, held.resumed = epoch, tuple(takewhile(self.arena.__contains__, keys)), False
        return min(max(len(held.rows), len(held.keys) * self.block_tokens), n_tokens - 1)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        held = self._find(sequence, epoch)
        if len(held.rows) < n_tokens and held.keys:
            held.rows = np.concatenate([self.arena[key] for key in held.keys])
        held.rows, held.resumed = held.rows[:n_tokens], True
        return len(held.rows)

    def begin(
        self, parts: Sequence[Any], encoding: str, rows: bytes | memoryview, reply: str, done: Callable[[Any], None]
    ) -> None:
        held = [self._find(part.sequence, part.epoch) for part in parts]
        if not all(each.resumed and part.start <= len(each.rows) for part, each in zip(parts, held, strict=True)):
            raise StageLost("a sequence that is not resumed, or has a hole before these rows")
        if memoryview(rows).nbytes != 4 * self.n_embd * sum(part.count for part in parts):
            raise WireError(f"{memoryview(rows).nbytes} bytes of rows for {len(parts)} parts")
        given, tokens, made = np.frombuffer(rows, np.float32).reshape(-1, self.n_embd), [], []
        for part, each in zip(parts, held, strict=True):
            each.rows, given = np.concatenate([each.rows[: part.start], given[: part.count]]), given[part.count :]
            whole = summed(each.rows, self.first, self.last)
            made.append(whole[part.start :])
            if part.outputs:
                ends = [len(whole) - n for n in reversed(range(part.outputs))]
                said = [Token(summed_token(whole[:end])) for end in ends]
                right = takewhile(lambda pair: pair[0].id == pair[1], zip(said, part.guesses, strict=False))
                drawn = said[: 1 + len(list(right))]
                if part.follows >= 0 and each.drawn != (part.start, part.follows):
                    drawn = []
                else:
                    each.drawn = part.start + part.count - part.outputs + len(drawn), drawn[-1].id
                tokens.append(tuple(drawn))
        tail = self.last == self.n_layers
        result = (tuple(tokens), None, 0.5, 0.25) if tail else ((), np.concatenate(made).tobytes(), 0.5, 0.25)
        self._last = asyncio.create_task(self._end(self._last, done, result))

    async def _end(self, before: asyncio.Task[None] | None, done: Callable[[Any], None], result: object) -> None:
        await self.gate.wait()
        for _ in range(self._chance.randrange(20)):
            await asyncio.sleep(0)
        if before:
            await asyncio.wait((before,))
        done(result)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        rows, size = self._find(sequence, epoch).rows, self.block_tokens
        self.arena.update({key: rows[n * size : (n + 1) * size] for n, key in enumerate(keys[: len(rows) // size])})

    async def close_sequence(self, sequence: bytes) -> None:
        self.held.pop(sequence, None)

    def _find(self, sequence: bytes, epoch: int) -> FakeSequence:
        held = self.held.get(sequence)
        if held is None or held.epoch != epoch:
            raise StageLost(f"a sequence that is not open in epoch {epoch}")
        return held
