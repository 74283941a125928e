"""A model without a model: a strict `core.Backend`, a scripted `wire.EngineLink`, and a clock that decodes move."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmcpp.core import GenerateRequest, Rows, SamplerLike
from swarmcpp.errors import DecodeAborted, DecodeFailed
from swarmcpp.testing import FakeClock
from swarmcpp.wire import FromEngine, Refused, StepOut, ToEngine, TokenOut


def next_token(tokens: Sequence[int], n_vocab: int, draw: tuple[int, int] | None = None) -> int:
    """What the fake model says after `tokens`; `draw` (seed, index of the draw) makes it a sampled token."""
    digest = hashlib.blake2b(repr((tuple(tokens), draw)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % n_vocab


def continuation(request: GenerateRequest, count: int, n_vocab: int) -> list[int]:
    """The first `count` tokens that the fake model generates for `request`, whatever it already generated."""
    tokens = list(request.prompt)
    for index in range(count):
        draw = (request.sampling.seed, index) if request.sampling.temperature > 0 else None
        tokens.append(next_token(tokens, n_vocab, draw))
    return tokens[len(request.prompt) :]


@dataclass(slots=True)
class FakeSampler:
    """Greedy at temperature 0; else one numbered draw per token, as a seeded generator has them."""

    seed: int | None
    drawn: int
    owner: FakeBackend
    closed: bool = False

    def close(self) -> None:
        assert not self.closed, "a sampler is closed twice"
        self.closed = True
        self.owner.open_samplers -= 1


@dataclass(slots=True)
class FakeBackend:
    """Deterministic and strict: every call is checked against what the slots hold.

    Decodes are counted from 1. `abort_at` and `fail_at` name the ones that stop half-way or fail for good; `on_decode`
    runs at the start of each, as another process would. `cost` gives the seconds of a batch by decode and prompt rows.
    """

    n_slots: int = 4
    n_ctx: int = 256
    max_rows: int = 512
    n_vocab: int = 97
    eog_tokens: frozenset[int] = frozenset()
    clock: FakeClock | None = None
    cost: Callable[[int, int], float] = lambda decode, prompt: 0.03 + 0.01 * decode + 0.005 * prompt
    abort_at: set[int] = field(default_factory=set)
    fail_at: set[int] = field(default_factory=set)
    on_decode: Callable[[Sequence[Rows]], None] = lambda rows: None
    decodes: int = 0
    open_samplers: int = 0
    batches: list[tuple[Rows, ...]] = field(default_factory=list)
    kv: list[list[int]] = field(init=False)
    _outputs: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv = [[] for _ in range(self.n_slots)]

    def sampler(self, request: GenerateRequest) -> SamplerLike:
        self.open_samplers += 1
        seed = request.sampling.seed if request.sampling.temperature > 0 else None
        return FakeSampler(seed, len(request.generated), self)

    def decode(self, rows: Sequence[Rows]) -> None:
        self.decodes += 1
        self.batches.append(tuple(rows))
        self._check(rows)
        self._outputs.clear()
        self.on_decode(rows)
        aborted = self.decodes in self.abort_at
        if self.clock:
            prompt = sum(len(part.tokens) for part in rows if len(part.tokens) > 1)
            decode = sum(1 for part in rows if len(part.tokens) == 1)
            self.clock.advance(self.cost(decode, prompt) * (0.5 if aborted else 1.0))
        if self.decodes in self.fail_at:
            raise DecodeFailed("told to fail")
        for index, part in enumerate(rows):
            # Of an aborted batch, whole ubatches stay: here every other part, so that truncation is needed.
            if not aborted or index % 2 == 0:
                self.kv[part.slot].extend(part.tokens)
            if part.output and not aborted:
                self._outputs[part.slot] = tuple(self.kv[part.slot])
        if aborted:
            raise DecodeAborted("told to abort")

    def _check(self, rows: Sequence[Rows]) -> None:
        assert rows, "an empty batch"
        assert sum(len(part.tokens) for part in rows) <= self.max_rows, "more rows than llama.cpp survives"
        slots = [part.slot for part in rows]
        assert len(set(slots)) == len(slots), f"a slot twice in one batch: {slots}"
        for part in rows:
            assert 0 <= part.slot < self.n_slots
            assert part.tokens, "rows without tokens"
            assert part.start == len(self.kv[part.slot]), f"slot {part.slot}: rows are not contiguous"
            assert part.start + len(part.tokens) <= self.n_ctx, f"slot {part.slot} overflows"

    def sample(self, sampler: SamplerLike, slot: int) -> int:
        assert isinstance(sampler, FakeSampler)
        assert not sampler.closed, "a closed sampler is used"
        draw = None if sampler.seed is None else (sampler.seed, sampler.drawn)
        sampler.drawn += 1
        return next_token(self._outputs.pop(slot), self.n_vocab, draw)

    def truncate(self, slot: int, n_past: int) -> None:
        del self.kv[slot][n_past:]

    def length(self, slot: int) -> int:
        return len(self.kv[slot])


@dataclass(slots=True)
class FakeLink:
    """An `EngineLink` of two lists. A receive that may wait calls `on_idle` when nothing is there."""

    inbox: deque[ToEngine] = field(default_factory=deque)
    outbox: list[FromEngine] = field(default_factory=list)
    on_idle: Callable[[float], None] = lambda timeout_s: None

    def receive(self, timeout_s: float) -> ToEngine | None:
        if not self.inbox and timeout_s > 0:
            self.on_idle(timeout_s)
        return self.inbox.popleft() if self.inbox else None

    def send(self, message: FromEngine) -> None:
        self.outbox.append(message)

    def outputs(self, serial: int) -> list[TokenOut]:
        """Tokens that the engine reported for a request, in order."""
        steps = [message for message in self.outbox if isinstance(message, StepOut)]
        return [out for step in steps for out in step.tokens if out.serial == serial]

    def refusals(self) -> list[Refused]:
        """Every refusal, in order."""
        return [refused for message in self.outbox if isinstance(message, StepOut) for refused in message.refused]
