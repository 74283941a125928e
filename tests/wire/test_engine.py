"""The codec: everything comes back as it went, and nothing else comes in."""

from __future__ import annotations

import types
from typing import Any, get_args

import msgspec
import pytest
from engine_support import part_of
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.core import BlockRef, EngineStats, GenerateRequest, KvLayout, SamplingParams, Token, TokenPart
from swarmcpp.errors import WireError
from swarmcpp.wire import engine
from swarmcpp.wire.engine import (
    MAX_FRAME,
    VERSION,
    Cancel,
    Fault,
    Message,
    Refused,
    Stop,
    Submit,
    TokenOut,
    decode,
    encode,
)

ids = st.integers(0, 2**63)
tokens = st.integers(-(2**31), 2**31 - 1)
numbers = st.floats(allow_nan=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
sampling = st.builds(
    SamplingParams,
    temperature=numbers,
    top_k=tokens,
    top_p=numbers,
    min_p=numbers,
    seed=st.integers(0, 2**32 - 1),
    repeat_penalty=numbers,
    repeat_last_n=st.integers(0, 2**31),
    presence_penalty=numbers,
    frequency_penalty=numbers,
    logit_bias=st.lists(st.tuples(tokens, numbers), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
)
requests = st.builds(
    GenerateRequest,
    id=text,
    model=text,
    prompt=st.lists(tokens, max_size=50).map(tuple),
    max_tokens=tokens,
    sampling=sampling,
    stop=st.lists(text, max_size=3).map(tuple),
    generated=st.lists(tokens, max_size=10).map(tuple),
    cache_salt=text,
    deadline_s=st.none() | numbers,
)
sampled = st.builds(Token, tokens, st.none() | numbers, st.lists(st.tuples(tokens, numbers), max_size=3).map(tuple))
token_parts = st.builds(
    TokenPart,
    tokens=st.lists(sampled, max_size=3).map(tuple),
    finish=st.sampled_from([None, "stop", "length"]),
    cached_tokens=st.integers(0, 2**31),
    tier=text,
    bad_blocks=st.booleans(),
    queue_s=numbers,
    prefill_s=numbers,
    fetch_s=numbers,
)
passed = st.lists(st.lists(sampled, max_size=2).map(tuple), max_size=4).map(tuple)
token_outs = st.builds(TokenOut, ids, token_parts)
blocks = st.builds(BlockRef, slot=ids, digest=st.binary(max_size=32))
stats = st.builds(
    EngineStats,
    slots=ids,
    slots_busy=ids,
    waiting=ids,
    prefill_tps=numbers,
    decode_tps=numbers,
    calls=ids,
)
options = st.builds(
    engine.EngineOptions,
    model_path=text,
    ctx_size=ids,
    slots=ids,
    threads=ids,
    use_extra_bufts=st.booleans(),
    q8_kernel=st.booleans(),
    attention_kernel=st.booleans(),
    prefill_chunk_tokens=ids,
    prefill_budget_s=numbers,
    continuous_batching=st.booleans(),
    batched_prefill_forward=st.booleans(),
)
rows = st.lists(ids, max_size=3).map(tuple)
run_parts = st.builds(engine.RunPart, ids, ids, ids, ids)
guess_parts = st.builds(engine.GuessPart, ids, ids, st.lists(tokens, max_size=4).map(tuple), ids, st.none() | requests)
encodings = st.sampled_from(["f32", "q8_0"])
layouts = st.builds(KvLayout, magic=ids, n_stream=ids, k_type=ids, v_type=ids, k_rows=rows, v_rows=rows)
by_class: dict[type, st.SearchStrategy[Any]] = {
    engine.Load: st.builds(engine.Load, options),
    Submit: st.builds(Submit, ids, requests, st.lists(blocks, max_size=3).map(tuple)),
    engine.UseArena: st.builds(engine.UseArena, text, ids, ids),
    engine.Forget: st.builds(engine.Forget),
    engine.StoreBlocks: st.builds(engine.StoreBlocks, ids, st.lists(st.tuples(ids, ids), max_size=3).map(tuple)),
    Cancel: st.builds(Cancel, ids),
    engine.Place: st.builds(engine.Place, ids, ids, st.lists(blocks, max_size=3).map(tuple), st.none() | requests),
    engine.Run: st.builds(engine.Run, ids, st.lists(run_parts, max_size=4).map(tuple), encodings, encodings),
    engine.Guess: st.builds(engine.Guess, st.lists(guess_parts, max_size=3).map(tuple)),
    Stop: st.builds(Stop),
    engine.LoadProgress: st.builds(engine.LoadProgress, numbers),
    engine.Ready: st.builds(engine.Ready, ids, ids, ids, ids, st.none() | layouts, text),
    engine.BlocksFull: st.builds(engine.BlocksFull, ids, text, st.lists(tokens, max_size=9).map(tuple), ids),
    engine.BlocksStored: st.builds(
        engine.BlocksStored, ids, st.lists(st.tuples(ids, st.binary(max_size=32)), max_size=3).map(tuple)
    ),
    engine.Placed: st.builds(engine.Placed, ids, ids, ids, st.booleans(), text, text),
    engine.Ran: st.builds(
        engine.Ran,
        ids,
        passed,
        numbers,
        st.booleans(),
        text,
        text,
    ),
    engine.Guessed: st.builds(
        engine.Guessed, st.lists(st.none() | st.lists(tokens, max_size=4).map(tuple), max_size=3).map(tuple)
    ),
    Fault: st.builds(Fault, text, text),
    engine.StepOut: st.builds(
        engine.StepOut,
        st.lists(token_outs, max_size=4).map(tuple),
        stats,
        st.lists(st.builds(Refused, ids, text, text), max_size=2).map(tuple),
    ),
}
messages = st.one_of(*by_class.values())


def test_every_message_has_a_strategy_here() -> None:
    assert isinstance(Message, types.UnionType)
    assert set(get_args(Message)) == set(by_class)


@given(messages)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    frame = encode(message)
    assert frame[0] == VERSION
    assert decode(frame) == message


@given(messages, st.data())
def test_a_part_of_a_message_is_none(message: Message, data: st.DataObject) -> None:
    frame = encode(message)
    for cut in (frame[: data.draw(st.integers(0, len(frame) - 1))], frame + b"\xc0"):
        with pytest.raises(WireError):
            decode(cut)


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error(junk: bytes) -> None:
    for frame in (junk, bytes((VERSION,)) + junk):
        with pytest.raises(WireError):
            decode(frame)


@given(messages, st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        damaged = decode(bytes(frame))
    except WireError as error:
        assert "\n" not in str(error)
    else:
        assert type(damaged) in by_class


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x91" * 100_000,
        b"\x81\xa1x" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x82\xa4type\xa5fault\xa4code\xa1\xff",
        b"\x81\xa4type\xa1\xff",
        b"\x81\xa4type\xa7unknown",
        b"\x82\xa4type\xa6cancel\xa6serial\xa1x",
    ],
)
def test_hostile_frames(body: bytes) -> None:
    with pytest.raises(WireError):
        decode(bytes((VERSION,)) + body)


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
def test_another_version_says_so(version: int) -> None:
    frame = bytes((version,)) + encode(Stop())[1:]
    with pytest.raises(WireError, match=f"protocol version {version} where {VERSION} is spoken"):
        decode(frame)


def test_frames_over_the_limit_go_neither_out_nor_in() -> None:
    with pytest.raises(WireError, match=f"exceeds the limit of {MAX_FRAME}"):
        encode(Fault("x", "y" * MAX_FRAME))
    with pytest.raises(WireError, match=f"outside 1..{MAX_FRAME}"):
        decode(bytes((VERSION,)) + b"\x00" * MAX_FRAME)
    with pytest.raises(WireError):
        decode(b"")


def test_the_largest_message_fits() -> None:
    overhead = len(encode(Fault("x", "y" * 70_000))) - 70_000
    frame = encode(Fault("x", "y" * (MAX_FRAME - overhead)))
    assert len(frame) == MAX_FRAME
    assert isinstance(decode(frame), Fault)


@pytest.mark.parametrize("message", [Fault("x", "\ud800"), Cancel(2**64)])
def test_what_msgpack_cannot_carry_is_a_wire_error(message: Message) -> None:
    with pytest.raises(WireError, match=f"cannot encode a {type(message).__name__} message"):
        encode(message)


@given(messages)
def test_unknown_fields_of_a_newer_peer_are_ignored(message: Message) -> None:
    fields = msgspec.msgpack.decode(encode(message)[1:])
    newer = {**fields, "added_later": [1, {"a": 2}]}
    if "stats" in fields:
        newer["stats"] = {**fields["stats"], "more": 1}
        newer["tokens"] = [
            [serial, [[[*token, "more"] for token in tokens], *told, "more"], "more"]
            for serial, (tokens, *told) in fields["tokens"]
        ]
    if fields.get("request"):
        newer["request"] = {**fields["request"], "more": None}
    assert decode(bytes((VERSION,)) + msgspec.msgpack.encode(newer)) == message


def test_a_stage_is_not_told_what_only_a_whole_model_can_do() -> None:
    how = engine.EngineOptions(
        model_path="m.gguf",
        ctx_size=1,
        slots=1,
        threads=1,
        use_extra_bufts=False,
        q8_kernel=False,
        attention_kernel=False,
        prefill_chunk_tokens=64,
        prefill_budget_s=1.0,
        stage=True,
    )
    frame = encode(engine.Load(how))
    assert b"stage" in frame and b"batch" not in frame
    assert decode(frame) == engine.Load(how)


def test_missing_fields_of_an_older_peer_have_their_defaults() -> None:
    step = engine.StepOut((TokenOut(1, part_of((2,))),), EngineStats(1, 0, 0))
    fields = msgspec.msgpack.decode(encode(step)[1:])
    del fields["refused"]
    fields["tokens"] = [[1, [[[2]]]]]
    assert decode(bytes((VERSION,)) + msgspec.msgpack.encode(fields)) == step
