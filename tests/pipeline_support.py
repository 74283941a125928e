"""Stages on real llama.cpp in this process, each with a thread that computes, and what the tests of a head need."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from engine_support import prompt_of
from fake_backend import FakeBlockFile

from swarmcpp.core import BlockRef, GenerateRequest, Sampled, SamplingParams, Token, TokenPart
from swarmcpp.engine.speculation import drawn_tokens
from swarmcpp.errors import QueueFull, StageFailed, StageLost, SwarmError
from swarmcpp.kv.keys import block_keys
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import ContextOptions, Model
from swarmcpp.llama.rows import decode_rows, encode_rows
from swarmcpp.llama.sampler import Sampler
from swarmcpp.llama.stage import EmbeddingTable, StageContext, StageRows
from swarmcpp.models.slicing import write_slice
from swarmcpp.pipeline.conductor import Conductor
from swarmcpp.pipeline.contract import Pass, Passed, StageRef, StageTime
from swarmcpp.pipeline.guessing import AskGuesses
from swarmcpp.pipeline.runs import Ask, Chain, ModelFacts, PipelinePolicy, Surroundings
from swarmcpp.route.passes import Curve, micro_batches
from swarmcpp.wire.peers import PassPart

BLOCK = 64
FINGERPRINT = bytes(range(32))
N_CTX = 512
N_VOCAB = 512
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
Answer = TypeVar("Answer")


@dataclass(slots=True)
class Held:
    """A sequence at a stage."""

    seq: int
    epoch: int
    length: int = 0
    resumed: bool = False
    sampler: Sampler | None = None
    request: GenerateRequest | None = None
    blocks: list[BlockRef] = field(default_factory=list)
    drawn: tuple[int, int] = (-1, -1)


class ThreadStage:
    """A `StageCaller` for one slice. Its thread does everything in the order of the calls."""

    def __init__(self, ref: StageRef, model: Model, slots: int, others: dict[StageRef, ThreadStage]) -> None:
        self.ref = ref
        self.context = StageContext(model, ContextOptions(N_CTX, slots, 1), is_tail=ref.is_tail)
        self._backend = LlamaBackend(model, self.context.context, BLOCK)
        self._backend.learn()
        self._backend.use_file(FakeBlockFile())
        self._model = model
        self._others = others
        self._thread = ThreadPoolExecutor(1)
        self._free = list(range(slots))
        self.held: dict[bytes, Held] = {}
        self.arena: dict[bytes, BlockRef] = {}
        self.passes: list[tuple[int, ...]] = []
        """Rows of each part of each pass."""
        self.void = 0
        """Parts that were built on a wrong guess."""
        self.before: Callable[[ThreadStage, Pass], None] = lambda _stage, _work: None
        """Called by the thread at the beginning of each pass; may raise what the pass fails with."""
        self.opening: Callable[[], None] = lambda: None
        """Called at each open; may raise."""
        self.resumed: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def _on_thread(self, work: Callable[..., Answer], *args: object) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def die(self) -> None:
        """Forget everything but the arena, as an engine that is started again."""
        for sequence in list(self.held):
            self._drop(sequence)

    def _drop(self, sequence: bytes) -> None:
        held = self.held.pop(sequence, None)
        if held is not None:
            self.context.context.truncate(held.seq, 0)
            self._free = sorted([*self._free, held.seq])
            if held.sampler:
                held.sampler.close()

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        return await self._on_thread(self._open, sequence, epoch, keys, request, n_tokens)

    def _open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        self.opening()
        assert (request is not None) == self.ref.is_tail
        assert request is None or len(request.prompt) + len(request.generated) == n_tokens
        held = self.held.get(sequence)
        if held is None:
            if not self._free:
                raise QueueFull("all sequences are taken", retry_after=1.0)
            held = self.held[sequence] = Held(self._free.pop(0), epoch)
        if epoch < held.epoch:
            raise StageLost(f"epoch {epoch} of a sequence that is open in epoch {held.epoch}")
        held.epoch, held.request, held.blocks, held.resumed = epoch, request, [], False
        for key in keys:
            if key not in self.arena:
                break
            held.blocks.append(self.arena[key])
        return min(max(held.length, BLOCK * len(held.blocks)), n_tokens - 1)

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        return await self._on_thread(self._resume, sequence, epoch, n_tokens)

    def _resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        held = self._known(sequence, epoch)
        if held.length < n_tokens:
            held.length = BLOCK * self._backend.load_blocks(held.seq, held.blocks[: -(-n_tokens // BLOCK)])
        held.length, held.resumed = min(held.length, n_tokens), True
        self.context.context.truncate(held.seq, held.length)
        if held.request is not None:
            if held.sampler:
                held.sampler.close()
            wanted = held.request
            held.sampler = Sampler(wanted.sampling, self._model.vocab, wanted.prompt, wanted.generated)
        self.resumed.append(held.length)
        return held.length

    def _known(self, sequence: bytes, epoch: int) -> Held:
        held = self.held.get(sequence)
        if held is None or held.epoch != epoch:
            raise StageLost(f"{self.ref.node} does not know the sequence, or it has another epoch")
        return held

    def begin(
        self, work: Pass, done: Callable[[Passed | StageFailed], None], computed: Callable[[], None] = lambda: None
    ) -> None:
        async def run() -> None:
            try:
                result: Passed | StageFailed = await self.run(work)
            except StageFailed as error:
                result = error
            done(result)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        asyncio.get_running_loop().call_soon(computed)

    async def run(self, work: Pass) -> Passed:
        try:
            ids, hidden = await self._on_thread(self._run, work)
        except StageFailed:
            raise
        except SwarmError as error:
            raise StageFailed(str(error), node=self.ref.node, reason=error.code) from error
        time = StageTime(0.001 * len(work.parts), 0.0)
        if not work.onward:
            return Passed(ids, (time,))
        rows = encode_rows(hidden, work.wire)
        onward = replace(work, encoding=work.wire, rows=rows, onward=work.onward[1:])
        rest = await self._others[work.onward[0]].run(onward)
        return Passed(rest.tokens, (time, *rest.times))

    def _run(self, work: Pass) -> tuple[Sampled, np.ndarray]:
        self.before(self, work)
        self.passes.append(tuple(part.count for part in work.parts))
        rows = decode_rows(work.rows, work.n_rows, self.context.n_embd, work.encoding)
        held = [self._known(part.sequence, part.epoch) for part in work.parts]
        for part, there in zip(work.parts, held, strict=True):
            if not there.resumed or part.start > there.length:
                raise StageLost(f"rows from {part.start} of a sequence that ends at {there.length}, or is not resumed")
        parts = []
        begin = 0
        for part, there in zip(work.parts, held, strict=True):
            self.context.context.truncate(there.seq, part.start)
            parts.append(StageRows(there.seq, part.start, rows[begin : begin + part.count], part.outputs))
            begin += part.count
        order = sorted(range(len(parts)), key=lambda index: parts[index].slot)
        hidden = self.context.decode([parts[index] for index in order])
        for part, there in zip(work.parts, held, strict=True):
            there.length = part.start + part.count
        if not self.ref.is_tail:
            pieces = np.split(hidden, np.cumsum([len(parts[index].rows) for index in order])[:-1])
            back = dict(zip(order, pieces, strict=True))
            return (), np.concatenate([back[index] for index in range(len(parts))])
        outputs = [(part, there) for part, there in zip(work.parts, held, strict=True) if part.outputs]
        return tuple(self._sample(part, there) for part, there in outputs), hidden

    def _sample(self, part: PassPart, held: Held) -> tuple[Token, ...]:
        sampler, rows = held.sampler, self.context.outputs[held.seq]
        assert sampler is not None
        if part.follows >= 0 and held.drawn != (part.start, part.follows):
            self.void += 1
            return ()
        tokens = drawn_tokens(part.guesses, lambda at: Token(sampler.sample(self.context.context, rows[at])))
        held.drawn = part.start + part.count - part.outputs + len(tokens), tokens[-1].id
        return tuple(tokens)

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        await self._on_thread(self._store, sequence, epoch, keys)

    def _store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        held = self._known(sequence, epoch)
        assert BLOCK * len(keys) <= held.length
        # A block may be stored under the number that it has in all: there is one arena slot for each.
        grants = [(n, len(self.arena) + n) for n, key in enumerate(keys) if key not in self.arena]
        digests = dict(self._backend.store_blocks(held.seq, grants))
        for number, slot in grants:
            self.arena[keys[number]] = BlockRef(slot, digests[slot])

    async def close(self, sequence: bytes) -> None:
        await self._on_thread(self._drop, sequence)

    def shut(self) -> None:
        """End the thread and free the context."""
        self._thread.shutdown()
        self.die()
        self.context.close()


class Rendezvous:
    """A `before` for stages that shall compute at the same time: passes given as (stage, number) meet another's."""

    def __init__(self, meeting: set[tuple[int, int]]) -> None:
        self._meeting = meeting
        self._barrier = threading.Barrier(2)
        self.met = 0

    def __call__(self, stage: ThreadStage, _work: Pass) -> None:
        if (stage.ref.first, len(stage.passes)) in self._meeting:
            self._barrier.wait(timeout=20)
            self.met += 1


