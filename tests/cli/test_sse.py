"""Server-sent events: the parser sees the same events however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.commands.sse import MAX_EVENT_BYTES, SseParser
from swarmcpp.errors import WireError

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))


@given(
    st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(1, 7), min_size=1),
)
def test_events_survive_any_cut(events: list[list[str]], newline: str, sizes: list[int]) -> None:
    text = "".join(f": hello{newline}event: x{newline}" + "".join(f"data: {line}{newline}" for line in lines) + newline
                   for lines in events)  # fmt: skip
    data, parser, found, at, turn = text.encode(), SseParser(), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        found += parser.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert found == ["\n".join(lines) for lines in events]


def test_the_standards_small_print() -> None:
    parser = SseParser()
    assert parser.feed(b"data:a\n\ndata: b\n\ndata\n\n\n\nid: 7\n\n") == ["a", "b", ""]
    assert parser.feed(b"data: \xff\n\n") == ["\ufffd"]
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\r\n") == ["a"]


@given(st.lists(st.binary()))
def test_no_bytes_break_it(chunks: list[bytes]) -> None:
    parser = SseParser()
    for chunk in chunks:
        parser.feed(chunk)


@pytest.mark.parametrize("unit", [b"x" * 1000, b"data: " + b"x" * 1000 + b"\n"])
def test_an_endless_event_is_refused(unit: bytes) -> None:
    parser = SseParser()
    with pytest.raises(WireError, match="more than"):
        for _ in range(2 * MAX_EVENT_BYTES // 1000):
            parser.feed(unit)
