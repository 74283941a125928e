"""Both sides of a delegated request, over the codec of the messages, and what is refused on either."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from engine_support import part_of
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import GenerateRequest, Limits, SamplingParams, TokenPart
from swarmcpp.errors import BadRequest, EngineFailed, PeerLost, PromptTooLong, QueueFull, SwarmError, WireError
from swarmcpp.node.remote import SILENCE_S, Run, remote_tokens, serve_generate
from swarmcpp.wire.checks import check_request
from swarmcpp.wire.peers import Ask, Generate, KeepAlive, Part, Pong, Reply, decode, encode

LIMITS = Limits(ctx_size=100, n_vocab=256)
REQUEST = GenerateRequest(id="r", model="m", prompt=(1, 2, 3), max_tokens=5, deadline_s=9.0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no Event
            await asyncio.sleep(0)


@dataclass
class Engine:
    """Runs requests: yields `parts`, waiting at each None until `gate` is set; then fails with `error`, if any."""

    parts: Sequence[TokenPart | None]
    error: SwarmError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: int = 0

    async def __call__(self, request: GenerateRequest) -> AsyncGenerator[TokenPart, None]:
        self.requests.append(request)
        try:
            for part in self.parts:
                if part is None:
                    await self.gate.wait()
                else:
                    yield part
            if self.error:
                raise self.error
        finally:
            self.closed += 1


class Wire:
    """A Caller whose peer serves by `run`, and sends every reply through the codec."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.silence_s = 0.0

    async def ask(
        self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        raise NotImplementedError

    async def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        self.silence_s = silence_s
        frames: asyncio.Queue[bytes] = asyncio.Queue()
        asked = decode(encode(message))
        assert isinstance(asked, Generate)

        def send(reply: Reply) -> None:
            frames.put_nowait(encode(reply))

        server = asyncio.create_task(serve_generate(asked, send, self._run, LIMITS, keep_alive_s=0.005))
        server.add_done_callback(lambda _: frames.put_nowait(b""))
        try:
            while frame := await frames.get():
                yield decode(frame)  # type: ignore[misc]
            await server
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)


