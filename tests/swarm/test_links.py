"""What is known of links, and what is assumed where nothing is."""

from __future__ import annotations

import math

import pytest
from block_peers import Peer, SteppedClock, make_server
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.peers import ObservedLatency
from swarmcpp.swarm.links import (
    EXPIRY_S,
    MAX_PEERS,
    PROBE_BYTES,
    RETRY_S,
    UNKNOWN_BYTES_PER_S,
    UNKNOWN_LINK_RTT_S,
    LinkBook,
    probe,
)


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def book(clock: SteppedClock) -> LinkBook:
    return LinkBook(clock)


def test_unknown_is_slow_and_never_free(book: LinkBook) -> None:
    assert book.rtt_s("a") == UNKNOWN_LINK_RTT_S
    assert book.bytes_per_s("a") == book.own_bytes_per_s() == UNKNOWN_BYTES_PER_S
    assert book.wants_rate("a") and book.observed() == ()


def test_the_smallest_round_trip_counts_and_rates_add_by_time(book: LinkBook) -> None:
    for rtt in (0.02, 0.005, 0.3):
        book.add_rtt("a", rtt)
    book.add_transfer("a", 1_000_000, 0.1)
    book.add_transfer("a", 1_000_000, 0.9)
    assert book.rtt_s("a") == 0.005
    assert book.bytes_per_s("a") == pytest.approx(2e6)
    assert book.observed() == (ObservedLatency("a", 0.005, pytest.approx(2e6)),)


def test_everything_expires(book: LinkBook, clock: SteppedClock) -> None:
    book.add_rtt("a", 0.01)
    book.add_transfer("a", 1_000_000, 0.01)
    book.add_total(10_000_000, 0.01)
    assert book.own_bytes_per_s() == 1e9
    clock.now += EXPIRY_S + 1
    assert (book.rtt_s("a"), book.bytes_per_s("a")) == (UNKNOWN_LINK_RTT_S, UNKNOWN_BYTES_PER_S)
    assert book.observed() == () and book.own_bytes_per_s() == UNKNOWN_BYTES_PER_S


def test_nearest_first_and_bounded(book: LinkBook) -> None:
    for i in range(MAX_PEERS + 10):
        book.add_rtt(f"{i:05}", 1 / (i + 1))
    assert len(book.observed(10 * MAX_PEERS)) == MAX_PEERS
    nearest = book.observed()
    assert len(nearest) == 32 and nearest[0].peer == f"{MAX_PEERS + 9:05}"
    book.forget(nearest[0].peer)
    assert book.observed(1)[0] == nearest[1]


@given(st.lists(st.tuples(st.integers(-5, 1 << 40), st.floats(allow_nan=True)), max_size=20))
def test_prices_are_always_usable(samples: list[tuple[int, float]]) -> None:
    book = LinkBook(SteppedClock())
    for n_bytes, seconds in samples:
        book.add_rtt("a", seconds)
        book.add_transfer("a", n_bytes, seconds)
        book.add_total(n_bytes, seconds)
        assert book.bytes_per_s("a") > 0 and math.isfinite(book.bytes_per_s("a"))
        assert 0 < book.own_bytes_per_s() < math.inf
        assert math.isfinite(book.rtt_s("a")) and book.rtt_s("a") >= 0


async def test_a_probe_measures_once_and_again_when_the_link_looked_bad(book: LinkBook, clock: SteppedClock) -> None:
    peer = Peer(make_server(clock, 0), clock, bytes_per_s=10e6)
    assert await probe(book, "a", peer)
    assert book.rtt_s("a") == pytest.approx(0.001)
    assert book.bytes_per_s("a") == pytest.approx(10e6, rel=0.01)
    begun = clock.now
    assert await probe(book, "a", peer)
    assert clock.now - begun == pytest.approx(0.001), "a known rate is not measured again"
    book.add_transfer("a", 0, 10.0)
    clock.now += RETRY_S + 1
    assert await probe(book, "a", peer)
    assert book.bytes_per_s("a") == pytest.approx(10e6, rel=0.01)


async def test_a_peer_that_does_not_answer_stays_unknown(book: LinkBook, clock: SteppedClock) -> None:
    peer = Peer(make_server(clock, 0), clock, bytes_per_s=PROBE_BYTES / 1000, silent=True)
    assert not await probe(book, "a", peer)
    assert book.bytes_per_s("a") == UNKNOWN_BYTES_PER_S
