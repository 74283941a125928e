"""DIAG lines, log levels and moving averages."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from swarmcpp.telemetry import ConsoleHandler, RateEma, diag, diag_line, setup_logging


@pytest.fixture
def console() -> Iterator[Console]:
    """A narrow console whose text a test can read; the log is set back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("swarmcpp")
    before = (list(root.handlers), root.level, ours.level)
    yield Console(file=io.StringIO(), width=40)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_levels(console: Console) -> None:
    ours, theirs = logging.getLogger("swarmcpp.node.node"), logging.getLogger("aiohttp.access")
    for verbosity, count in ((0, 2), (1, 3), (2, 4), (7, 4), (-1, 2)):
        setup_logging(verbosity, console)
        before = len(lines(console))
        ours.warning("something is wrong")
        ours.info("something happens")
        ours.debug("something small")
        theirs.warning("theirs")
        theirs.info("theirs, small")
        assert len(lines(console)) - before == count
    assert sum(isinstance(each, ConsoleHandler) for each in logging.getLogger().handlers) == 1


def test_a_diag_line_is_one_line_however_long(console: Console) -> None:
    setup_logging(2, console)
    diag(logging.getLogger("swarmcpp.engine"), "step", rows=9, note="[bold]two\nlines " * 20)
    assert len(lines(console)) == 1
    assert "DIAG: step rows=9 note=" in lines(console)[0] and "[bold]" in lines(console)[0]


def test_diag_values() -> None:
    line = diag_line(
        "step", {"n": 3, "s": 0.1 + 0.2, "ok": True, "x": None, "path": "/a/b", "text": 'a "b" c', "e": ""}
    )
    assert line == 'DIAG: step n=3 s=0.3 ok=true x=- path=/a/b text="a \\"b\\" c" e=""'


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text()))
def test_a_diag_line_can_be_read_back(fields: dict[str, str]) -> None:
    line = diag_line("event", dict(fields))
    assert len(line.splitlines()) == 1
    rest, found = line.removeprefix("DIAG: event"), {}
    while rest:
        key, _, rest = rest.removeprefix(" ").partition("=")
        if rest.startswith('"'):
            found[key], end = json.JSONDecoder().raw_decode(rest)
        else:
            end = len(rest.split(" ")[0])
            found[key] = rest[:end]
        rest = rest[end:]
    assert found == fields


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_steady_rate_is_that_rate() -> None:
    clock = Clock()
    ema = RateEma(half_life_s=10, expiry_s=600, clock=clock)
    assert ema.rate() is None
    for _ in range(50):
        clock.now += 1
        ema.add(20, 0.5)
    assert ema.rate() == pytest.approx(40)


def test_a_change_is_half_seen_after_a_half_life_of_work() -> None:
    clock = Clock()
    ema = RateEma(half_life_s=100, expiry_s=6000, clock=clock)
    for rate, seconds in ((10, 5000), (30, 100)):
        for _ in range(seconds):
            clock.now += 1
            ema.add(rate, 1)
    assert ema.rate() == pytest.approx(20, rel=0.01)


def test_one_long_sample_weighs_as_many_short_ones() -> None:
    clock = Clock()
    ema = RateEma(half_life_s=10, expiry_s=600, clock=clock)
    ema.add(100, 1)
    for _ in range(10):
        ema.add(1, 0.1)
    assert ema.rate() == pytest.approx((100 + 10) / 2)


def test_expiry() -> None:
    clock = Clock()
    ema = RateEma(half_life_s=10, expiry_s=600, clock=clock)
    ema.add(5, 1)
    clock.now = 600
    assert ema.rate() == 5
    clock.now = 600.1
    assert ema.rate() is None
    ema.add(7, 1)
    assert ema.rate() == 7


def test_samples_without_time_are_dropped() -> None:
    ema = RateEma(half_life_s=10, expiry_s=600, clock=Clock())
    ema.add(5, 0)
    ema.add(-1, 1)
    assert ema.rate() is None
    with pytest.raises(ValueError, match="half_life_s"):
        RateEma(half_life_s=0, expiry_s=1, clock=Clock())
