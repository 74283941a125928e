"""Trust in peers: what raises and sinks it, what time heals, and what a file may do to it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.swarm.trust import MAX_FILE, MAX_PEERS, MAX_WHY, START, TrustBook

HOUR = 3600.0
DAY = 24 * HOUR
A, B, C = "a" * 16, "b" * 16, "c" * 16


@dataclass(slots=True)
class Hand:
    """A clock that stands still."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def book(clock: Hand) -> TrustBook:
    return TrustBook(None, clock)


def test_a_stranger_is_trusted_a_little_more_than_half_and_not_remembered(book: TrustBook) -> None:
    assert book.score(A) == START
    assert book.trusted(A, 0.5)
    assert not book.trusted(A, 0.7)
    assert book.snapshot() == ()


def test_one_late_answer_excludes_nobody_and_many_do(book: TrustBook) -> None:
    book.late(A)
    assert 0.5 <= book.score(A) < START
    for _ in range(3):
        book.late(A)
    assert not book.trusted(A, 0.5)
    assert book.trusted(B, 0.5)


def test_good_answers_make_up_for_late_ones(book: TrustBook) -> None:
    for _ in range(3):
        book.late(A)
    for _ in range(100):
        book.ok(A)
    assert book.score(A) > 0.9


def test_one_wrong_answer_undoes_all_good_ones_and_good_ones_do_not_undo_it(
    book: TrustBook, clock: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(1000):
        book.ok(A)
    book.wrong(A, "a block's digest does not match")
    assert book.score(A) == 0.0
    for _ in range(1000):
        book.ok(A)
        book.wrong(A, "again")
    assert book.score(A) == 0.0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert A in caplog.text
    clock.now += DAY
    for _ in range(1000):
        book.ok(A)
    assert book.score(A) < 0.1


def test_time_heals_late_answers_in_hours_and_wrong_ones_in_a_week(book: TrustBook, clock: Hand) -> None:
    for _ in range(4):
        book.late(A)
    book.wrong(B, "NaN")
    clock.now += 2 * HOUR
    assert book.score(A) == START
    assert book.score(B) < 0.01
    clock.now += 5 * DAY
    assert not book.trusted(B, 0.5)
    clock.now += 30 * DAY
    assert (book.score(A), book.score(B)) == (START, START)
    assert all(not each.why for each in book.snapshot())
    book.ok(B)
    assert book.score(B) > START


def test_nobody_reaches_a_minimum_above_one(book: TrustBook) -> None:
    for _ in range(10_000):
        book.ok(A)
    assert book.score(A) <= 1.0
    assert not book.trusted(A, 2.0)


def test_checks_grow_rare_with_trust_and_never_end(book: TrustBook) -> None:
    assert book.spot_check_probability(A) == pytest.approx(0.5)
    last = 0.5
    for _ in range(2000):
        book.ok(A)
        now = book.spot_check_probability(A)
        assert 0.02 <= now <= last
        last = now
    assert last == pytest.approx(0.02)
    book.wrong(A, "NaN")
    assert book.spot_check_probability(A) == 1.0


EVENTS = st.lists(st.tuples(st.sampled_from("olwt"), st.floats(0.0, 1e9)), max_size=40)


@given(EVENTS)
def test_scores_stay_in_bounds_and_move_the_right_way(events: list[tuple[str, float]]) -> None:
    clock = Hand()
    book = TrustBook(None, clock)
    for kind, seconds in events:
        before = book.score(A)
        if kind == "o":
            book.ok(A)
            assert book.score(A) >= before
        elif kind == "l":
            book.late(A)
            assert max(0.0, before - 0.1) <= book.score(A) <= before
        elif kind == "w":
            book.wrong(A, "x")
            assert book.score(A) < 0.5
        else:
            clock.now += seconds
            assert book.score(A) >= before
        assert 0.0 <= book.score(A) <= 1.0
        assert 0.02 <= book.spot_check_probability(A) <= 1.0


@given(st.lists(st.sampled_from("olw"), max_size=30), st.integers(0, 30), st.sampled_from("lw"))
def test_a_worse_history_never_ends_better(events: list[str], at: int, worse: str) -> None:
    book = TrustBook(None, Hand())
    act = {"o": book.ok, "l": book.late, "w": lambda peer: book.wrong(peer, "x")}
    for kind in events:
        act[kind](A)
    for kind in (*events[:at], worse, *events[at:]):
        act[kind](B)
    assert book.score(B) <= book.score(A)


def test_new_names_do_not_wash_away_what_was_wrong(book: TrustBook) -> None:
    book.wrong(A, "NaN")
    for number in range(3 * MAX_PEERS):
        book.ok(f"{number:016x}")
    assert len(book.snapshot()) == MAX_PEERS
    assert book.snapshot()[0].peer == A
    assert book.score(A) == 0.0


# -- memory ----------------------------------------------------------------------------------------------------------


def test_scores_outlive_the_node(tmp_path: Path, clock: Hand) -> None:
    path = tmp_path / "new" / "trust.json"
    book = TrustBook(path, clock)
    book.ok(A)
    book.late(B)
    book.wrong(C, "w" * 5000)
    book.save()
    # A boot: the clock starts anew, and time in which no node ran heals nothing.
    again = TrustBook(path, Hand(5.0))
    assert [(each.peer, each.why) for each in again.snapshot()] == [(C, "w" * MAX_WHY), (B, ""), (A, "")]
    for peer in (A, B, C):
        assert again.score(peer) == pytest.approx(book.score(peer), abs=1e-4)
    again.ok(C)
    assert again.score(C) == 0.0
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_healing_outlives_the_node_too(tmp_path: Path, clock: Hand) -> None:
    path = tmp_path / "trust.json"
    for _ in range(8):
        book = TrustBook(path, clock)
        if not book.snapshot():
            book.wrong(A, "NaN")
        clock.now += DAY
        book.save()
    assert TrustBook(path, clock).trusted(A, 0.5)


def test_what_has_not_changed_is_not_written(tmp_path: Path, book: TrustBook, clock: Hand) -> None:
    book.ok(A)
    book.save()
    path = tmp_path / "trust.json"
    book = TrustBook(path, clock)
    book.ok(A)
    book.save()
    path.unlink()
    book.save()
    assert not path.exists()
    book.late(A)
    book.save()
    assert path.exists()


DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[1, 2]",
    b"[" * 100_000,
    b'{"peers": 7}',
    b'{"peers": {"zz": {"score": 0.1, "why": ""}}}',
    json.dumps({"peers": {A: 0.3, B: {"score": "high", "why": ""}, C: {"score": 0.3}}}).encode(),
    b'{"peers": {"%s": {"score": NaN, "why": ""}}}' % A.encode(),
    b'{"peers": {"%s": {"score": 0.9, "why": ""}}}' % A.encode() + b" " * MAX_FILE + b"x" * 10,
]


