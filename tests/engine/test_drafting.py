"""What is guessed, from what was said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine_support import request
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.engine.drafting import (
    CHAIN,
    LONGEST_MATCH,
    NGRAM,
    NOTHING,
    Draft,
    NgramDrafter,
    NgramIndex,
    PredictionDrafter,
    continuation,
)
from swarmcpp.engine.sequence import Generation


def generation(
    tokens: Sequence[int], *, prediction: Sequence[int] = (), serial: int = 1, prompt: int = 1
) -> Generation:
    asked = replace(request(tokens[:prompt], 100), prediction=tuple(prediction))
    return Generation(serial, asked, list(tokens))


def common_end(tokens: Sequence[int], position: int, tail: Sequence[int]) -> int:
    length = 0
    while length < min(position, len(tail), LONGEST_MATCH) and tokens[position - 1 - length] == tail[-1 - length]:
        length += 1
    return length


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(1, 20), max_size=8), st.integers(2, 4))
def test_an_index_finds_the_longest_of_the_latest_matches(tokens: list[int], steps: list[int], n: int) -> None:
    index = NgramIndex(n)
    for end in [*(sum(steps[: i + 1]) for i in range(len(steps))), len(tokens)]:
        tail = tokens[: min(end, len(tokens))]
        places = [at for at in range(n, len(tail)) if tail[at - n : at] == tail[-n:]][::-1][:CHAIN]
        best = max(places, key=lambda at: (common_end(tail, at, tail), at), default=-1)
        assert index.match(tail, tail) == (best, common_end(tail, best, tail) if best >= 0 else 0)


def test_text_that_repeats_itself_goes_on_repeating() -> None:
    assert continuation([1, 2, 3], 1, 7) == (2, 3, 2, 3, 2, 3, 2)
    drafter = NgramDrafter()
    (draft,) = drafter.draft([(generation([9, 1, 2, 3, 1, 2, 3, 1, 2, 3]), 5)])
    assert draft.tokens == (1, 2, 3, 1, 2)


def test_a_longer_match_is_a_longer_run() -> None:
    text = list(range(100, 140))
    drafter = NgramDrafter()
    runs = []
    for n in (NGRAM, 8, 40):
        (draft,) = drafter.draft([(generation([*text, 7, 8, *text[:n]], serial=n), 1)])
        runs.append(draft.run)
        assert draft.tokens == ((text[n],) if n < 40 else (7,))
    assert runs == sorted(set(runs))
    assert drafter.draft([(generation([1, 2, 3, 4, 5, 6], serial=99), 4)]) == [NOTHING]


def test_a_generation_that_ended_leaves_nothing() -> None:
    drafter, other = NgramDrafter(), [5, 6, 7, 8, 5, 6, 7]
    drafter.draft([(generation([1, 2, 3, 4, 1, 2, 3]), 2)])
    drafter.forget(generation([1]))
    assert drafter.draft([(generation(other), 2)]) == [Draft((8, 5), NGRAM)]


def follow(answer: Sequence[int], prediction: Sequence[int], gamma: int) -> int:
    """Passes that an answer takes when each verifies up to `gamma` predicted tokens."""
    drafter, said, passes = PredictionDrafter(), 0, 0
    running = generation([0], prediction=prediction)
    while said < len(answer):
        (draft,) = drafter.draft([(running, gamma)])
        assert len(draft.tokens) <= gamma
        right = 0
        while right < len(draft.tokens) and said + right < len(answer) and draft.tokens[right] == answer[said + right]:
            right += 1
        running.tokens += answer[said : said + right + 1]
        said, passes = said + right + 1, passes + 1
    return passes


def test_an_answer_as_predicted_takes_as_few_passes_as_there_are_windows() -> None:
    assert follow(range(1, 101), range(1, 101), 9) == 10


def test_an_answer_comes_back_to_its_prediction() -> None:
    predicted = [n * 7 % 101 for n in range(200)]
    changed = list(predicted)
    changed[50] = 777
    assert follow(changed, predicted, 9) <= 22
    inserted = [*predicted[:80], 801, 802, 803, *predicted[80:]]
    assert follow(inserted, predicted, 9) <= 20 + 3 + 3
    dropped = predicted[:80] + predicted[95:]
    assert follow(dropped, predicted, 9) <= 19 + 4


def test_a_prediction_goes_on_behind_what_is_assumed_of_it_alone() -> None:
    running = generation([0, 1, 2], prediction=range(1, 20))
    running.assumed = [3, 4]
    drafter = PredictionDrafter()
    assert drafter.draft([(running, 3)])[0].tokens == (5, 6, 7)
    running.assumed = [3, 9]
    assert drafter.draft([(running, 3)]) == [NOTHING]


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40), st.integers(1, 8))
def test_no_prediction_stops_an_answer(answer: list[int], predicted: list[int], gamma: int) -> None:
    assert follow(answer, predicted, gamma) <= len(answer)
