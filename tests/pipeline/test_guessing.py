"""A draft model beside a stage of the head's node: it is asked between passes, and changes no answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from engine_support import prompt_of
from pipeline_support import (
    GREEDY,
    N_VOCAB,
    Swarm,
    SwarmMaker,
    Whole,
    head,
    in_flight,
    parts_of,
    policy,
    request,
    run,
    until,
)

from swarmcpp.core import GenerateRequest, SamplingParams
from swarmcpp.engine.drafting import NOTHING, Draft, lookups
from swarmcpp.engine.sequence import Generation
from swarmcpp.errors import StageFailed
from swarmcpp.pipeline.guessing import ABSENT_S, LIMIT_S, AskedDrafter
from swarmcpp.supervisor.books import GuessDone
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import GuessPart

GUESSING = policy(draft=True, gamma=4)
SAMPLED = SamplingParams(temperature=0.9, seed=7, ignore_eos=True, repeat_penalty=1.1)


class Engine:
    """Another process with a draft model, which knows the answers but for some tokens: asked now, it answers later."""

    def __init__(self, requests: Sequence[GenerateRequest] = (), answers: Sequence[Sequence[int]] = ()) -> None:
        self._answers = {each.prompt: answer for each, answer in zip(requests, answers, strict=True)}
        self._of: dict[int, tuple[tuple[int, ...], int]] = {}
        """Of each serial its prompt, and how many tokens are known."""
        self._draw = random.Random(0)
        self.wrong = 0.0
        self.asked: list[Sequence[GuessPart]] = []
        self.deaths = 0
        self.refuses = self.silent = False

    def ask(self, parts: Sequence[GuessPart], done: GuessDone) -> bool:
        if self.refuses:
            return False
        self.asked.append(parts)
        wanted = [part for part in parts if part.count]
        for part in parts:
            if not part.count:
                self._of.pop(part.serial, None)
        if not wanted or self.silent:
            return True
        asyncio.get_running_loop().call_later(0.0005, lambda: done(self._answer(wanted)))
        return True

    def die(self) -> None:
        """Forget all, as one that is started again."""
        self.deaths += 1
        self._of.clear()

    def _answer(self, parts: Sequence[GuessPart]) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(self._guess, parts))

    def _guess(self, part: GuessPart) -> tuple[int, ...] | None:
        if part.request:
            assert not part.request.prediction
            begun = len(part.request.prompt) + len(part.request.generated)
            self._of[part.serial] = (part.request.prompt, begun)
        prompt, known = self._of.get(part.serial, ((), -1))
        if known != part.start:
            return None
        at = known + len(part.tokens)
        self._of[part.serial] = (prompt, at)
        said = self._answers[prompt][at - len(prompt) :][: part.count]
        return tuple((token + 1) % N_VOCAB if self._draw.random() < self.wrong else token for token in said)


def attach(swarm: Swarm, requests: Sequence[GenerateRequest], answers: Sequence[Sequence[int]]) -> Engine:
    engine = Engine(requests, answers)
    swarm.guess = engine.ask
    return engine


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_one_stream(swarm_of: SwarmMaker, whole: Whole, wrong: float, sampling: SamplingParams) -> None:
    wanted = request(40, 150, 3, sampling)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    engine = attach(swarm, [wanted], [answer])
    engine.wrong = wrong
    async with head(swarm, GUESSING) as conductor:
        parts = await parts_of(conductor, forced(wanted))
        assert [token for part in parts for token in part.ids] == answer
        drafted, accepted = sum(part.drafted for part in parts), sum(part.accepted for part in parts)
        assert drafted >= 100
        assert (accepted == drafted, accepted == 0) == (wrong == 0.0, wrong == 1.0)
    # Its prompt was told once, and its end.
    told = [part for parts in engine.asked for part in parts]
    assert [part.request is not None for part in told] == [True] + [False] * (len(told) - 1)
    assert [part.count for part in told[-1:]] == [0]


def forced(wanted: GenerateRequest) -> GenerateRequest:
    """Guess by the draft model, whatever passes happen to take."""
    return GenerateRequest(
        wanted.id, wanted.model, wanted.prompt, wanted.max_tokens, wanted.sampling, drafter="draft", gamma=4
    )


async def test_streams_beside_one_another(swarm_of: SwarmMaker, whole: Whole) -> None:
    requests = [request(length, 60, seed) for seed, length in enumerate((3, 40, 64, 70, 130, 20))]
    answers = whole(requests)
    swarm = swarm_of((0, 1, 3, 5))
    engine = attach(swarm, requests, answers)
    engine.wrong = 0.1
    async with head(swarm, policy(draft=True, gamma=4, drafters=lookups(ngram=True))) as conductor:
        assert await run(conductor, [forced(each) for each in requests[:3]] + requests[3:]) == answers
    assert engine.asked


async def test_without_overlap_no_pass_is_sent_while_guesses_are_made(swarm_of: SwarmMaker, whole: Whole) -> None:
    wanted = [request(40, 60, 3), request(200, 40, 5), request(130, 40, 6)]
    answers = whole(wanted)
    swarm = swarm_of((0, 2, 5))
    attach(swarm, wanted, answers)
    seen: list[int] = []
    async with head(swarm, policy(draft=True, gamma=4, persistent=False)) as conductor:
        for stage in swarm.all:
            stage.before = lambda _stage, _work: seen.append(in_flight(conductor))
        assert await run(conductor, [forced(each) for each in wanted]) == answers
    assert set(seen) == {1}


async def test_an_engine_that_dies_answers_nothing_or_knows_nothing_any_more(
    swarm_of: SwarmMaker, whole: Whole
) -> None:
    wanted = request(40, 150, 3)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    engine = attach(swarm, [wanted], [answer])
    ask = engine.ask

    def mortal(parts: Sequence[GuessPart], done: GuessDone) -> bool:
        if len(engine.asked) in (3, 9, 15):
            engine.asked.append(parts)
            engine.die()
            asyncio.get_running_loop().call_soon(done, ())
            return True
        return not any(part.count for part in parts) or ask(parts, done)

    swarm.guess = mortal
    clock = FakeClock()
    async with head(swarm, GUESSING) as conductor:
        conductor._clock = clock
        parts = await parts_of(conductor, forced(wanted))
        assert [token for part in parts for token in part.ids] == answer
    assert engine.deaths >= 1


async def test_nobody_to_ask(swarm_of: SwarmMaker, whole: Whole) -> None:
    wanted = request(40, 50, 3)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    async with head(swarm, GUESSING) as conductor:
        assert await run(conductor, [forced(wanted)]) == [answer]


async def test_a_reader_that_leaves_while_guesses_are_made(swarm_of: SwarmMaker, whole: Whole) -> None:
    wanted = request(40, 150, 3)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    engine = attach(swarm, [wanted], [answer])
    async with head(swarm, GUESSING) as conductor:
        for after in (1, 2, 5):
            parts = conductor.tokens(conductor.admit(forced(wanted)))
            for _ in range(after):
                await anext(parts)
            seen = len(engine.asked)
            await until(lambda seen=seen: len(engine.asked) > seen, "another question")
            await parts.aclose()
        assert await run(conductor, [forced(wanted)]) == [answer]


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_stage_that_fails(swarm_of: SwarmMaker, whole: Whole, stage: int) -> None:
    wanted = request(40, 100, 3)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    attach(swarm, [wanted], [answer])
    passes = 0

    def fail(_stage: object, _work: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (4, 9):
            raise StageFailed("told to fail", node=f"node{stage}", reason="engine_failed")

    swarm.all[stage].before = fail
    async with head(swarm, GUESSING) as conductor:
        assert await run(conductor, [forced(wanted)]) == [answer]
    assert passes > 9


# -- the drafter -------------------------------------------------------------------------------------------------------


def generation(length: int = 5) -> Generation:
    return Generation(1, request(length), list(prompt_of(length, 0, N_VOCAB)), decoding=True)


async def test_guesses_are_for_the_tokens_that_they_were_made_after() -> None:
    engine, clock, over = Engine(), FakeClock(), asyncio.Event()
    drafter = AskedDrafter(engine.ask, N_VOCAB, clock)
    one = generation()
    engine._answers[one.request.prompt] = [7, 8, N_VOCAB, 9]
    assert drafter.draft([(one, 4)]) == [NOTHING]
    assert drafter.ask([(one, 4)], over.set)
    clock.now += 0.04
    await over.wait()
    # A token that the target has not ends a draft.
    assert drafter.draft([(one, 4)]) == [Draft((7, 8))]
    assert drafter.draft([(one, 1)]) == [Draft((7,))]
    assert drafter.seconds(1, 3) == pytest.approx(0.03)
    one.tokens.append(7)
    assert drafter.draft([(one, 4)]) == [NOTHING]
    drafter.forget(one)
    assert engine.asked[-1] == [GuessPart(1, 0, (), 0)]


async def test_nothing_is_kept_of_one_that_ended_while_guesses_were_made() -> None:
    engine, over = Engine(), asyncio.Event()
    drafter, one = AskedDrafter(engine.ask, N_VOCAB, FakeClock()), generation()
    engine._answers[one.request.prompt] = [7, 8, 9, 9]
    assert drafter.ask([(one, 4)], over.set)
    drafter.forget(one)
    await over.wait()
    assert (drafter._came, drafter._told, drafter._begun) == ({}, {}, set())


async def test_an_engine_that_is_away_is_left_alone_for_a_while() -> None:
    engine, clock = Engine(), FakeClock()
    drafter = AskedDrafter(engine.ask, N_VOCAB, clock)
    engine.refuses = True
    assert not drafter.ask([(generation(), 4)], lambda: None)
    assert drafter.seconds(1, 1) == float("inf")
    clock.now += ABSENT_S
    assert drafter.seconds(1, 1) == 0.0


async def test_a_silent_engine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMIT_S <= 2.0
    monkeypatch.setattr("swarmcpp.pipeline.guessing.LIMIT_S", 0.01)
    engine, over = Engine(), asyncio.Event()
    engine.silent = True
    drafter = AskedDrafter(engine.ask, N_VOCAB, FakeClock())
    assert drafter.ask([(generation(), 4)], over.set)
    await over.wait()
    assert drafter.seconds(1, 1) == float("inf")
    # It may live, and know of it.
    drafter.forget(generation())
    assert engine.asked[-1] == [GuessPart(1, 0, (), 0)]
