"""A model that guesses for another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine_support import prompt_of, request
from fake_backend import FakeBackend, continuation, next_token

from swarmcpp.core import GenerateRequest, SamplingParams
from swarmcpp.engine.modeldrafter import CATCH_UP, Guesser, ModelDrafter
from swarmcpp.engine.sequence import Generation
from swarmcpp.testing import FakeClock
from swarmcpp.wire.engine import Guess, Guessed, GuessPart

SAMPLED = SamplingParams(temperature=0.8, seed=5)


def drafter_of(backend: FakeBackend, n_vocab: int = 97) -> ModelDrafter:
    clock = backend.clock = FakeClock()
    return ModelDrafter("draft", backend, n_vocab, clock)


def running(asked: GenerateRequest, answer: Sequence[int] = (), serial: int = 1) -> Generation:
    return Generation(serial, asked, [*asked.prompt, *asked.generated, *answer], decoding=True, sampled=len(answer))


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_that_knows_all_guesses_all(sampling: SamplingParams) -> None:
    backend = FakeBackend(n_slots=1)
    drafter = drafter_of(backend)
    asked = request(prompt_of(20), 40, sampling=sampling)
    told = continuation(asked, 40, 97)
    generation = running(asked, told[:1])
    at = 1
    for gamma, right in ((4, 4), (3, 1), (5, 0), (4, 4), (1, 1), (6, 6)):
        (draft,) = drafter.draft([(generation, gamma)])
        assert list(draft.tokens) == told[at : at + gamma]
        # As if the target had said something else after so many: the rest of the answer is another one then.
        generation.tokens += told[at : at + right]
        at += right
        if right < gamma:
            other = (told[at] + 1) % 97
            generation.tokens.append(other)
            sofar = [*generation.tokens[20:]]
            told = [*sofar, *continuation_after(asked, sofar, 40)]
        else:
            generation.tokens.append(told[at])
        at += 1
    drafter.forget(generation)
    assert backend.kv == [[]]
    assert backend.open_samplers == 0


def continuation_after(asked: GenerateRequest, said: Sequence[int], count: int) -> list[int]:
    """What is said after another answer was forced: draws go on where they stood."""
    tokens, made = [*asked.prompt, *said], []
    for index in range(count):
        draw = (asked.sampling.seed, len(said) + index) if asked.sampling.temperature > 0 else None
        made.append(next_token(tokens, 97, draw))
        tokens.append(made[-1])
    return made


def test_all_that_ask_are_guessed_for_in_one_call_a_token() -> None:
    backend = FakeBackend(n_slots=4)
    drafter = drafter_of(backend)
    asked = [running(request(prompt_of(5, seed), 30), [1], seed + 1) for seed in range(4)]
    drafts = drafter.draft([(each, 3) for each in asked])
    assert [len(draft.tokens) for draft in drafts] == [3] * 4
    assert [len(batch) for batch in backend.batches] == [4] * 3
    assert drafter.seconds(4, 3) == pytest.approx(3 * backend.cost(4, 0))


def test_a_long_prompt_is_read_in_pieces() -> None:
    backend = FakeBackend(n_slots=2, n_ctx=512)
    drafter = drafter_of(backend)
    generation = running(request(prompt_of(2 * CATCH_UP + 10), 30), [7])
    passes = 0
    while not (draft := drafter.draft([(generation, 2)])[0]).tokens:
        passes += 1
    assert passes == 2
    assert len(draft.tokens) == 2
    assert max(sum(len(part.tokens) for part in batch) for batch in backend.batches) <= CATCH_UP


def test_who_finds_no_slot_gets_no_guesses() -> None:
    backend = FakeBackend(n_slots=1)
    drafter = drafter_of(backend)
    first, second = (running(request(prompt_of(5, n), 30), [1], n) for n in (1, 2))
    assert [len(each.tokens) for each in drafter.draft([(first, 2), (second, 2)])] == [2, 0]
    drafter.forget(first)
    assert [len(each.tokens) for each in drafter.draft([(second, 2)])] == [2]


def test_no_guess_is_outside_the_targets_vocabulary_or_behind_the_context() -> None:
    drafter = drafter_of(FakeBackend(n_slots=1), n_vocab=1)
    assert not drafter.draft([(running(request(prompt_of(5), 30), [1]), 4)])[0].tokens
    backend = FakeBackend(n_slots=1, n_ctx=16)
    (draft,) = drafter_of(backend).draft([(running(request(prompt_of(12), 30), [1]), 9)])
    assert len(draft.tokens) <= 4


def test_a_request_that_goes_on_elsewhere_is_drawn_for_from_where_it_stood() -> None:
    backend = FakeBackend(n_slots=1)
    asked = request(prompt_of(20), 40, sampling=SAMPLED)
    told = continuation(asked, 40, 97)
    resumed = running(replace(asked, generated=tuple(told[:10])), told[10:12])
    assert list(drafter_of(backend).draft([(resumed, 4)])[0].tokens) == told[12:16]


# -- for the head of a chain -------------------------------------------------------------------------------------------


def test_a_head_says_only_what_is_new() -> None:
    backend = FakeBackend(n_slots=2)
    guesser = Guesser(drafter_of(backend))
    asked = request(prompt_of(20), 40, sampling=SAMPLED)
    told = continuation(asked, 40, 97)
    answer = guesser.answer(Guess((GuessPart(7, 20, (told[0],), 3, asked),)))
    assert answer == Guessed((tuple(told[1:4]),))
    assert guesser.answer(Guess((GuessPart(7, 21, tuple(told[1:5]), 4),))) == Guessed((tuple(told[5:9]),))
    # All it knew of it goes when it has ended, which is not answered.
    assert guesser.answer(Guess((GuessPart(7, 0, (), 0),))) is None
    assert (backend.kv, backend.open_samplers) == ([[], []], 0)


def test_what_is_not_known_is_said_to_be_so_and_may_be_told_again() -> None:
    backend = FakeBackend(n_slots=2)
    guesser = Guesser(drafter_of(backend))
    asked, other = request(prompt_of(20), 40), request(prompt_of(9, 1), 40)
    told = continuation(asked, 9, 97)
    parts = (GuessPart(1, 21, (told[1],), 2), GuessPart(2, 9, (), 2, other))
    assert guesser.answer(Guess(parts)) == Guessed((None, tuple(continuation(other, 2, 97))))
    # As a head does that was told so, or whose request was begun again.
    for _ in range(2):
        assert guesser.answer(Guess((GuessPart(1, 20, tuple(told[:2]), 2, asked),))) == Guessed((tuple(told[2:4]),))
    # With a hole before it.
    assert guesser.answer(Guess((GuessPart(1, 30, (5,), 2),))) == Guessed((None,))
