"""What a request that runs has in an engine and at a head alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_support import GREEDY, part_of, prompt_of, request
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import Token
from swarmcpp.engine.scheduler import SlotView
from swarmcpp.engine.sequence import WORTH_A_MOVE, Generation, gap

EOG = frozenset({99})


def generation(max_tokens: int = 8, prompt: int = 70, generated: tuple[int, ...] = ()) -> Generation:
    asked = request(prompt_of(prompt), max_tokens, generated=generated)
    return Generation(3, asked, [*asked.prompt, *generated], cached=64, tier="slot", queue_s=0.5, begun_s=10.0)


def test_the_first_token_is_told_with_what_is_known_of_the_beginning() -> None:
    one = generation()
    told = one.accept((Token(5),), EOG, 256, 12.5)
    assert told == part_of((5,), cached_tokens=64, tier="slot", queue_s=0.5, prefill_s=2.5)
    assert one.accept((Token(6),), EOG, 256, 13.0) == part_of((6,))
    assert one.tokens[-2:] == [5, 6]


@pytest.mark.parametrize(
    ("tokens", "ids", "finish"),
    [((5, 6, 7), (5, 6, 7), None), ((5, 99, 7), (5, 99), "stop"), ((5, 6, 7, 8, 9), (5, 6, 7, 8), "length")],
)
def test_several_tokens_of_one_pass_end_with_the_one_that_ends_it(
    tokens: tuple[int, ...], ids: tuple[int, ...], finish: str | None
) -> None:
    one = generation(max_tokens=5, generated=(1,))
    told = one.accept(tuple(map(Token, tokens)), EOG, 256, 0.0)
    assert (told.ids, told.finish) == (list(ids), finish)
    assert one.tokens[71:] == list(ids) and one.sampled == len(ids)


def test_an_end_is_that_of_the_slot_or_none_where_the_end_token_is_ignored() -> None:
    assert generation(prompt=70).accept((Token(5),), EOG, 71, 0.0).finish == "length"
    one = generation()
    one.request = replace(one.request, sampling=replace(GREEDY, ignore_eos=True))
    assert one.accept((Token(99),), EOG, 256, 0.0).finish is None


def test_the_scheduler_sees_what_is_left_and_the_end_of_the_last_whole_tile() -> None:
    one = generation(prompt=130, generated=(1, 2))
    one.n_past = 64
    assert one.view(7) == SlotView(7, 3, 64, 68, 128)
    one.n_past = 132
    assert one.view(7) is None, "all is planned and nothing has come"
    one.accept((Token(5),), EOG, 256, 0.0)
    assert one.view(7) == SlotView(7, 3, 132, 0, 128)


def test_a_move_pays_for_who_decodes_and_has_some_way_to_go() -> None:
    one = generation(max_tokens=WORTH_A_MOVE + 1)
    assert not one.worth_a_move
    one.accept((Token(5),), EOG, 256, 0.0)
    assert one.worth_a_move
    one.accept((Token(5),), EOG, 256, 0.0)
    assert not one.worth_a_move


@given(st.sets(st.integers(0, 20)), st.integers(0, 5))
def test_a_gap_is_the_lowest_free_number_below_one_that_is_taken(taken: set[int], first: int) -> None:
    free = [number for number in range(first, max(taken, default=0)) if number not in taken]
    assert gap(taken, first) == (min(free) if free else None)
