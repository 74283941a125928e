"""Windows of guesses over real stages: the tokens are those of one engine, whatever was guessed and how far ahead."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine_support import prompt_of
from pipeline_support import GREEDY, N_VOCAB, Held, Swarm, SwarmMaker, Whole, head, parts_of, policy, request, run

from swarmcpp.core import GenerateRequest, SamplingParams, Token, TokenPart
from swarmcpp.engine.drafting import lookups
from swarmcpp.errors import StageFailed
from swarmcpp.pipeline.lanes import Lane
from swarmcpp.wire.peers import PassPart

GUESSING = policy(drafters=lookups(ngram=True))
SAMPLED = SamplingParams(temperature=0.9, seed=7, ignore_eos=True, repeat_penalty=1.1)


def predicted(wanted: GenerateRequest, answer: Sequence[int], wrong: float, seed: int = 0) -> GenerateRequest:
    """A request with its answer as its prediction, in which some tokens are others."""
    draw = random.Random(seed)
    told = [(token + 1) % N_VOCAB if draw.random() < wrong else token for token in answer]
    return replace(wanted, prediction=tuple(told))


class Watch:
    """How many windows of a stream were on their way at the same time, at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        send = Lane._send

        def sent(lane: Lane, *args: object, **named: object) -> None:
            send(lane, *args, **named)  # type: ignore[arg-type]
            self.most = max(self.most, *(each.flying for each in lane.runs.values()), 0)

        monkeypatch.setattr(Lane, "_send", sent)


def counts(parts: Sequence[TokenPart]) -> tuple[int, int]:
    return sum(part.drafted for part in parts), sum(part.accepted for part in parts)


@pytest.mark.parametrize("wrong", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_one_stream_has_the_tokens_of_the_whole_model(
    swarm_of: SwarmMaker, whole: Whole, wrong: float, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(40, 150, 3, sampling)
    (answer,) = whole([wanted])
    swarm, watch = swarm_of((0, 2, 5)), Watch(monkeypatch)
    async with head(swarm, GUESSING) as conductor:
        parts = await parts_of(conductor, predicted(wanted, answer, wrong))
        assert [token for part in parts for token in part.ids] == answer
        drafted, accepted = counts(parts)
        assert accepted <= drafted
        if wrong == 0.0:
            # Windows follow one another without waiting, and few passes bring it all.
            assert watch.most > 1
            assert accepted > 100
        # What follows a wrong guess is void, and leaves no trace: neither here nor in what was stored.
        again = await run(conductor, [predicted(wanted, answer, wrong, seed=1)])
        assert again == [answer]
    if wrong in (0.05, 0.3):
        assert sum(stage.void for stage in swarm.all) > 0


async def test_each_window_waits_for_the_one_before_where_that_is_wanted(
    swarm_of: SwarmMaker, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(40, 150, 3)
    (answer,) = whole([wanted])
    swarm, watch = swarm_of((0, 2, 5)), Watch(monkeypatch)
    async with head(swarm, replace(GUESSING, ahead=False)) as conductor:
        parts = await parts_of(conductor, predicted(wanted, answer, 0.0))
    assert [token for part in parts for token in part.ids] == answer
    assert (watch.most, sum(stage.void for stage in swarm.all)) == (1, 0)
    assert counts(parts)[1] > 100


async def test_streams_beside_one_another(swarm_of: SwarmMaker, whole: Whole) -> None:
    requests = [request(length, 80, seed) for seed, length in enumerate((3, 40, 64, 70, 130, 20))]
    answers = whole(requests)
    guessed = [predicted(each, answer, 0.1, n) for n, (each, answer) in enumerate(zip(requests, answers, strict=True))]
    async with head(swarm_of((0, 1, 3, 5)), GUESSING) as conductor:
        assert await run(conductor, guessed) == answers


async def test_streams_come_and_go(swarm_of: SwarmMaker, whole: Whole) -> None:
    """From one stream with windows under way to several, and back."""
    requests = [request(30, n, seed) for seed, n in enumerate((150, 40, 60, 20))]
    answers = whole(requests)
    guessed = [predicted(each, answer, 0.05) for each, answer in zip(requests, answers, strict=True)]
    async with head(swarm_of((0, 2, 5)), GUESSING) as conductor:
        first = asyncio.create_task(run(conductor, guessed[:1]))
        await asyncio.sleep(0)
        for number in range(1, 4):
            begun = conductor.stats.slots_busy
            assert begun <= 2
            assert await run(conductor, [guessed[number]]) == [answers[number]]
        assert await first == answers[:1]


async def test_a_reader_that_leaves_with_windows_under_way(swarm_of: SwarmMaker, whole: Whole) -> None:
    wanted = request(40, 150, 3)
    (answer,) = whole([wanted])
    async with head(swarm_of((0, 2, 5)), GUESSING) as conductor:
        # With so few guesses each the answer takes 25 windows at least.
        few = replace(predicted(wanted, answer, 0.0), gamma=5)
        for after in (1, 3, 9):
            parts = conductor.tokens(conductor.admit(few))
            for _ in range(after):
                await anext(parts)
            await parts.aclose()
        assert await run(conductor, [predicted(wanted, answer, 0.0)]) == [answer]


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_stage_that_fails_with_windows_under_way(swarm_of: SwarmMaker, whole: Whole, stage: int) -> None:
    wanted = request(40, 150, 3)
    (answer,) = whole([wanted])
    swarm: Swarm = swarm_of((0, 2, 5))
    passes = 0

    def fail(_stage: object, _work: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (4, 9):
            raise StageFailed("told to fail", node=f"node{stage}", reason="engine_failed")

    swarm.all[stage].before = fail
    async with head(swarm, GUESSING) as conductor:
        assert await run(conductor, [predicted(wanted, answer, 0.02)]) == [answer]
    assert passes > 9


async def test_a_tail_that_skips_over_a_guess_is_not_believed(swarm_of: SwarmMaker, whole: Whole) -> None:
    wanted = request(40, 60, 3)
    (answer,) = whole([wanted])
    swarm = swarm_of((0, 2, 5))
    tail, lies = swarm.all[1], 0
    honest = tail._sample

    def lie(part: PassPart, held: Held) -> tuple[Token, ...]:
        nonlocal lies
        tokens = honest(part, held)
        if len(tokens) < 2 or lies:
            return tokens
        lies += 1
        return (Token((tokens[0].id + 1) % N_VOCAB), *tokens[1:])

    tail._sample = lie  # type: ignore[method-assign]
    async with head(swarm, GUESSING) as conductor:
        assert await run(conductor, [predicted(wanted, answer, 0.0)]) == [answer]
    assert lies == 1


async def test_an_answer_ends_where_it_would(swarm_of: SwarmMaker, whole: Whole) -> None:
    """By an end of generation in mid-window, with more of them under way."""
    sampling = replace(GREEDY, ignore_eos=False)
    async with head(swarm_of((0, 2, 5)), GUESSING) as conductor:
        for seed in range(4):
            wanted = GenerateRequest("r", "m", prompt_of(20 + seed, seed, N_VOCAB), 33 + seed, sampling)
            (answer,) = whole([wanted])
            # The prediction goes on behind the end.
            more = replace(wanted, prediction=(*answer, *answer))
            assert await run(conductor, [more]) == [answer]
