"""When a lane sends what, and when readers get it: the stages are played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from engine_support import sampled_of

from swarmcpp.core import GenerateRequest, SamplingParams, TokenPart
from swarmcpp.errors import StageFailed
from swarmcpp.pipeline.contract import Pass, Passed, StageRef, StageTime
from swarmcpp.pipeline.lanes import Lane
from swarmcpp.pipeline.runs import Broken, Chain, ModelFacts, PipelinePolicy, Run, Surroundings
from swarmcpp.testing import FakeClock
from swarmcpp.wire.codec import RowEncoding

FINGERPRINT = bytes(32)
CHAIN: Chain = (StageRef("a", FINGERPRINT, 0, 2, 4), StageRef("b", FINGERPRINT, 2, 4, 4))
DEADLINE_S = 60.0


@dataclass
class Asked:
    """A pass that was begun, and what ends it."""

    work: Pass
    done: Callable[[Passed | StageFailed], None]
    computed: Callable[[], None]

    @property
    def rows(self) -> list[int]:
        return [part.count for part in self.work.parts]

    def answer(self, token: int = 7) -> None:
        tokens = sampled_of(*(token for part in self.work.parts if part.outputs))
        self.done(Passed(tokens, (StageTime(0.01, 0.0),) * 2))


@dataclass
class Stages:
    """A `StageCaller` that only notes what is begun, and a `LaneWatch`."""

    asked: list[Asked] = field(default_factory=list)
    over: list[Run] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    gone: list[Lane] = field(default_factory=list)

    def begin(
        self, work: Pass, done: Callable[[Passed | StageFailed], None], computed: Callable[[], None] = lambda: None
    ) -> None:
        self.asked.append(Asked(work, done, computed))

    def take(self) -> list[Asked]:
        """What was begun since the last time."""
        asked, self.asked = self.asked, []
        return asked

    def answered(self, run: Run) -> None:
        pass

    def grown(self, run: Run, n_tokens: int) -> None:
        self.full.append(n_tokens)

    def ended(self, run: Run) -> None:
        self.over.append(run)

    def lost(self, lane: Lane) -> None:
        self.gone.append(lane)

    def measured(self, rows: int, seconds: float, wall_s: float, *, decode: bool) -> None:
        pass


class Bed:
    """A lane over hand-played stages."""

    def __init__(self) -> None:
        self.stages = Stages()
        self.encodings: tuple[RowEncoding, RowEncoding] = ("f32", "f32")
        around = Surroundings(
            embed=lambda tokens: np.zeros((len(tokens), 4), np.float32),
            keys=lambda _tokens, _salt: [],
            routes=lambda _ask: CHAIN,
            caller=lambda _ref: self.stages,  # type: ignore[arg-type, return-value]
            pass_times=lambda _ref: ((1, 0.01), (8, 0.02)),
            rtt=lambda _chain: 0.0,
            encodings=lambda _chain: self.encodings,
            micro_batches=lambda _streams, _curves, _rtt, _most: 1,
        )
        facts = ModelFacts(FINGERPRINT, 4, 100, 1000, frozenset({0}))
        self.clock = FakeClock()
        self.lane = Lane(CHAIN, facts, PipelinePolicy(64, 8, copy_every=16), around, self.stages, self.clock)
        self._count = 0

    def join(self, rows: int, max_tokens: int = 50) -> Run:
        self._count += 1
        request = GenerateRequest(f"r{self._count}", "m", (1,) * rows, max_tokens, SamplingParams(temperature=0.0))
        run = Run(
            serial=self._count,
            request=request,
            tokens=list(request.prompt),
            sequence=self._count.to_bytes(16),
            arrived_s=0.0,
        )
        run.placed(0, self.clock())
        self.lane.join(run)
        return run


@pytest.fixture
async def bed() -> Bed:
    return Bed()


def waiting(run: Run) -> int:
    """Parts that a reader could take now."""
    return run.parts.qsize()


async def told(run: Run) -> TokenPart | Broken:
    return await asyncio.wait_for(run.parts.get(), DEADLINE_S)


async def test_short_prompts_wait_for_the_first_stage_and_go_together(bed: Bed) -> None:
    bed.join(8)
    (alone,) = bed.stages.take()
    assert alone.rows == [8]
    for _ in range(5):
        bed.join(8)
    assert not bed.stages.take(), "the first stage computes, and more may come"
    alone.computed()
    (together,) = bed.stages.take()
    assert together.rows == [8] * 5, "the answer of the one before need not be waited for"
    alone.computed()
    assert not bed.stages.take()


async def test_a_full_chunk_waits_for_nothing(bed: Bed) -> None:
    bed.join(8)
    assert len(bed.stages.take()) == 1
    for _ in range(15):
        bed.join(8)
    assert not bed.stages.take()
    bed.join(8)
    assert [sum(asked.rows) for asked in bed.stages.take()] == [64]


async def test_prompts_go_on_when_the_pass_before_fails_at_once(bed: Bed) -> None:
    bed.join(8)
    other = bed.join(8)
    (alone,) = bed.stages.take()
    alone.done(StageFailed("no", node="a", reason="stage_lost"))
    assert isinstance(await told(other), Broken)
    other.placed(0, 0.0)
    bed.lane.join(other)
    assert len(bed.stages.take()) == 1


async def test_decoding_does_not_keep_prompts_waiting(bed: Bed) -> None:
    bed.join(8)
    (first,) = bed.stages.take()
    first.answer()
    assert [asked.rows for asked in bed.stages.take()] == [[1]]
    bed.join(8)
    assert [asked.rows for asked in bed.stages.take()] == [[8]]


async def test_tokens_are_told_when_the_first_stage_is_done_with_the_next_pass(bed: Bed) -> None:
    run = bed.join(8)
    bed.stages.take()[0].answer(1)
    assert isinstance(await told(run), TokenPart)
    for token in range(2, 6):
        (asked,) = bed.stages.take()
        asked.answer(token)
        assert len(bed.stages.asked) == 1, "the next pass is out"
        await asyncio.sleep(0)
        assert not waiting(run)
        bed.stages.asked[0].computed()
        part = await told(run)
        assert isinstance(part, TokenPart) and part.ids == [token]


async def test_tokens_are_told_soon_though_the_first_stage_says_nothing(bed: Bed) -> None:
    run = bed.join(8)
    bed.stages.take()[0].answer(1)
    await told(run)
    bed.stages.take()[0].answer(2)
    part = await told(run)
    assert isinstance(part, TokenPart) and part.ids == [2]


async def test_first_and_last_tokens_are_told_at_once(bed: Bed) -> None:
    run, other = bed.join(8, 2), bed.join(8)
    (first,) = bed.stages.take()
    first.computed()
    first.answer()
    await asyncio.sleep(0)
    assert waiting(run) == 1
    for asked in bed.stages.take():
        asked.answer()
    await asyncio.sleep(0)
    assert waiting(run) == 2
    assert bed.stages.over == [run]
    assert waiting(other) >= 1


async def test_a_failure_comes_after_the_tokens_before_it(bed: Bed) -> None:
    run = bed.join(8)
    bed.stages.take()[0].answer(1)
    bed.stages.take()[0].answer(2)
    (asked,) = bed.stages.take()
    asked.done(StageFailed("gone", node="b", reason="peer_lost"))
    asked.answer(3)
    assert [waiting(run), bed.stages.gone] == [3, [bed.lane]], "what comes of a pass after its end counts for nothing"
    news = [run.parts.get_nowait() for _ in range(3)]
    assert [each.ids for each in news[:2] if isinstance(each, TokenPart)] == [[1], [2]]
    assert isinstance(news[2], Broken) and news[2].own


async def test_ids_that_cannot_be_are_the_tails_failure(bed: Bed) -> None:
    run = bed.join(8)
    bed.stages.take()[0].answer(100)
    broken = await told(run)
    assert isinstance(broken, Broken)
    assert (broken.error.node, broken.error.reason) == ("b", "wire")


async def test_each_block_that_is_full_is_told(bed: Bed) -> None:
    bed.join(8)
    for _ in range(45):
        for asked in bed.stages.take():
            asked.answer()
    assert bed.stages.full == [16, 32, 48], "the KV of the newest token is not there yet"


async def test_blocks_of_rounded_rows_are_not_told(bed: Bed) -> None:
    """They would be stored for nobody: copies are exact."""
    bed.encodings = ("f32", "q8_0")
    bed.join(8)
    for _ in range(45):
        for asked in bed.stages.take():
            asked.answer()
    assert bed.stages.full == []
