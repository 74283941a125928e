"""Sampler chains: seeds, resumption, penalties, biases, checked on real logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from engine_support import GREEDY, prompt_of, request
from hypothesis import given
from hypothesis import strategies as st
from llama_support import BackendMaker, generate

from swarmcpp._native import largest_f32
from swarmcpp.core import Rows, SamplingParams
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Model
from swarmcpp.llama.sampler import Sampler

WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
PENALISED = replace(GREEDY, repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, repeat_last_n=12)
PROMPT = prompt_of(20, 3)


@pytest.fixture
def backend(tiny: Model, backend_on: BackendMaker) -> LlamaBackend:
    return backend_on(tiny, n_seqs=1)


def test_a_seed_decides(backend: LlamaBackend) -> None:
    runs = [generate(backend, PROMPT, 20, replace(WARM, seed=seed)) for seed in (1, 2, 3, 2**32 - 2)]
    assert len({tuple(run) for run in runs}) == len(runs)
    assert generate(backend, PROMPT, 20, replace(WARM, seed=2)) == runs[1]


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("sampling", [SamplingParams(), WARM, replace(WARM, top_p=0.5, repeat_penalty=1.2)])
def test_a_resumed_request_goes_on_with_its_random_numbers(
    trained: Model, backend_on: BackendMaker, sampling: SamplingParams, seed: int
) -> None:
    backend = backend_on(trained, n_seqs=1)
    prompt = trained.vocab.tokenize("Once upon a time", add_special=True, parse_special=False)
    sampling = replace(sampling, seed=seed)
    whole = generate(backend, prompt, 24, sampling)
    for done in (1, 2, 5, 13):
        assert generate(backend, prompt, 24 - done, sampling, whole[:done]) == whole[done:]


def test_resuming_without_the_past_would_differ(backend: LlamaBackend) -> None:
    """That the test above can fail: a fresh sampler draws the first numbers again."""
    whole = generate(backend, PROMPT, 24, WARM)
    assert generate(backend, [*PROMPT, *whole[:5]], 19, WARM) != whole[5:]


def test_penalties_resume_too(backend: LlamaBackend) -> None:
    whole = generate(backend, PROMPT, 24, PENALISED)
    for done in (1, 7, 20):
        assert generate(backend, PROMPT, 24 - done, PENALISED, whole[:done]) == whole[done:]


def penalised(logits: np.ndarray, history: list[int], params: SamplingParams) -> int:
    """The greedy choice under penalties, as llama.cpp documents them."""
    for token, count in Counter(history[-params.repeat_last_n :]).items():
        value = logits[token]
        value = value * params.repeat_penalty if value <= 0 else value / params.repeat_penalty
        logits[token] = value - count * params.frequency_penalty - params.presence_penalty
    return int(logits.argmax())


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, repeat_penalty=1.5, repeat_last_n=64),
        replace(GREEDY, presence_penalty=2.0, repeat_last_n=5),
        replace(GREEDY, frequency_penalty=1.5, repeat_last_n=300),
        PENALISED,
    ],
)
def test_penalties_look_at_prompt_and_answer(backend: LlamaBackend, params: SamplingParams) -> None:
    sampler = backend.sampler(request(PROMPT, sampling=params))
    history = list(PROMPT)
    backend.decode([Rows(0, 0, history, outputs=1)])
    for _ in range(40):
        expected = penalised(backend.logits(0), history, params)
        assert backend.sample(sampler, 0).id == expected
        history.append(expected)
        backend.decode([Rows(0, len(history) - 1, [expected], outputs=1)])
    sampler.close()


@pytest.mark.parametrize(("last_n", "seen"), [(20, True), (5, True), (4, False), (0, False)])
def test_penalties_look_back_into_the_prompt(backend: LlamaBackend, last_n: int, seen: bool) -> None:
    """The biased token is the fifth from the prompt's end; a penalty outweighs the bias where it looks that far."""
    prompt = [*(token for token in PROMPT if token != 77), 77, 1, 2, 3, 4]
    params = replace(GREEDY, logit_bias=((77, 50.0),), presence_penalty=100.0, repeat_last_n=last_n)
    assert (generate(backend, prompt, 1, params) != [77]) == seen


