"""How many guesses are verified: as many as pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest
from engine_support import part_of, request
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import MAX_GAMMA, Chunk, DrafterName, Token
from swarmcpp.engine.drafting import Draft
from swarmcpp.engine.scheduler import CostModel
from swarmcpp.engine.sequence import Generation
from swarmcpp.engine.speculation import PRIOR, Acceptance, Speculation, drawn_tokens, expected

FLAT = CostModel(decode_s=((1, 0.030), (64, 0.0331)))
"""As on a machine that waits for memory: rows are almost free."""

STEEP = CostModel(decode_s=((1, 0.030), (64, 1.92)))
"""Each row costs as much as the first."""


class Known:
    """Guesses the same for all."""

    name: DrafterName = "ngram"
    free = True

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.asked: list[tuple[Generation, int]] = []

    def draft(self, asked: Sequence[tuple[Generation, int]]) -> list[Draft]:
        self.asked += asked
        return [Draft(tuple(range(1, 1 + min(self.length, most)))) for _, most in asked]

    def seconds(self, count: int, gamma: int) -> float:
        return 0.0

    def forget(self, generation: Generation) -> None:
        pass


class Rig:
    """Slots that decode, and what became of their guesses."""

    def __init__(
        self,
        users: int = 1,
        length: int = 8,
        cost: CostModel = FLAT,
        *,
        rows: int = 64,
        max_tokens: int = 10**6,
        n_ctx: int = 10**7,
    ) -> None:
        self.drafter = Known(length)
        self.cost = cost
        self.speculation = Speculation([self.drafter], gamma=4, max_rows=rows, n_ctx=n_ctx)
        self.generations = [Generation(n + 1, request([0], max_tokens), [0], decoding=True) for n in range(users)]

    def widen(self) -> tuple[tuple[Chunk, ...], ...]:
        chunks = [Chunk(slot, len(each.tokens) - 1, 1, last=True) for slot, each in enumerate(self.generations)]
        return self.speculation.widen(chunks, self.generations.__getitem__, self.cost)

    def step(self, right: int) -> tuple[int, float]:
        """One step in which of each draft the first `right` guesses are right: tokens and seconds."""
        count, seconds = 0, 0.0
        for group in self.widen():
            seconds += self.cost.decode_cost(sum(chunk.count for chunk in group))
            for chunk in group:
                generation = self.generations[chunk.slot]
                came = [*chunk.guesses[:right], 99][: len(chunk.guesses) + 1]
                part = generation.accept([Token(each) for each in came], (), 10**7, 0.0)
                self.speculation.verified(generation, part)
                count += len(part.tokens)
        return count, seconds

    def rate(self, right: int, steps: int = 400) -> float:
        """Tokens/s over many steps."""
        told = [self.step(right) for _ in range(steps)]
        return sum(count for count, _ in told) / sum(seconds for _, seconds in told)


def test_what_is_known_of_acceptance() -> None:
    fresh = Acceptance()
    assert fresh.rates(0, 3) == pytest.approx([PRIOR] * 3)
    for _ in range(50):
        fresh.note(0, 4, 2)
    rates = fresh.rates(0, 9)
    assert rates[0] > 0.9 and rates[1] > 0.9
    # The third was always wrong; behind it nothing is known but that.
    assert rates[2] < 0.2
    assert rates[2:] == pytest.approx([rates[2]] * 7)
    # Of a new request the first thing that is known is what was of all.
    assert Acceptance(fresh).rates(0, 9) == pytest.approx(rates)


def test_a_guess_is_as_likely_at_the_end_of_a_draft_as_after_as_long_a_match() -> None:
    seen = Acceptance()
    for _ in range(50):
        seen.note(2, 40, 1)
        seen.note(16, 40, 40)
    rates = seen.rates(0, 64)
    assert rates[3] < 0.6 < 0.95 < min(rates[16:])
    assert seen.rates(20, 44) == rates[20:]


def test_a_copy_is_recognised_within_four_passes() -> None:
    """What is guessed at first is little; each pass that was all right says something of all that is longer."""
    seen, run, passes = Acceptance(), 3, []
    while sum(passes) < 60:
        rates = seen.rates(run, 63)
        gamma = next((n for n, rate in enumerate(accumulate(rates, mul)) if rate < 0.3), 63)
        seen.note(run, gamma, gamma)
        passes.append(gamma)
        run += gamma + 1
    assert len(passes) <= 4


def test_another_kind_of_text_is_noticed_within_some_passes() -> None:
    seen = Acceptance()
    for _ in range(200):
        seen.note(0, 1, 1)
    for _ in range(25):
        seen.note(0, 1, 0)
    assert seen.rates(0, 1)[0] < 0.35


def test_expected_tokens() -> None:
    assert expected([0.5, 0.5, 1.0]) == pytest.approx([0.5, 0.75, 1.0])


def test_draws_end_at_the_first_guess_that_was_wrong() -> None:
    drawn: list[int] = []

    def draw(output: int) -> Token:
        drawn.append(output)
        return Token([7, 8, 5, 6][output])

    assert [token.id for token in drawn_tokens((7, 8, 9, 9), draw)] == [7, 8, 5]
    assert drawn == [0, 1, 2]
    assert [token.id for token in drawn_tokens((7, 8, 5), draw)] == [7, 8, 5, 6]
    assert [token.id for token in drawn_tokens((), draw)] == [7]


def test_right_guesses_are_verified_as_many_as_there_are() -> None:
    rig = Rig()
    rig.rate(right=8, steps=20)
    ((chunk,),) = rig.widen()
    assert chunk.guesses == tuple(range(1, 9))
    assert (chunk.count, chunk.outputs) == (9, 9)


@pytest.mark.parametrize("cost", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("users", [1, 8])
def test_wrong_guesses_cost_less_than_3_percent(users: int, cost: CostModel) -> None:
    rig = Rig(users, cost=cost)
    rig.step(0)
    assert rig.rate(right=0) >= 0.97 * users / cost.decode_cost(users)


def test_rows_that_cost_as_much_as_passes_carry_no_guesses() -> None:
    assert Rig(cost=STEEP).rate(right=8) >= 0.97 / STEEP.decode_cost(1)


def test_guesses_that_become_right_are_noticed() -> None:
    rig = Rig()
    rig.rate(right=0, steps=200)
    rig.rate(right=8, steps=300)
    assert rig.rate(right=8, steps=50) > 5 / 0.033


def test_users_without_a_draft_do_not_wait_for_others_guesses_in_vain() -> None:
    """One of eight has a draft: the rows of the others are computed apart, and only if all in all it pays."""
    rig = Rig(8, 24, CostModel(decode_s=((1, 0.03), (8, 0.045), (64, 0.3))))
    for each in rig.generations[1:]:
        each.request = replace(each.request, drafter="none")
    # A trial costs about a step, for which many must save.
    for _ in range(1500):
        rig.step(24)
    groups = rig.widen()
    assert [len(group) for group in groups] == [7, 1]
    assert [chunk.outputs for chunk in groups[0]] == [1] * 7
    assert groups[1][0].guesses


def test_what_a_request_says_holds() -> None:
    rig = Rig(3)
    for each, (drafter, gamma) in zip(rig.generations, [("none", -1), ("", 0), ("prediction", -1)], strict=True):
        each.request = replace(each.request, drafter=drafter, gamma=gamma)
    assert rig.widen() == (tuple(Chunk(slot, 0, 1, last=True) for slot in range(3)),)
    rig.generations[1].request = replace(rig.generations[1].request, gamma=3)
    rig.rate(right=0, steps=20)
    forced = replace(rig.generations[2].request, drafter="ngram", gamma=5)
    rig.generations[2].request = forced
    assert [len(chunk.guesses) for group in rig.widen() for chunk in group] == [0, 0, 5]
    rig.generations[2].request = replace(forced, drafter="prediction")
    for _ in range(20):
        rig.step(8)
    assert max(len(chunk.guesses) for group in rig.widen() for chunk in group) <= 3


def test_more_that_must_guess_than_there_is_room_for_guess_nothing() -> None:
    rig = Rig(8, rows=8)
    for each in rig.generations:
        each.request = replace(each.request, drafter="ngram", gamma=4)
    for _ in range(3):
        assert [chunk.guesses for group in rig.widen() for chunk in group] == [()] * 8
    # Nothing is left of them that the next tokens would be counted for.
    assert rig.speculation.verified(rig.generations[0], part_of([5])) == part_of([5])


def test_no_row_stands_behind_the_end_of_a_sequence() -> None:
    rig = Rig(length=32, n_ctx=600)
    generation = rig.generations[0]
    generation.request = replace(generation.request, drafter="ngram", gamma=MAX_GAMMA)
    generation.tokens = [0] * 580
    ((chunk,),) = rig.widen()
    assert (chunk.start, chunk.count) == (579, 21)


def test_nothing_is_guessed_before_a_pass_was_measured() -> None:
    rig = Rig(cost=CostModel())
    assert rig.widen() == ((Chunk(0, 0, 1, last=True),),)


@given(
    users=st.integers(1, 12),
    rows=st.integers(1, 64),
    length=st.integers(0, 40),
    max_tokens=st.integers(1, 60),
    rights=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    slope=st.floats(0.0, 0.03),
)
def test_chunks_are_sound_whatever_comes(
    users: int, rows: int, length: int, max_tokens: int, rights: list[int], slope: float
) -> None:
    cost = CostModel(decode_s=((1, 0.03), (64, 0.03 + 63 * slope)))
    rig = Rig(users, length, cost, rows=rows, max_tokens=max_tokens)
    for right in rights:
        if any(each.to_come <= 0 for each in rig.generations):
            break
        groups = rig.widen()
        assert sorted(chunk.slot for group in groups for chunk in group) == list(range(users))
        for group in groups:
            assert len({chunk.count for chunk in group}) == 1, "llama.cpp would split them"
            assert [chunk.slot for chunk in group] == sorted(chunk.slot for chunk in group)
            wide = sum(chunk.outputs for chunk in group if chunk.guesses)
            assert wide <= max(rows, 0)
            for chunk in group:
                assert chunk.count == 1 + len(chunk.guesses) <= rig.generations[chunk.slot].to_come
        rig.step(right)


def test_counts_of_guesses_go_with_the_tokens() -> None:
    rig = Rig()
    rig.step(8)
    ((chunk,),) = rig.widen()
    generation = rig.generations[0]
    part = rig.speculation.verified(generation, part_of([1, 2, 50]))
    assert (part.drafted, part.accepted) == (len(chunk.guesses), 2)
    assert rig.speculation.verified(generation, part_of([5])) == part_of([5])
