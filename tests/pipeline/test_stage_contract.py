"""What a head may rely on at a stage, whoever plays it: what `contract.SequenceHolder` and `calls.StageHost` promise.

What depends on arithmetic is compared within one stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pytest
import pytest_asyncio
from engine_support import ids_of, prompt_of, request
from stage_pairs import MAKERS, SLOTS, Pair
from stage_processes import DEADLINE_S
from stage_support import N_EMBD

from swarmcpp.errors import QueueFull, StageLost, SwarmError, WireError
from swarmcpp.pipeline.calls import StageHost
from swarmcpp.supervisor.books import Computed
from swarmcpp.testing import Rows
from swarmcpp.wire.peers import PassPart

pytestmark = pytest.mark.asyncio(loop_scope="module")

A, B, C, D = (bytes([n] * 16) for n in range(SLOTS + 1))
Answer = TypeVar("Answer")


def rows_of(count: int, seed: int = 1) -> Rows:
    """Rows that layers and sums take, and that are unlike one another to both."""
    return np.random.default_rng(seed).integers(-30, 31, (count, N_EMBD)).astype(np.float32)


def keys_of(seed: int, count: int) -> list[bytes]:
    return [bytes([seed, n] * 16) for n in range(count)]


def part(sequence: bytes, start: int, count: int, *, epoch: int = 1, outputs: int = 1) -> PassPart:
    return PassPart(sequence, epoch, start, count, outputs)


async def within(awaitable: Awaitable[Answer]) -> Answer:
    return await asyncio.wait_for(awaitable, DEADLINE_S)


@dataclass(eq=False)
class Going:
    """A pass that was begun, and all that was told of its end."""

    told: list[Computed | SwarmError] = field(default_factory=list)
    begun: bool = False
    early: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def end(self) -> Computed:
        await within(self.over.wait())
        result = self.told[0]
        if isinstance(result, SwarmError):
            raise result
        return Computed(*result)


class Driven:
    """A stage as a head uses it."""

    def __init__(self, host: StageHost, is_tail: bool) -> None:
        self.host, self.is_tail = host, is_tail
        self.going: list[Going] = []
        self.ended: list[Going] = []

    async def open(self, sequence: bytes, epoch: int = 1, n_tokens: int = 300, keys: list[bytes] | None = None) -> int:
        asked = request(prompt_of(n_tokens)) if self.is_tail else None
        return await within(self.host.open(sequence, epoch, keys or [], asked, n_tokens))

    async def resume(self, sequence: bytes, epoch: int = 1, n_tokens: int = 0) -> int:
        return await within(self.host.resume(sequence, epoch, n_tokens))

    async def place(self, *sequences: bytes, epoch: int = 1, n_tokens: int = 0) -> None:
        """Open sequences and bring `n_tokens` that are there into their KV."""
        for sequence in sequences:
            assert await self.open(sequence, epoch) >= n_tokens
            assert await self.resume(sequence, epoch, n_tokens) == n_tokens

    def begin(self, rows: Rows | bytes, *parts: PassPart) -> Going:
        going = Going()

        def done(result: Computed | SwarmError) -> None:
            going.early = not going.begun
            going.told.append(result)
            self.ended.append(going)
            going.over.set()

        frame = rows if isinstance(rows, bytes) else rows.tobytes()
        self.host.begin(parts, "f32", frame, "f32", done)
        going.begun = True
        self.going.append(going)
        return going

    async def run(self, rows: Rows | bytes, *parts: PassPart) -> Computed:
        """A pass, waited for; raises what it fails with, be it at once or at its end."""
        return await self.begin(rows, *parts).end()

    async def lost(self, rows: Rows, *parts: PassPart) -> None:
        with pytest.raises(StageLost):
            await self.run(rows, *parts)

    async def check(self) -> None:
        """Every pass that was begun has told its end, once, after `begin`; then give all sequences back."""
        for going in self.going:
            await within(going.over.wait())
        for sequence in (A, B, C, D):
            await within(self.host.close_sequence(sequence))
        assert [len(going.told) for going in self.going] == [1] * len(self.going)
        assert not any(going.early for going in self.going)


def made(computed: Computed, n_rows: int) -> list[int] | Rows:
    """What came out, in a form that can be compared: tokens of a tail, rows (n_rows, N_EMBD) of others."""
    if computed.rows is None:
        return ids_of(computed.tokens)
    return np.frombuffer(computed.rows, np.float32).reshape(n_rows, N_EMBD)


def same(one: list[int] | Rows, other: list[int] | Rows) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-4))


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(name, marks=[pytest.mark.e2e] * (name == "engine")) for name in MAKERS],
)
async def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with MAKERS[request.param](tmp_path_factory.mktemp("stages")) as pair:
        yield pair


@pytest_asyncio.fixture(loop_scope="module")
async def first(pair: Pair) -> AsyncIterator[Driven]:
    driven = Driven(pair[0], is_tail=False)
    yield driven
    await driven.check()


@pytest_asyncio.fixture(loop_scope="module")
async def tail(pair: Pair) -> AsyncIterator[Driven]:
    driven = Driven(pair[1], is_tail=True)
    yield driven
    await driven.check()


@pytest_asyncio.fixture(loop_scope="module", params=["first", "tail"])
async def either(request: pytest.FixtureRequest, pair: Pair) -> AsyncIterator[Driven]:
    driven = Driven(pair[request.param == "tail"], is_tail=request.param == "tail")
    yield driven
    await driven.check()


# -- sequences ---------------------------------------------------------------------------------------------------------


async def test_open_answers_how_far_it_could_go_on_and_less_than_all_tokens(either: Driven) -> None:
    await either.place(A)
    await either.run(rows_of(10), part(A, 0, 10))
    assert await either.open(A, 2, 30) == 10
    assert await either.open(A, 3, 10) == 9
    assert await either.open(A, 4, 4) == 3
    assert await either.open(B, 1, 30) == 0


async def test_a_lower_epoch_is_refused_and_the_later_one_stays(either: Driven) -> None:
    await either.place(A, epoch=5)
    with pytest.raises(StageLost):
        await either.open(A, 4)
    await either.run(rows_of(2), part(A, 0, 2, epoch=5))
    assert await either.open(A, 6) == 2


async def test_each_epoch_is_resumed_before_its_passes(either: Driven) -> None:
    await either.open(A)
    await either.lost(rows_of(1), part(A, 0, 1))
    assert await either.resume(A) == 0
    await either.run(rows_of(5), part(A, 0, 5))
    assert await either.open(A, 2) == 5
    await either.lost(rows_of(1), part(A, 5, 1, epoch=2))
    assert await either.resume(A, 2, 5) == 5
    await either.run(rows_of(1), part(A, 5, 1, epoch=2))


async def test_resume_keeps_what_was_asked_for_and_no_more(either: Driven) -> None:
    await either.place(A)
    await either.run(rows_of(10), part(A, 0, 10))
    await either.place(A, epoch=2, n_tokens=4)
    await either.lost(rows_of(1), part(A, 5, 1, epoch=2))
    await either.run(rows_of(1), part(A, 4, 1, epoch=2))
    assert await either.open(A, 3) == 5


@pytest.mark.parametrize(("sequence", "epoch"), [(A, 1), (A, 3), (B, 1)], ids=["earlier", "later", "unknown"])
async def test_what_is_not_open_in_this_epoch_is_lost(either: Driven, sequence: bytes, epoch: int) -> None:
    await either.place(A)
    await either.place(A, epoch=2)
    await either.lost(rows_of(1), part(sequence, 0, 1, epoch=epoch))
    with pytest.raises(StageLost):
        await either.resume(sequence, epoch)
    with pytest.raises(StageLost):
        await within(either.host.store(sequence, epoch, []))
    await either.run(rows_of(1), part(A, 0, 1, epoch=2))


async def test_all_sequences_are_taken_until_one_is_closed(either: Driven) -> None:
    await either.place(A, B, C)
    with pytest.raises(QueueFull) as caught:
        await either.open(D)
    assert caught.value.retry_after
    await either.run(rows_of(2), part(A, 0, 2))
    assert await either.open(A, 2) == 2, "a sequence that has its place keeps it"
    await within(either.host.close_sequence(B))
    await either.place(D)
    await either.run(rows_of(1), part(D, 0, 1))


async def test_what_is_closed_is_forgotten_and_the_unknown_is_ignored(either: Driven) -> None:
    await within(either.host.close_sequence(A))
    await either.place(A)
    await either.run(rows_of(10), part(A, 0, 10))
    await within(either.host.close_sequence(A))
    await within(either.host.close_sequence(A))
    await either.lost(rows_of(1), part(A, 10, 1))
    assert await either.open(A, 1) == 0


# -- blocks ------------------------------------------------------------------------------------------------------------


async def test_blocks_that_were_stored_are_found_by_the_next_open_of_their_keys(either: Driven) -> None:
    keys, rows, more = keys_of(1, 3), rows_of(140), rows_of(3, 2)
    assert await either.open(A, 1, 300, keys) == 0
    await either.resume(A)
    for start, stop in ((0, 64), (64, 128), (128, 140)):
        await either.run(rows[start:stop], part(A, start, stop - start))
    await within(either.host.store(A, 1, keys[:2]))
    await within(either.host.store(A, 1, keys[:2]))
    assert await either.open(A, 2, 300, keys) == 140, "what it has is more than what is stored"
    await within(either.host.close_sequence(A))
    for name, asked, n_tokens, offered in ((B, keys, 300, 128), (C, keys[:2], 128, 127)):
        assert await either.open(name, 1, n_tokens, asked) == offered
        assert await either.resume(name, 1, offered) == offered
        await either.lost(rows_of(1), part(name, offered + 1, 1))
    whole = made(await either.run(rows[127:128], part(C, 127, 1)), 1)
    await either.place(C, epoch=2, n_tokens=127)
    assert same(made(await either.run(rows[127:128], part(C, 127, 1, epoch=2)), 1), whole)
    went_on = made(await either.run(more, part(B, 128, 3)), 3)
    await within(either.host.close_sequence(C))
    await either.place(A)
    for start in (0, 64):
        await either.run(rows[start : start + 64], part(A, start, 64))
    assert same(made(await either.run(more, part(A, 128, 3)), 3), went_on), "as if it had been computed"


async def test_blocks_of_other_keys_are_not_found(either: Driven) -> None:
    keys = keys_of(2, 2)
    await either.open(A, 1, 300, keys)
    await either.resume(A)
    await either.run(rows_of(64), part(A, 0, 64))
    await within(either.host.store(A, 1, keys[:1]))
    assert await either.open(B, 1, 300, keys) == 64
    assert await either.open(C, 1, 300, keys_of(3, 2)) == 0


# -- passes ------------------------------------------------------------------------------------------------------------


async def test_a_hole_is_lost_and_the_sequence_goes_on_from_what_is_there(either: Driven) -> None:
    await either.place(A, B)
    await either.lost(rows_of(1), part(A, 1, 1))
    await either.run(rows_of(10), part(A, 0, 10))
    await either.lost(rows_of(4), part(B, 0, 2), part(A, 11, 2))
    await either.run(rows_of(3), part(B, 0, 2), part(A, 10, 1))
    assert await either.open(A, 2) == 11


async def test_positions_are_absolute_and_what_is_beyond_the_first_row_is_forgotten(either: Driven) -> None:
    rows, other = rows_of(10), rows_of(2, 2)
    await either.place(A, B)
    for start, stop in ((0, 3), (3, 10)):
        await either.run(rows[start:stop], part(A, start, stop - start))
    again = made(await either.run(other, part(A, 3, 2)), 2)
    await either.lost(rows_of(1), part(A, 6, 1))
    await either.run(rows[:3], part(B, 0, 3))
    assert same(made(await either.run(other, part(B, 3, 2)), 2), again)
    await either.run(rows[:3], part(B, 0, 3))
    third = made(await either.run(rows[3:], part(B, 3, 7)), 7)
    assert not same(third[:2], again), "rows count"
    assert await either.open(A, 2) == 5


async def test_a_sequence_that_goes_on_computes_the_same(either: Driven) -> None:
    rows = rows_of(9)
    await either.place(A)
    await either.run(rows[:8], part(A, 0, 8))
    last = made(await either.run(rows[8:], part(A, 8, 1)), 1)
    await either.place(A, epoch=2, n_tokens=8)
    assert same(made(await either.run(rows[8:], part(A, 8, 1, epoch=2)), 1), last)


async def test_rows_come_out_in_the_order_of_the_parts_and_no_tokens(first: Driven) -> None:
    rows = rows_of(6)
    await first.place(A, B)
    for name, start, stop in ((A, 0, 4), (B, 4, 6)):
        await first.run(rows[start:stop], part(name, 0, stop - start))
    places = ((B, 2, 4), (A, 4, 0))
    alone = [made(await first.run(rows[[row]], part(name, start, 1)), 1) for name, start, row in places]
    together = await first.run(rows[[4, 0]], part(B, 2, 1), part(A, 4, 1))
    assert together.tokens == ()
    assert same(made(together, 2), np.concatenate(alone))
    assert not same(alone[0], alone[1])


async def test_tokens_come_of_parts_that_want_one_in_their_order_and_no_rows(tail: Driven) -> None:
    rows = {A: rows_of(4, 1), B: rows_of(2, 2), C: rows_of(3, 3)}
    await tail.place(A, B, C)
    alone = {name: made(await tail.run(its, part(name, 0, len(its))), len(its)) for name, its in rows.items()}
    assert [len(each) for each in alone.values()] == [1] * 3
    assert alone[A] != alone[C], "else their order would not show"
    for order, wanted in (((C, B, A), {A, C}), ((A, B, C), {A, C}), ((B, A, C), {B}), ((A, B, C), set())):
        parts = [part(name, 0, len(rows[name]), outputs=int(name in wanted)) for name in order]
        computed = await tail.run(np.concatenate([rows[name] for name in order]), *parts)
        assert computed.rows is None
        assert [len(each) for each in computed.tokens] == [1] * len(wanted)
        assert ids_of(computed.tokens) == [token for name in order if name in wanted for token in alone[name]]


async def test_passes_that_succeed_end_in_the_order_in_which_they_were_begun(either: Driven) -> None:
    await either.place(A, B)
    good, bad = [], []
    for n in range(30):
        good.append(either.begin(rows_of(1 + n % 3), part(B, 0, 1 + n % 3)))
        good.append(either.begin(rows_of(3), part(A, 3 * n, 3)))
        # It is refused at once or at its end.
        with suppress(StageLost):
            bad.append(either.begin(rows_of(1), part(B, 200, 1)))
    for going in good:
        await going.end()
    for going in bad:
        with pytest.raises(StageLost):
            await going.end()
    assert [going for going in either.ended if going in good] == good
    assert await either.open(A, 2) == 90


async def test_a_pass_is_told_once_though_its_sequence_is_closed_meanwhile(either: Driven) -> None:
    await either.place(A, B)
    going = either.begin(rows_of(20), part(A, 0, 20))
    assert not going.told, "not before `begin` has returned"
    await within(either.host.close_sequence(A))
    assert await either.open(A, 1) == 0
    await within(going.over.wait())
    await either.run(rows_of(1), part(B, 0, 1))
    assert len(going.told) == 1
    assert await either.open(A, 2) == 0, "what the pass left is not the new sequence's"


async def test_rows_of_another_size_are_refused(either: Driven) -> None:
    await either.place(A)
    with pytest.raises(WireError):
        await either.run(rows_of(2), part(A, 0, 3))
    await either.run(rows_of(3), part(A, 0, 3))
