"""Text as it streams, against an oracle that looks at whole prefixes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.llama.text import TextStream

# Few letters of one to four bytes, so that stop strings meet, overlap and span pieces.
texts = st.text(alphabet="abé日🦙", max_size=40)
stops = st.lists(st.text(alphabet="abé日🦙", min_size=1, max_size=5), max_size=4)


@st.composite
def split(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes in pieces, cut anywhere, some empty, as control tokens are."""
    data = draw(source)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=len(data) + 2)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def stream(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[list[str], bool]:
    """What each piece and the end release, and whether a stop string was completed."""
    text = TextStream(lambda token: pieces[token], stop)
    parts = [text.feed(token) for token in range(len(pieces))]
    parts.append(text.finish())
    return parts, text.stopped


def oracle(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string.

    "First" is the earliest completed: after the first piece whose whole prefix of the text holds any stop string, the
    text ends where the leftmost of them begins.
    """
    for count in range(1, len(pieces) + 1):
        known = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces[:count]))
        found = [known.index(one) for one in stop if one in known]
        if found:
            return known[: min(found)], True
    known = b"".join(pieces).decode("utf-8", "replace")
    found = [known.index(one) for one in stop if one in known]
    return (known[: min(found)], True) if found else (known, False)


@given(split(texts.map(str.encode)), stops)
def test_text_ends_before_the_first_stop_string(pieces: list[bytes], stop: list[str]) -> None:
    parts, stopped = stream(pieces, stop)
    assert ("".join(parts), stopped) == oracle(pieces, stop)


@given(split(texts.map(str.encode)))
def test_without_stop_strings_text_comes_as_early_as_it_can(pieces: list[bytes]) -> None:
    parts, _ = stream(pieces, ())
    for count in range(len(pieces)):
        so_far = b"".join(pieces[: count + 1])
        assert "".join(parts[: count + 1]) == so_far.decode("utf-8", "ignore")


@given(split(st.one_of(st.binary(max_size=30), texts.map(str.encode))), st.one_of(stops, st.just(["\ufffd"])))
def test_any_bytes_become_text(pieces: list[bytes], stop: list[str]) -> None:
    parts, stopped = stream(pieces, stop)
    assert ("".join(parts), stopped) == oracle(pieces, stop)


@given(split(texts.map(str.encode)), stops)
def test_nothing_that_was_released_is_taken_back(pieces: list[bytes], stop: list[str]) -> None:
    """Text that is out is final, so at no moment may it hold a stop string."""
    parts, _ = stream(pieces, stop)
    for count in range(len(parts) + 1):
        assert not any(one in "".join(parts[:count]) for one in stop)


@given(split(st.binary(max_size=30)), stops, st.integers(0, 30))
def test_a_replay_gives_the_same_text(pieces: list[bytes], stop: list[str], at: int) -> None:
    """A request that moves to another engine after `at` tokens feeds them again, into a new stream."""
    whole, _ = stream(pieces, stop)
    again = TextStream(lambda token: pieces[token], stop)
    assert [again.feed(token) for token in range(min(at, len(pieces)))] == whole[: min(at, len(pieces))]


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hello", " wor", "ld"], ["wo"], ["Hello", " ", "", ""]),
        (["a", "b", "c"], ["abd"], ["", "", "abc", ""]),
        (["aa", "ab"], ["aab"], ["", "a", ""]),
        (["x", "END", "more"], ["END"], ["x", "", "", ""]),
        # "bc" is complete before "abcd" can be.
        (["a", "b", "c", "d"], ["abcd", "bc"], ["", "", "a", "", ""]),
        (["abcd"], ["abcd", "bc"], ["", ""]),
        (["tail"], ["ils"], ["ta", "il"]),
    ],
)
def test_examples(pieces: list[str], stop: list[str], expected: list[str]) -> None:
    assert stream([piece.encode() for piece in pieces], stop)[0] == expected


def test_characters_are_never_halved() -> None:
    pieces = [bytes([byte]) for byte in "é🦙".encode()]
    assert stream(pieces, ())[0] == ["", "é", "", "", "", "🦙", ""]


def test_what_is_no_utf8_becomes_replacement_characters() -> None:
    assert stream([b"a\xff", b"\xc3", b"b", b"\xf0\x9f"], ())[0] == ["a\ufffd", "", "\ufffdb", "", "\ufffd"]