class Replies(Wire):
    """A Caller whose peer answers with what it is told to."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.closed = False

    async def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        try:
            for reply in self.replies:
                yield reply
        finally:
            self.closed = True


FIRST = part_of((7,), cached_tokens=2, tier="arena", queue_s=0.25, prefill_s=0.5, fetch_s=0.125)


async def test_tokens_come_through_with_what_the_first_one_tells() -> None:
    engine = Engine([FIRST, None, part_of((8,)), part_of((9,), "stop")])
    wire = Wire(engine)
    got: list[TokenPart] = []
    async for part in remote_tokens(wire, REQUEST, LIMITS.n_vocab):
        got.append(part)
        engine.gate.set()
    # What was ready together came together.
    assert got == [FIRST, part_of((8, 9), "stop")]
    assert engine.requests == [REQUEST]
    assert (engine.closed, wire.silence_s) == (1, SILENCE_S)


async def test_everything_at_once_is_one_part() -> None:
    engine = Engine([FIRST, part_of((8,)), part_of((9,), "length")])
    got = [part async for part in remote_tokens(Wire(engine), REQUEST, LIMITS.n_vocab)]
    assert got == [msgspec.structs.replace(FIRST, tokens=part_of((7, 8, 9)).tokens, finish="length")]


async def test_a_long_silence_is_filled_with_signs_of_life() -> None:
    engine = Engine([None, FIRST, part_of((), "stop")])
    sent: list[Reply] = []
    server = asyncio.create_task(serve_generate(Generate(REQUEST), sent.append, engine, LIMITS, keep_alive_s=0.005))
    await until(lambda: len(sent) >= 3)
    engine.gate.set()
    await server
    assert sent.pop() == Part(msgspec.structs.replace(FIRST, finish="stop"))
    assert all(isinstance(each, KeepAlive) for each in sent)
    assert engine.closed == 1


@pytest.mark.parametrize("parts", [[], [FIRST], [FIRST, None]])
async def test_a_failure_comes_after_the_tokens(parts: list[TokenPart | None]) -> None:
    engine = Engine(parts, QueueFull("full", retry_after=3.0))
    engine.gate.set()
    got: list[TokenPart] = []
    with pytest.raises(QueueFull):
        async for part in remote_tokens(Wire(engine), REQUEST, LIMITS.n_vocab):
            got.append(part)  # noqa: PERF401 - what came before the failure counts
    assert got == [part for part in parts if part]
    assert engine.closed == 1


async def test_a_run_without_an_end_is_a_failure() -> None:
    with pytest.raises(EngineFailed, match="before its end"):
        await serve_generate(Generate(REQUEST), lambda _: None, Engine([FIRST]), LIMITS)


async def test_an_asker_that_stops_reading_cancels_the_run() -> None:
    engine = Engine([FIRST, None])
    async with aclosing(remote_tokens(Wire(engine), REQUEST, LIMITS.n_vocab)) as parts:
        assert await anext(parts) == FIRST
        assert engine.closed == 0
    assert engine.closed == 1


async def test_an_asker_that_is_gone_cancels_the_run() -> None:
    engine = Engine([FIRST, None])

    def send(reply: Reply) -> None:
        raise PeerLost("gone")

    with pytest.raises(PeerLost):
        await serve_generate(Generate(REQUEST), send, engine, LIMITS)
    assert engine.closed == 1


async def test_what_may_follow_generated_tokens() -> None:
    request = replace(REQUEST, generated=(5, 6, 7))
    good = Replies(Part(part_of((8, 9), "length", cached_tokens=6, tier="slot")))
    assert len([part async for part in remote_tokens(good, request, LIMITS.n_vocab)]) == 1
    with pytest.raises(WireError, match="3 tokens where 2"):
        await anext(remote_tokens(Replies(Part(part_of((8, 9, 10), "length"))), request, LIMITS.n_vocab))


@pytest.mark.parametrize(
    "replies",
    [
        [Part(part_of((256,)))],
        [Part(part_of((-1,)))],
        [Part(part_of((1,) * 6))],
        [Part(part_of((1,) * 5)), Part(part_of((1,), "stop"))],
        [Part(part_of(()))],
        [Part(part_of((1,), "stop")), Part(part_of((1,)))],
        [Part(part_of((1,), "stop")), KeepAlive()],
        [Part(part_of((1,)))],
        [],
        [KeepAlive()],
        [Pong()],
        [Part(msgspec.structs.replace(FIRST, cached_tokens=4))],
        [Part(msgspec.structs.replace(FIRST, cached_tokens=-1))],
        [Part(msgspec.structs.replace(FIRST, tier="cloud"))],
        [Part(msgspec.structs.replace(FIRST, queue_s=-0.1))],
        [Part(msgspec.structs.replace(FIRST, prefill_s=math.nan))],
        [Part(msgspec.structs.replace(FIRST, drafted=-1))],
        [Part(msgspec.structs.replace(FIRST, drafted=4, accepted=2))],
        [Part(msgspec.structs.replace(FIRST, drafted=33))],
        [Part(msgspec.structs.replace(FIRST, fetch_s=math.inf))],
    ],
)
async def test_nonsense_from_a_peer_is_a_wire_error(replies: list[Reply]) -> None:
    caller = Replies(*replies)
    with pytest.raises(WireError):
        async for _ in remote_tokens(caller, REQUEST, LIMITS.n_vocab):
            pass
    assert caller.closed


SAMPLING = SamplingParams()


@pytest.mark.parametrize(
    "request_",
    [
        replace(REQUEST, prompt=()),
        replace(REQUEST, prompt=(1, 256)),
        replace(REQUEST, prompt=(1, -1)),
        replace(REQUEST, generated=(256,)),
        replace(REQUEST, max_tokens=0),
        replace(REQUEST, generated=(1, 2, 3, 4, 5)),
        replace(REQUEST, deadline_s=-1.0),
        replace(REQUEST, deadline_s=math.nan),
        replace(REQUEST, deadline_s=1e300),
        replace(REQUEST, id="x" * 1001),
        replace(REQUEST, model="x" * 1001),
        replace(REQUEST, cache_salt="x" * 1001),
        replace(REQUEST, drafter="x" * 1001),
        replace(REQUEST, prediction=(5, 256)),
        replace(REQUEST, gamma=33),
        replace(REQUEST, gamma=-2),
        replace(REQUEST, stop=("",)),
        replace(REQUEST, stop=("x" * 1025,)),
        replace(REQUEST, stop=("x",) * 17),
        replace(REQUEST, sampling=replace(SAMPLING, temperature=math.nan)),
        replace(REQUEST, sampling=replace(SAMPLING, top_k=2**31)),
        replace(REQUEST, sampling=replace(SAMPLING, top_p=1.5)),
        replace(REQUEST, sampling=replace(SAMPLING, min_p=-0.5)),
        replace(REQUEST, sampling=replace(SAMPLING, seed=2**32)),
        replace(REQUEST, sampling=replace(SAMPLING, repeat_penalty=0.0)),
        replace(REQUEST, sampling=replace(SAMPLING, repeat_last_n=-1)),
        replace(REQUEST, sampling=replace(SAMPLING, presence_penalty=math.inf)),
        replace(REQUEST, sampling=replace(SAMPLING, frequency_penalty=3.0)),
        replace(REQUEST, sampling=replace(SAMPLING, logit_bias=((256, 1.0),))),
        replace(REQUEST, sampling=replace(SAMPLING, logit_bias=((0, math.nan),))),
        replace(REQUEST, sampling=replace(SAMPLING, logit_bias=((0, 1.0),) * 257)),
    ],
)
async def test_bad_requests_never_reach_the_engine(request_: GenerateRequest) -> None:
    engine = Engine([FIRST])
    with pytest.raises(BadRequest):
        await serve_generate(Generate(request_), lambda _: None, engine, LIMITS)
    assert engine.requests == []


async def test_a_request_that_fits_no_slot_is_too_long() -> None:
    with pytest.raises(PromptTooLong):
        check_request(replace(REQUEST, prompt=(1,) * 60, generated=(1,) * 40, max_tokens=50), LIMITS)


async def test_a_prediction_is_no_longer_than_an_answer() -> None:
    request = replace(REQUEST, prediction=(1,) * (LIMITS.ctx_size + 50))
    assert len(check_request(request, LIMITS).prediction) == LIMITS.ctx_size


async def test_penalties_look_back_over_a_slot_at_most() -> None:
    request = replace(REQUEST, sampling=replace(SAMPLING, repeat_last_n=2**31 - 1))
    assert check_request(request, LIMITS).sampling.repeat_last_n == LIMITS.ctx_size
    assert check_request(REQUEST, LIMITS) == REQUEST


@given(
    st.lists(st.one_of(st.integers(0, 255), st.none()), min_size=1, max_size=20),
    st.sampled_from(["stop", "length"]),
)
def test_no_token_is_lost_or_repeated(pattern: list[int | None], finish: str) -> None:
    """However tokens (and pauses: None) come."""
    tokens = [token for token in pattern if token is not None]

    async def run(request: GenerateRequest) -> AsyncGenerator[TokenPart, None]:
        for token in pattern:
            if token is None:
                await asyncio.sleep(0)
            else:
                yield part_of((token,))
        yield part_of((), finish)  # type: ignore[arg-type]

    async def collect() -> list[TokenPart]:
        request = replace(REQUEST, max_tokens=20)
        return [part async for part in remote_tokens(Wire(run), request, LIMITS.n_vocab)]

    parts = asyncio.run(collect())
    assert [token for part in parts for token in part.ids] == tokens
    assert [part.finish for part in parts if part.finish] == [finish]
    assert parts[-1].finish == finish