def test_a_repeat_penalty_breaks_a_loop(trained: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(trained, n_seqs=1)
    prompt = trained.vocab.tokenize("the the the the the", add_special=True, parse_special=False)
    plain = generate(backend, prompt, 60, GREEDY)
    fresh = generate(backend, prompt, 60, replace(GREEDY, repeat_penalty=1.5, repeat_last_n=64))
    assert len(set(fresh)) > len(set(plain))
    assert generate(backend, prompt, 60, replace(GREEDY, repeat_penalty=1.5, repeat_last_n=0)) == plain


@pytest.mark.parametrize(
    "narrow",
    [replace(WARM, top_k=1), replace(WARM, top_p=0.0), replace(WARM, min_p=1.0), replace(WARM, temperature=1e-4)],
)
def test_the_narrowest_choice_is_greedy(backend: LlamaBackend, narrow: SamplingParams) -> None:
    assert generate(backend, PROMPT, 20, narrow) == generate(backend, PROMPT, 20, GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_a_logit_bias_forces_and_forbids(backend: LlamaBackend, sampling: SamplingParams) -> None:
    assert generate(backend, PROMPT, 5, replace(sampling, logit_bias=((77, 100.0),))) == [77] * 5
    free = generate(backend, PROMPT, 20, sampling)
    forbidden = tuple((token, -100.0) for token in set(free))
    assert not set(generate(backend, PROMPT, 20, replace(sampling, logit_bias=forbidden))) & set(free)


def test_a_bias_outside_the_vocabulary_does_nothing(backend: LlamaBackend) -> None:
    free = generate(backend, PROMPT, 5, GREEDY)
    assert generate(backend, PROMPT, 5, replace(GREEDY, logit_bias=((-1, 100.0), (10**6, 100.0)))) == free


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_ignore_eos_forbids_every_end(backend: LlamaBackend, tiny: Model, sampling: SamplingParams) -> None:
    eager = replace(sampling, logit_bias=tuple((token, 50.0) for token in tiny.vocab.eog_tokens))
    assert set(generate(backend, PROMPT, 10, eager)) <= tiny.vocab.eog_tokens
    assert not set(generate(backend, PROMPT, 10, replace(eager, ignore_eos=True))) & tiny.vocab.eog_tokens


def test_closing_twice_is_harmless(backend: LlamaBackend) -> None:
    sampler = backend.sampler(request(PROMPT))
    sampler.close()
    sampler.close()


# -- without a chain -------------------------------------------------------------------------------------------------


def largest(values: np.ndarray, banned: Sequence[int] = ()) -> int:
    before = values.copy()
    found = largest_f32(values.ctypes.data, len(values), list(banned))
    np.testing.assert_array_equal(values, before)
    return found


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=100), st.data())
def test_the_largest_is_the_first_of_the_largest(values: list[float], data: st.DataObject) -> None:
    row = np.array(values, np.float32)
    assert largest(row) == int(row.argmax())
    banned = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=len(row)))
    without = row.copy()
    without[banned] = -np.inf
    assert largest(row, banned) == int(without.argmax())


@given(st.lists(st.floats(width=32), min_size=1, max_size=100), st.data())
def test_a_nan_has_no_largest(values: list[float], data: st.DataObject) -> None:
    row = np.array(values, np.float32)
    row[data.draw(st.integers(0, len(row) - 1))] = np.nan
    assert largest(row) == -1


def test_an_index_outside_is_refused() -> None:
    row = np.arange(5, dtype=np.float32)
    for outside in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            largest(row, [2, outside])
        assert row.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "params", [GREEDY, replace(GREEDY, ignore_eos=True), replace(GREEDY, logit_bias=((7, -np.inf),))]
)
def test_greedy_says_what_llama_cpps_chain_says(backend: LlamaBackend, params: SamplingParams) -> None:
    chained = backend.sampler(request(PROMPT, 30, sampling=params))
    assert isinstance(chained, Sampler)
    assert chained._banned is not None
    chained._banned = None
    told = generate(backend, PROMPT, 30, params)
    backend.truncate(0, 0)
    backend.decode([Rows(0, 0, PROMPT, outputs=1)])
    for position, token in enumerate(told, len(PROMPT)):
        assert backend.sample(chained, 0).id == token
        backend.decode([Rows(0, position, [token], outputs=1)])
    chained.close()


def test_greedy_says_nothing_that_is_banned(backend: LlamaBackend) -> None:
    first = generate(backend, PROMPT, 30, GREEDY)
    banned = replace(GREEDY, logit_bias=tuple((token, -np.inf) for token in set(first[:3])))
    told = generate(backend, PROMPT, 30, banned)
    assert not set(first[:3]).intersection(told)
    test_greedy_says_what_llama_cpps_chain_says(backend, banned)


@pytest.mark.parametrize("params", [WARM, PENALISED, replace(GREEDY, logit_bias=((7, -3.0),))])
def test_what_decides_more_has_a_chain(backend: LlamaBackend, params: SamplingParams) -> None:
    sampler = backend.sampler(request(PROMPT, 30, sampling=params))
    assert isinstance(sampler, Sampler)
    assert sampler._banned is None
    sampler.close()
