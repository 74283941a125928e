"""A head and real stages: the tokens are those of one engine with the whole model, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from engine_support import sampled_of
from pipeline_support import (
    GREEDY,
    N_CTX,
    N_VOCAB,
    Rendezvous,
    SwarmMaker,
    ThreadStage,
    Whole,
    groups_of,
    head,
    in_flight,
    parts_of,
    policy,
    request,
    run,
    until,
)
from trained_models import BEGINNINGS, TRAINED_LAYERS, trained_model

from swarmcpp.core import SamplingParams
from swarmcpp.errors import Cancelled, NotReady, PeerLost, PromptTooLong, QueueFull, StageFailed
from swarmcpp.pipeline import lanes
from swarmcpp.pipeline.conductor import MAX_FAILURES, Conductor
from swarmcpp.pipeline.contract import Pass, Passed, StageRef
from swarmcpp.pipeline.finding import PATIENCE_S
from swarmcpp.pipeline.runs import Ask, Chain
from swarmcpp.testing import FakeClock

EIGHT = [request(length, 60, seed) for seed, length in enumerate((3, 40, 64, 70, 130, 200, 129, 20))]


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 3, 5)])
async def test_alone_the_tokens_are_those_of_the_whole_model(
    swarm_of: SwarmMaker, whole: Whole, cuts: tuple[int, ...]
) -> None:
    wanted = request(150, 200, 3)
    async with head(swarm_of(cuts)) as conductor:
        assert await run(conductor, [wanted]) == whole([wanted])


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 3, 5)])
@pytest.mark.parametrize("persistent", [True, False])
async def test_eight_streams_have_the_tokens_of_the_whole_model(
    swarm_of: SwarmMaker, whole: Whole, cuts: tuple[int, ...], persistent: bool
) -> None:
    sampled = SamplingParams(temperature=0.9, seed=7, ignore_eos=True, repeat_penalty=1.1)
    requests = [*EIGHT[:6], replace(EIGHT[6], sampling=sampled), replace(EIGHT[7], max_tokens=200)]
    async with head(swarm_of(cuts), policy(persistent=persistent)) as conductor:
        assert await run(conductor, requests) == whole(requests)
        assert conductor.stats.decode_tps > 0
        assert conductor.load().prefill_tps > 0


async def test_a_trained_model_tells_the_same_stories(swarm_of: SwarmMaker, whole: Whole) -> None:
    path = trained_model()
    swarm = swarm_of((0, 5, TRAINED_LAYERS), path=path)
    vocab = swarm._models[-1].vocab
    prompts = [vocab.tokenize(text, add_special=True, parse_special=False) for text in BEGINNINGS[:4]]
    requests = [request(0, 200, seed, SamplingParams(temperature=0.0), prompt) for seed, prompt in enumerate(prompts)]
    async with head(swarm) as conductor:
        told = await run(conductor, requests)
        assert told == whole(requests, path)
        assert await run(conductor, requests[:1]) == told[:1]


async def test_a_prompt_that_was_there_before_comes_from_the_arenas(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    wanted = request(200, 70, 5)
    async with head(swarm) as conductor:
        first = await parts_of(conductor, wanted)
        assert (first[0].cached_tokens, first[0].tier) == (0, "")
        await until(lambda: all(len(stage.arena) == 4 for stage in swarm.all), "four blocks at each stage")
        again = await parts_of(conductor, wanted)
        assert (again[0].cached_tokens, again[0].tier) == (192, "arena")
        await until(lambda: not any(stage.held for stage in swarm.all), "all that it stores is stored")
        # What only one stage still has must be computed.
        swarm.all[1].arena = dict(list(swarm.all[1].arena.items())[:2])
        third = await parts_of(conductor, wanted)
        assert third[0].cached_tokens == 128
    expected = whole([wanted])[0]
    for parts in (first, again, third):
        assert [token for part in parts for token in part.ids] == expected


async def test_ends_are_those_of_an_engine(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    long = replace(request(400, 10_000, 2))
    tokens = whole([replace(long, max_tokens=N_CTX - 400)])[0]
    async with head(swarm) as conductor:
        parts = await parts_of(conductor, long)
        assert [part.ids[0] for part in parts] == tokens
        assert parts[-1].finish == "length"
    swarm.facts = replace(swarm.facts, eog_tokens=frozenset({tokens[4]}))
    async with head(swarm) as conductor:
        parts = await parts_of(conductor, replace(long, sampling=replace(GREEDY, ignore_eos=False)))
        assert parts[-1].finish == "stop"
        assert [part.ids[0] for part in parts] == tokens[: tokens.index(tokens[4]) + 1]


# -- overlap ---------------------------------------------------------------------------------------------------------


async def test_chunks_of_a_prompt_follow_one_another(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    # Each pass of the second stage is computed while the first one computes the next.
    meeting = Rendezvous({(0, 1), (2, 0), (0, 2), (2, 1)})
    for stage in swarm.all:
        stage.before = meeting
    wanted = request(400, 1, 1)
    async with head(swarm) as conductor:
        assert await run(conductor, [wanted]) == whole([wanted])
    assert meeting.met == 4
    short = "where the chain fills and empties"
    assert swarm.all[1].passes == [(64,), (128,), (128,), (64,), (16,)], short


async def test_micro_batches_are_computed_at_the_same_time(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    # Far from prompts and ends: of two micro-batches one is at each stage.
    meeting = Rendezvous({(0, n + 1) for n in range(40, 50)} | {(2, n) for n in range(40, 50)})
    for stage in swarm.all:
        stage.before = meeting
    requests = [replace(each, max_tokens=100) for each in EIGHT[:4]]
    async with head(swarm) as conductor:
        running = asyncio.create_task(run(conductor, requests))
        await until(lambda: groups_of(conductor) == 2 and in_flight(conductor) == 2, "two in flight")
        assert await running == whole(requests)
    assert meeting.met == 20
    assert swarm.all[0].passes[40:50] == [(1, 1)] * 10


async def test_without_overlap_one_pass_is_on_its_way(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()
    async with head(swarm, policy(persistent=False)) as conductor:
        seen: list[int] = []
        for stage in swarm.all:
            stage.before = lambda _stage, _work: seen.append(in_flight(conductor))
        await run(conductor, [request(300, 30, seed) for seed in range(4)])
        assert set(seen) == {1}
    assert (1, 1, 1, 1) in swarm.all[0].passes


async def test_the_number_of_micro_batches_follows_the_measured_times(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()
    # Passes of four rows take as long as of one, so one micro-batch is best.
    swarm.curve = ((1, 0.01), (4, 0.01))
    async with head(swarm) as conductor:
        await run(conductor, [request(20, 30, seed) for seed in range(4)])
    # Before the last one has joined, and after the first one has ended, there are fewer.
    assert swarm.all[0].passes.count((1, 1, 1, 1)) > swarm.all[0].passes.count((1, 1))
    swarm.all[0].passes.clear()
    swarm.curve = ((1, 0.01), (2, 0.02), (4, 0.04))
    async with head(swarm) as conductor:
        await run(conductor, [request(20, 30, seed) for seed in range(4)])
    assert (1, 1) in swarm.all[0].passes
    assert (1, 1, 1, 1) not in swarm.all[0].passes


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["stage_lost", "engine_failed"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_stage_that_dies_at_random_moments_changes_no_text(
    swarm_of: SwarmMaker, whole: Whole, seed: int, reason: str
) -> None:
    swarm = swarm_of((0, 1, 3, 5))
    rng = random.Random(seed)
    deaths = 0

    def before(stage: ThreadStage, _work: Pass) -> None:
        nonlocal deaths
        if rng.random() < 0.02:
            deaths += 1
            stage.die()
            raise StageFailed(f"{stage.ref.node} died", node=stage.ref.node, reason=reason)

    for stage in swarm.all:
        stage.before = before
    requests = [replace(each, max_tokens=80) for each in EIGHT[2:6]]
    async with head(swarm) as conductor:
        assert await run(conductor, requests) == whole(requests)
    assert deaths > 3


async def test_another_node_takes_over_and_the_failed_one_is_avoided(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    first, tail = swarm.stages
    spare = replace(tail, node="spare")
    stage = swarm.all[1]
    swarm.stages[spare] = stage
    swarm.route = lambda ask: (first, spare if tail.node in ask.avoid else tail)

    def before(_stage: ThreadStage, _work: Pass) -> None:
        if len(stage.passes) == 20:
            stage.before = lambda _stage, _work: None
            stage.die()
            raise PeerLost("gone")

    stage.before = before
    requests = EIGHT[:4]
    # As the caller's side of a link names the node that it lost.
    stage.ref = replace(stage.ref, node=tail.node)
    async with head(swarm) as conductor:
        assert await run(conductor, requests) == whole(requests)
        assert conductor._finder._avoid.keys() == {tail.node}
        # All streams of the chain have moved, each once, and the first stage still had their KV.
        assert [lane.chain for lane in conductor._lanes.values()] == [(first, spare)]
    del swarm.stages[spare]


async def test_kv_that_stages_still_have_is_not_computed_again(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    tail = swarm.all[1]

    def before(stage: ThreadStage, _work: Pass) -> None:
        if len(stage.passes) == 30:
            stage.before = lambda _stage, _work: None
            stage.die()
            raise StageFailed("died", node=stage.ref.node, reason="stage_lost")

    tail.before = before
    wanted = request(200, 60, 1)
    async with head(swarm) as conductor:
        assert await run(conductor, [wanted]) == whole([wanted])
    assert swarm.all[0].resumed == tail.resumed == [0, 192]


async def test_answers_from_before_a_failure_are_ignored(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    first = swarm.all[0]
    real = first.run
    late: list[bytes] = []
    failed: list[bytes] = []
    again = asyncio.Event()

    async def run_late(work: Pass) -> Passed:
        part = work.parts[0]
        if late == [part.sequence] and part.epoch == 2:
            again.set()
        passed = await real(work)
        if not late and len(first.passes) > 12:
            # The answer comes when the sequence has been opened again.
            late.append(part.sequence)
            await again.wait()
        elif late and not failed and part.sequence not in late:
            failed.append(part.sequence)
            raise StageFailed("lost", node="node0", reason="stage_lost")
        return passed

    first.run = run_late  # type: ignore[method-assign]
    requests = [request(10, 40, seed) for seed in range(2)]
    async with head(swarm) as conductor:
        assert await run(conductor, requests) == whole(requests)
    assert late and failed and again.is_set()


async def test_a_chain_that_always_fails_is_given_up(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()

    def before(stage: ThreadStage, _work: Pass) -> None:
        raise StageFailed("no", node=stage.ref.node, reason="decode_failed")

    swarm.all[1].before = before
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), FakeClock(), pause)
    with pytest.raises(StageFailed, match="no") as caught:
        await parts_of(conductor, request(10))
    assert caught.value.node == "node1"
    assert swarm.asks[-1].avoid == {"node1"} or swarm.asks[-2].avoid == {"node1"}
    assert len(pauses) == MAX_FAILURES - 2
    await conductor.close()
    assert not any(stage.held for stage in swarm.all)


async def test_ids_that_cannot_be_are_a_failure_of_the_tail(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()
    first = swarm.all[0]
    real = first.run

    async def run_wrongly(work: Pass) -> Passed:
        return replace(await real(work), tokens=sampled_of(*(N_VOCAB for part in work.parts if part.outputs)))

    first.run = run_wrongly  # type: ignore[method-assign]
    async with head(swarm) as conductor:
        conductor._pause = no_pause
        with pytest.raises(StageFailed, match="node1 answered a pass with tokens that cannot be"):
            await parts_of(conductor, request(10))


async def no_pause(_seconds: float) -> None:
    await asyncio.sleep(0)


async def test_a_pass_that_never_ends_is_a_failure(
    swarm_of: SwarmMaker, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "limit_s", lambda _expected, _stages: 0.5)
    swarm = swarm_of()
    first = swarm.all[0]
    real = first.run

    async def hang(work: Pass) -> Passed:
        if len(first.passes) == 10:
            first.run = real  # type: ignore[method-assign]
            await asyncio.Event().wait()
        return await real(work)

    first.run = hang  # type: ignore[method-assign]
    wanted = request(10, 30)
    async with head(swarm) as conductor:
        assert await run(conductor, [wanted]) == whole([wanted])


async def test_another_chain_is_taken_at_once_when_an_engine_starts_again(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    clock = FakeClock()
    first, tail = swarm.stages
    double = replace(tail, node="double")
    swarm.stages[double] = swarm.stages[tail]
    swarm.route = lambda ask: (first, double if tail.node in ask.avoid else tail)
    opened: list[StageRef] = []

    class Starting:
        """The tail as long as its engine starts."""

        async def open(self, *_: object) -> int:
            opened.append(tail)
            raise NotReady("the engine is starting")

    around = swarm.surroundings()
    starting: Any = Starting()
    around = replace(around, caller=lambda ref: starting if ref == tail else swarm.stages[ref])

    async def pause(seconds: float) -> None:
        clock.advance(seconds)

    conductor = Conductor(swarm.facts, policy(), around, clock, pause)
    wanted = request(10, 20)
    assert await run(conductor, [wanted]) == whole([wanted])
    assert (opened, clock.now) == ([tail], 0.0)
    await conductor.close()
    del swarm.stages[double]


async def test_a_reader_waits_while_an_engine_starts_again(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    clock = FakeClock()
    tail = swarm.all[1]
    starting = 0

    def opening() -> None:
        nonlocal starting
        if starting:
            starting -= 1
            raise NotReady("the engine is starting")

    def before(stage: ThreadStage, _work: Pass) -> None:
        nonlocal starting
        if len(stage.passes) == 10:
            stage.before = lambda _stage, _work: None
            stage.die()
            starting = 30
            raise StageFailed("died", node=stage.ref.node, reason="stage_lost")

    tail.before, tail.opening = before, opening

    async def pause(seconds: float) -> None:
        clock.advance(seconds)

    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), clock, pause)
    wanted = request(10, 40)
    assert await run(conductor, [wanted]) == whole([wanted])
    assert 2.9 < clock.now < PATIENCE_S
    await conductor.close()


async def test_without_a_chain_a_request_waits_and_then_says_why(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()
    clock = FakeClock()

    async def pause(seconds: float) -> None:
        clock.advance(seconds)

    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), clock, pause)
    admitted = conductor.admit(request(10))

    def nothing(_ask: Ask) -> Chain:
        raise NotReady("layers 2 to 5 are missing")

    swarm.route = nothing
    assert conductor.usable, "there was a chain a moment ago"
    with pytest.raises(NotReady, match="layers 2 to 5 are missing"):
        async for _ in conductor.tokens(admitted):
            raise AssertionError
    assert clock.now >= PATIENCE_S
    clock.advance(PATIENCE_S)
    assert not conductor.usable
    with pytest.raises(NotReady, match="layers 2 to 5 are missing"):
        conductor.admit(request(10))


@pytest.mark.parametrize("change", [{"first": 3}, {"last": 4}, {"fingerprint": bytes(32)}])
async def test_a_chain_with_a_hole_is_refused(swarm_of: SwarmMaker, change: dict[str, object]) -> None:
    swarm = swarm_of()
    first, tail = swarm.stages
    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), time.monotonic)
    for chain in ((first, replace(tail, **change)), (tail,), (), (first, first, tail)):
        swarm.route = lambda _ask, chain=chain: chain
        with pytest.raises(NotReady, match="does not cover layers 0 to 5"):
            conductor.admit(request(10))


# -- admission and ends ----------------------------------------------------------------------------------------------


async def test_who_finds_a_stage_full_waits_in_order(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of(slots=2)
    requests = [request(20 + seed, 15, seed) for seed in range(6)]
    firsts: list[int] = []

    async def follow(conductor: Conductor, number: int) -> list[int]:
        tokens: list[int] = []
        async with aclosing(conductor.tokens(requests[number])) as parts:
            async for part in parts:
                if not tokens:
                    firsts.append(number)
                tokens += part.ids
        return tokens

    async with head(swarm) as conductor:
        conductor._pause = no_pause
        answers = await asyncio.gather(*(follow(conductor, number) for number in range(6)))
    assert answers == whole(requests)
    assert firsts[2:] == [2, 3, 4, 5]


async def test_slots_and_queue_are_limits(swarm_of: SwarmMaker, whole: Whole) -> None:
    swarm = swarm_of()
    requests = [request(20, 15, seed) for seed in range(3)]
    async with head(swarm, policy(slots=1, queue_size=2)) as conductor:
        running = [asyncio.create_task(parts_of(conductor, each)) for each in requests]
        await until(lambda: conductor.ahead == 3, "all are there")
        with pytest.raises(QueueFull, match="all 1 slots are busy and 2 requests wait") as caught:
            conductor.admit(requests[0])
        assert caught.value.retry_after == 3.0
        assert conductor.load().waiting >= 2
        assert conductor.load().backlog >= 40
        answers = [[part.ids[0] for part in await each] for each in running]
        assert max(len(rows) for stage in swarm.all for rows in stage.passes) == 1
    assert answers == whole(requests)


async def test_too_long_prompts_are_refused(swarm_of: SwarmMaker) -> None:
    conductor = Conductor(swarm_of().facts, policy(), swarm_of().surroundings(), time.monotonic)
    with pytest.raises(PromptTooLong, match=f"the prompt has {N_CTX} tokens and a slot holds {N_CTX}"):
        conductor.admit(request(N_CTX))
    assert conductor.admit(request(N_CTX - 3, 10)).max_tokens == 3


@pytest.mark.parametrize("after", [0, 1, 7])
async def test_closing_the_reader_closes_the_sequence(swarm_of: SwarmMaker, whole: Whole, after: int) -> None:
    swarm = swarm_of()
    # Both are in one micro-batch.
    swarm.curve = ((1, 0.01), (4, 0.01))
    wanted = request(30, 60, 1)
    async with head(swarm) as conductor:
        other = asyncio.create_task(run(conductor, [wanted]))
        parts = conductor.tokens(request(300, 200, 2))
        if after:
            for _ in range(after):
                await anext(parts)
            await parts.aclose()
        else:
            reading = asyncio.create_task(anext(parts))
            await until(lambda: any(len(rows) for rows in swarm.all[0].passes), "a pass has begun")
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: all(len(stage.held) <= 1 for stage in swarm.all), "it is closed")
        assert await other == whole([wanted])
    assert [ask.request for ask in swarm.asks].count("r1") == 1, "the other one was not disturbed"


async def test_a_deadline_ends_a_request(swarm_of: SwarmMaker) -> None:
    async with head(swarm_of()) as conductor:
        with pytest.raises(Cancelled, match=r"longer than its limit of 0\.05 s"):
            await parts_of(conductor, replace(request(10, 500), deadline_s=0.05))


async def test_the_end_of_a_head_ends_its_requests(swarm_of: SwarmMaker) -> None:
    swarm = swarm_of()
    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), time.monotonic)
    running = asyncio.create_task(parts_of(conductor, request(100, 400)))
    await until(lambda: len(swarm.all[1].passes) > 3, "it decodes")
    await conductor.close()
    with pytest.raises(StageFailed, match="this node ends"):
        await running
    assert not any(stage.held for stage in swarm.all)
