"""A model without a model: a strict `WholeBackend`, a scripted `EngineLink`, and a clock that decodes move."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from swarmcpp.core import BlockFile, BlockRef, GenerateRequest, Rows, SamplerLike, Token, TokenPart
from swarmcpp.errors import DecodeAborted, DecodeFailed
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import FromEngine, Refused, StepOut, ToEngine


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

    def follow(self, tokens: Sequence[int]) -> None:
        self.drawn += len(tokens)

    def copy(self) -> FakeSampler:
        self.owner.open_samplers += 1
        return FakeSampler(self.seed, self.drawn, self.owner)

    def close(self) -> None:
        assert not self.closed, "a sampler is closed twice"
        self.closed = True
        self.owner.open_samplers -= 1


@dataclass(slots=True)
class FakeBlockFile:
    """An arena of payloads in memory. Slots in `broken` can be neither read nor written."""

    payloads: dict[int, bytes] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    reads: int = 0
    writes: int = 0

    def read_into(self, slot: int, target: memoryview) -> bool:
        self.reads += 1
        if slot in self.broken or len(self.payloads.get(slot, b"")) != len(target):
            return False
        target[:] = self.payloads[slot]
        return True

    def write(self, slot: int, payload: memoryview) -> bool:
        self.writes += 1
        if slot in self.broken:
            return False
        self.payloads[slot] = bytes(payload)
        return True


@dataclass(slots=True)
class FakeBackend:
    """Deterministic and strict: every call is checked against what the slots hold.

    Decodes are counted from 1. `abort_at` and `fail_at` name the ones that stop half-way or fail for good; `on_decode`
    runs at the start of each, as another process would. `cost` gives the seconds of a batch by decode and prompt rows.
    The payload of a block is a hash of all tokens before it, then its own tokens: like KV, it fits in one place only.
    """

    n_slots: int = 4
    n_ctx: int = 256
    max_rows: int = 512
    max_outputs: int = 48
    n_vocab: int = 97
    eog_tokens: frozenset[int] = frozenset()
    clock: FakeClock | None = None
    cost: Callable[[int, int], float] = lambda decode, prompt: 0.03 + 0.01 * decode + 0.005 * prompt
    abort_at: set[int] = field(default_factory=set)
    fail_at: set[int] = field(default_factory=set)
    on_decode: Callable[[Sequence[Rows]], None] = lambda rows: None
    block_tokens: int = 0
    file: BlockFile | None = None
    decodes: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(source, target, tokens) of each `copy_prefix`."""
    open_samplers: int = 0
    batches: list[tuple[Rows, ...]] = field(default_factory=list)
    kv: list[list[int]] = field(init=False)
    _outputs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """By slot: all tokens up to each output."""

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
            if part.outputs and not aborted:
                kv = self.kv[part.slot]
                self._outputs[part.slot] = [tuple(kv[: len(kv) - n]) for n in reversed(range(part.outputs))]
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
        assert sum(part.outputs for part in rows) <= max(self.max_outputs, self.n_slots), "more outputs than reserved"

    def sample(self, sampler: SamplerLike, slot: int, output: int = 0) -> Token:
        assert isinstance(sampler, FakeSampler)
        assert not sampler.closed, "a closed sampler is used"
        draw = None if sampler.seed is None else (sampler.seed, sampler.drawn)
        sampler.drawn += 1
        return Token(next_token(self._outputs[slot][output], self.n_vocab, draw))

    def truncate(self, slot: int, n_past: int) -> None:
        del self.kv[slot][n_past:]

    def length(self, slot: int) -> int:
        return len(self.kv[slot])

    # -- KV ------------------------------------------------------------------------------------------------------

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        assert source != target, "a slot is copied onto itself"
        assert 0 < n_tokens <= len(self.kv[source]), f"slot {source} does not hold {n_tokens} tokens"
        self.copies.append((source, target, n_tokens))
        self.kv[target] = self.kv[source][:n_tokens]

    def payload(self, tokens: Sequence[int], number: int) -> bytes:
        """The payload of block `number` of a token sequence."""
        start, stop = number * self.block_tokens, (number + 1) * self.block_tokens
        before = hashlib.blake2b(repr(tuple(tokens[:start])).encode(), digest_size=8).digest()
        return before + b"".join(token.to_bytes(4, "little") for token in tokens[start:stop])

    def load_blocks(self, slot: int, blocks: Sequence[BlockRef]) -> int:
        assert self.block_tokens, "no blocks here"
        assert blocks, "nothing to load"
        assert len(blocks) * self.block_tokens < self.n_ctx, f"slot {slot} overflows"
        tokens: list[int] = []
        payload = bytearray(8 + 4 * self.block_tokens)
        for number, block in enumerate(blocks):
            if self.file is None or not self.file.read_into(block.slot, memoryview(payload)):
                break
            if blake3(payload).digest() != block.digest:
                break
            tokens += [int.from_bytes(payload[at : at + 4], "little") for at in range(8, len(payload), 4)]
            assert self.payload(tokens, number) == payload, "a block of another prefix or another place"
        self.kv[slot] = tokens
        return len(tokens) // self.block_tokens

    def store_blocks(self, slot: int, grants: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
        assert self.block_tokens, "no blocks here"
        written: list[tuple[int, bytes]] = []
        for number, arena_slot in grants:
            assert 0 <= number < len(self.kv[slot]) // self.block_tokens, f"slot {slot} does not hold block {number}"
            payload = self.payload(self.kv[slot], number)
            if self.file is not None and self.file.write(arena_slot, memoryview(payload)):
                written.append((arena_slot, blake3(payload).digest()))
        return written

    def rows(self) -> int:
        """Rows of all decodes so far."""
        return sum(len(part.tokens) for batch in self.batches for part in batch)


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

    def outputs(self, serial: int) -> list[TokenPart]:
        """What the engine reported of a request, in order."""
        steps = [message for message in self.outbox if isinstance(message, StepOut)]
        return [out.part for step in steps for out in step.tokens if out.serial == serial]

    def refusals(self) -> list[Refused]:
        """Every refusal, in order."""
        return [refused for message in self.outbox if isinstance(message, StepOut) for refused in message.refused]