@pytest.mark.parametrize("content", DAMAGED[:-1])
def test_a_damaged_file_costs_one_line(
    tmp_path: Path, clock: Hand, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(content)
    book = TrustBook(path, clock)
    assert book.snapshot() == ()
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    book.ok(A)
    book.save()
    assert TrustBook(path, clock).score(A) > START


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path, clock: Hand) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(DAMAGED[-1])
    TrustBook(path, clock)
    many = {f"{number:016x}": {"score": 0.9, "why": ""} for number in range(MAX_PEERS + 100)}
    path.write_text(json.dumps({"peers": many}))
    assert len(TrustBook(path, clock).snapshot()) == MAX_PEERS


def test_values_beyond_their_bounds_are_clamped(tmp_path: Path, clock: Hand) -> None:
    path = tmp_path / "trust.json"
    records = {A: {"score": float("inf"), "why": ""}, B: {"score": -(10**400), "why": "x"}}
    path.write_text(json.dumps({"peers": records}))
    book = TrustBook(path, clock)
    assert (book.score(A), book.score(B)) == (1.0, 0.0)


def test_a_file_that_cannot_be_written_costs_one_line(
    tmp_path: Path, clock: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    book = TrustBook(tmp_path / "file" / "trust.json", clock)
    caplog.clear()
    for _ in range(3):
        book.ok(A)
        book.save()
    assert len(caplog.records) == 1