class Swarm:
    """All stages of a model, cut at `cuts` (0, 2, 5), and what a head needs of them."""

    def __init__(self, path: Path, cuts: Sequence[int], directory: Path, slots: int = 8) -> None:
        self.stages: dict[StageRef, ThreadStage] = {}
        self._models: list[Model] = []
        self.table = EmbeddingTable(path)
        for number, (first, last) in enumerate(pairwise(cuts)):
            file = write_slice(path, first, last, directory / f"{first}-{last}.gguf", fingerprint=FINGERPRINT)
            self._models.append(Model(file, use_extra_bufts=False))
            ref = StageRef(f"node{number}", FINGERPRINT, first, last, cuts[-1])
            self.stages[ref] = ThreadStage(ref, self._models[-1], slots, self.stages)
        eog = self._models[-1].vocab.eog_tokens
        self.facts = ModelFacts(FINGERPRINT, cuts[-1], self.table.n_vocab, N_CTX, eog)
        self.asks: list[Ask] = []
        self.route: Callable[[Ask], Chain] = lambda _ask: tuple(self.stages)
        self.curve: Curve = ()
        self.guess: AskGuesses = lambda _parts, _done: False

    @property
    def all(self) -> list[ThreadStage]:
        return list(self.stages.values())

    def surroundings(self, *, caching: bool = True) -> Surroundings:
        def routes(ask: Ask) -> Chain:
            self.asks.append(ask)
            return self.route(ask)

        def keys(tokens: Sequence[int], salt: str) -> list[bytes]:
            return block_keys(FINGERPRINT + salt.encode(), tokens, BLOCK) if caching else []

        return Surroundings(
            embed=self.table.rows,
            keys=keys,
            routes=routes,
            caller=self.stages.__getitem__,
            pass_times=lambda _stage: self.curve,
            rtt=lambda _chain: 0.0,
            encodings=lambda _chain: ("f32", "f32"),
            micro_batches=micro_batches,
            guess=lambda parts, done: self.guess(parts, done),
        )

    def close(self) -> None:
        for stage in self.all:
            stage.shut()
        for model in self._models:
            model.close()


