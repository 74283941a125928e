"""Request bodies to queries: what is accepted, what is refused, and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.api import fields
from swarmcpp.api.openai import MAX_SEQUENCES, SEED_MODULUS, Query, parse_chat, parse_text
from swarmcpp.core import ChatMessage, Limits, SamplingParams
from swarmcpp.errors import BadRequest, PromptTooLong, SwarmError, UnsupportedField

LIMITS = Limits(ctx_size=512, n_vocab=1000)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**body: Any) -> Query:
    return parse_chat(json.dumps({"messages": HELLO, **body}).encode(), lambda _model: LIMITS, lambda bits: 99)


def text(**body: Any) -> Query:
    return parse_text(json.dumps({"prompt": "hello", **body}).encode(), lambda _model: LIMITS, lambda bits: 99)


def test_defaults() -> None:
    query = chat()
    assert query.messages == (ChatMessage("user", "hello"),)
    assert query.sampling == SamplingParams(seed=99)
    assert (query.model, query.n, query.stream, query.max_tokens, query.stop) == (None, 1, False, None, ())


def test_every_supported_field_arrives() -> None:
    query = text(
        model="m",
        prompt=["a", "b"],
        max_tokens=5,
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0,
        seed=3,
        n=2,
        stop=["x", "y", "x"],
        stream=True,
        stream_options={"include_usage": True},
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        repeat_last_n=-1,
        logit_bias={"5": -100, "2": 1.5},
        echo=False,
        ignore_eos=True,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
    )
    assert query == Query(
        kind="text",
        model="m",
        messages=(),
        prompts=("a", "b"),
        n=2,
        stream=True,
        include_usage=True,
        max_tokens=5,
        stop=("x", "y"),
        sampling=SamplingParams(
            temperature=0.0,
            top_k=0,
            top_p=0.5,
            min_p=0.0,
            seed=3,
            repeat_penalty=1.5,
            repeat_last_n=512,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias=((2, 1.5), (5, -100.0)),
            ignore_eos=True,
        ),
    )
    assert query.sequences == 4
    assert query.sampling_of(1).seed == 4


@pytest.mark.parametrize(
    ("given_seed", "seed"), [(-1, 99), (None, 99), (2**32 - 1, 0), (2**64 - 1, 0), (-2, 2**32 - 3)]
)
def test_seeds_fold_and_never_ask_llama_for_a_random_one(given_seed: int | None, seed: int) -> None:
    assert chat(seed=given_seed).sampling.seed == seed
    assert chat(seed=SEED_MODULUS - 1).sampling_of(1).seed == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ("", ("",)),
    ],
)
def test_forms_of_prompt(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert text(prompt=prompt).prompts == prompts


def test_content_parts_and_roles() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    query = chat(
        messages=[
            {"role": "developer", "content": "d", "name": "n"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "", "tool_calls": None, "refusal": None, "annotations": []},
        ]
    )
    assert query.messages == (
        ChatMessage("system", "d", "n"),
        ChatMessage("user", "a\nb"),
        ChatMessage("assistant", ""),
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": 10**400},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.0},
        {"top_k": 2**31},
        {"min_p": -1},
        {"seed": 2**64},
        {"seed": True},
        {"n": 0},
        {"n": 17},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_completion_tokens": 0},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": 5},
        {"stop": ["a"] * 1000},
        {"stop": "é" * 513},
        {"stream": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": []},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repeat_penalty": 0},
        {"repeat_penalty": 1.1, "repetition_penalty": 1.2},
        {"repeat_last_n": -2},
        {"logit_bias": {"1000": 1}},
        {"logit_bias": {"01": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"²": 1}},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": None}},
        {"logit_bias": [[1, 1]]},
        {"ignore_eos": "yes"},
        {"model": ""},
        {"model": 5},
        {"user": 5},
        {"metadata": "x"},
    ],
)
def test_bad_values_are_refused_by_field_name(bad: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**bad)
    assert (caught.value.param or "").split("[")[0] in bad
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bad",
    [
        {"tools": [{}]},
        {"tool_choice": "auto"},
        {"functions": [{}]},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 1},
        {"best_of": 2},
        {"best_of": True},
        {"suffix": "x"},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "a"}},
        {"grammar": "root"},
        {"json_schema": {"a": 1}},
        {"n_probs": 1},
        {"mirostat": 2},
        {"n_predict": 5},
        {"cache_prompt": False},
        {"store": True},
        {"service_tier": "flex"},
        {"echo": True},
        {"no_such_field": None},
        {"line\nbreak": 1},
    ],
)
def test_unsupported_and_unknown_fields_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedField) as caught:
        chat(**bad)
    (name,) = bad
    assert caught.value.param == name
    assert repr(name)[1:-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tools": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"best_of": 1},
        {"suffix": ""},
        {"mirostat": 0},
        {"typical_p": 1.0},
        {"parallel_tool_calls": None},
        {"echo": False},
        {"user": None},
        {"stop": []},
        {"stop": None},
        {"logit_bias": {}},
        {"stream_options": None},
    ],
)
def test_values_that_ask_for_nothing_change_nothing(harmless: dict[str, Any]) -> None:
    assert chat(**harmless) == chat()


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], BadRequest),
        (None, BadRequest),
        ("hi", BadRequest),
        (["hi"], BadRequest),
        ([{"content": "x"}], BadRequest),
        ([{"role": "user"}], BadRequest),
        ([{"role": "user", "content": None}], BadRequest),
        ([{"role": "user", "content": []}], BadRequest),
        ([{"role": "user", "content": ["x"]}], BadRequest),
        ([{"role": "user", "content": [{"type": "text"}]}], BadRequest),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], UnsupportedField),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], UnsupportedField),
        ([{"role": "tool", "content": "x"}], UnsupportedField),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], UnsupportedField),
        ([{"role": "user", "content": "x", "nonsense": 1}], UnsupportedField),
        (HELLO * 512, PromptTooLong),
    ],
)
def test_bad_messages(messages: Any, error: type[SwarmError]) -> None:
    with pytest.raises(error):
        chat(messages=messages)


@pytest.mark.parametrize("prompt", [None, [], 5, [[]], [1000], [-1], [True], ["a", 1], [1, "a"], [["a"]], {}])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        text(prompt=prompt)
    assert caught.value.param == "prompt"


def test_what_one_body_may_ask_for_is_bounded() -> None:
    assert text(prompt=["a"] * MAX_SEQUENCES).sequences == MAX_SEQUENCES
    for body in ({"prompt": ["a"] * (MAX_SEQUENCES + 1)}, {"prompt": ["a"] * MAX_SEQUENCES, "n": 2}):
        with pytest.raises(BadRequest, match="256 answers"):
            text(**body)
    with pytest.raises(PromptTooLong, match="--ctx-size"):
        text(prompt=[1] * 512)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"{} trailing",
        "{}".encode("utf-16"),
    ],
)
def test_bodies_that_are_not_json_objects(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(body, lambda _model: LIMITS, lambda bits: 0)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
known_names = st.sampled_from(sorted(fields.CHAT_FIELDS | fields.TEXT_FIELDS | set(fields.KNOWN_ELSEWHERE)))


@given(st.dictionaries(known_names | st.text(), json_values, max_size=5))
def test_any_object_is_a_query_or_a_bad_request(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for parse in (parse_chat, parse_text):
        try:
            query = parse(raw, lambda _model: LIMITS, lambda bits: 0)
        except BadRequest as error:
            str(error).encode()
            assert error.status == 400
        else:
            assert isinstance(query, Query)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_query_or_a_bad_request(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_chat(raw, lambda _model: LIMITS, lambda bits: 0)


@given(
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1),
    seed=st.integers(0, SEED_MODULUS - 1),
    n=st.integers(1, 16),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), max_size=16, unique=True),
    bias=st.dictionaries(st.integers(0, 999), st.floats(-100, 100)),
    content=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_valid_bodies_arrive_unchanged(
    temperature: float, top_p: float, seed: int, n: int, stop: list[str], bias: dict[int, float], content: str
) -> None:
    query = chat(
        messages=[{"role": "user", "content": content}],
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        n=n,
        stop=stop,
        logit_bias=bias,
    )
    assert query.messages == (ChatMessage("user", content),)
    assert query.sampling == SamplingParams(
        temperature=temperature, top_p=top_p, seed=seed, logit_bias=tuple(sorted(bias.items()))
    )
    assert (query.n, list(query.stop)) == (n, stop)


def test_a_cache_salt_is_passed_on_and_bounded() -> None:
    assert chat(cache_salt="tenant 7").cache_salt == "tenant 7"
    assert chat().cache_salt == ""
    with pytest.raises(BadRequest, match=r"257 characters; at most 256"):
        chat(cache_salt="x" * 257)


def test_what_a_client_predicts() -> None:
    assert chat(prediction={"type": "content", "content": "same"}).prediction == "same"
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(prediction={"type": "content", "content": parts}).prediction == "one\ntwo"
    assert chat(prediction=None).prediction == chat().prediction == ""
    assert chat(prediction={"type": "content", "content": [5, 6]}).prediction == (5, 6)
    with pytest.raises(BadRequest, match=r"prediction has 99999999; token ids are 0 to"):
        chat(prediction={"type": "content", "content": [99999999]})
    with pytest.raises(UnsupportedField, match=r"prediction.type is 'other'"):
        chat(prediction={"type": "other", "content": "x"})
    for bad in ({"type": "content"}, {"type": "content", "content": 5}):
        with pytest.raises(BadRequest, match=r"prediction.content must be a string"):
            chat(prediction=bad)
    with pytest.raises(BadRequest, match="prediction must be an object"):
        chat(prediction="same")


def test_who_guesses_ahead_and_how_far() -> None:
    assert (chat().drafter, chat().gamma) == ("", -1)
    query = chat(speculative={"drafter": "ngram", "gamma": 7})
    assert (query.drafter, query.gamma) == ("ngram", 7)
    assert chat(speculative={"gamma": 0}).gamma == 0
    with pytest.raises(BadRequest, match=r"speculative.drafter is 'oracle'; it must be one of none"):
        chat(speculative={"drafter": "oracle"})
    with pytest.raises(BadRequest, match=r"gamma is 32; it must be from 0 to 31"):
        chat(speculative={"gamma": 32})
    with pytest.raises(UnsupportedField, match=r"speculative has 'depth'"):
        chat(speculative={"depth": 2})