def policy(slots: int = 8, queue_size: int = 8, **others: object) -> PipelinePolicy:
    return replace(PipelinePolicy(slots, queue_size), **others)


async def until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Wait until threads have made `condition` true."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        await asyncio.sleep(0.002)


SwarmMaker = Callable[..., Swarm]
Whole = Callable[..., list[list[int]]]


def request(
    length: int, max_tokens: int = 20, seed: int = 0, sampling: SamplingParams = GREEDY, prompt: Sequence[int] = ()
) -> GenerateRequest:
    return GenerateRequest(f"r{seed}", "m", tuple(prompt) or prompt_of(length, seed, N_VOCAB), max_tokens, sampling)


def in_flight(conductor: Conductor) -> int:
    """Passes on their way."""
    return sum(lane.in_flight for lane in conductor._lanes.values())


def groups_of(conductor: Conductor) -> int:
    return sum(len(lane.groups) for lane in conductor._lanes.values())


@asynccontextmanager
async def head(
    swarm: Swarm, with_policy: PipelinePolicy | None = None, *, caching: bool = True
) -> AsyncIterator[Conductor]:
    made = Conductor(swarm.facts, with_policy or policy(), swarm.surroundings(caching=caching), time.monotonic)
    try:
        yield made
    finally:
        await made.close()
    assert not any(stage.held for stage in swarm.all), "a sequence stayed open"
    assert made.ahead == 0
    assert made.stats.slots_busy == in_flight(made) == 0


async def parts_of(conductor: Conductor, wanted: GenerateRequest) -> list[TokenPart]:
    async with aclosing(conductor.tokens(conductor.admit(wanted))) as parts:
        return [part async for part in parts]


async def run(conductor: Conductor, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    answers = await asyncio.gather(*(parts_of(conductor, each) for each in requests))
    for parts in answers:
        assert [part.finish for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish
    return [[token for part in parts for token in part.ids] for parts in answers]
