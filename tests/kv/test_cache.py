"""The prefix cache of a node: leases, grants, and what happens when an engine lies or dies."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from kv.blocks_on_disk import BLOCK_BYTES, BLOCK_TOKENS, IDENTITY, Rig, chain, open_arena, open_rig

from swarmcpp.core import BlockFile
from swarmcpp.kv.cache import PrefixCache

A, B, C = chain(1, 3), chain(2, 4), chain(3, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with closing(open_rig(tmp_path)) as rig:
        yield rig
        rig.cache.check_integrity()


def usable(rig: Rig, *chains: tuple[int, ...]) -> list[int]:
    return [rig.recall(tokens) for tokens in chains]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_what_was_stored_is_leased_up_to_the_last_token(rig: Rig) -> None:
    assert rig.store(A) == 3
    assert len(rig.cache.lease(A, "").refs) == 2, "the last token is always computed"
    assert len(rig.cache.lease((*A, 5), "").refs) == 3
    assert len(rig.cache.lease((*A[:9], 5), "").refs) == 2
    assert len(rig.cache.lease((5, *A), "").refs) == 0
    for tokens in ((), (1,), A[:4]):
        assert rig.cache.lease(tokens, "").refs == ()


def test_salts_share_nothing(rig: Rig) -> None:
    rig.store(A, salt="one")
    assert rig.recall(A, salt="one") == 3
    assert [rig.recall(A, salt=salt) for salt in ("", "two", "one ")] == [0, 0, 0]
    rig.store(A, salt="two")
    assert rig.cache.stats().blocks == 6


def test_storing_twice_stores_once(rig: Rig) -> None:
    assert rig.store(A) == 3
    assert rig.cache.grant(A, "").grants == ()
    assert rig.store(A + B) == 4
    assert rig.cache.stats().stored == 7


def test_leased_blocks_stay_where_they_are(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 8)) as rig:
        rig.store(A)
        lease = rig.cache.lease((*A, 0), "")
        for name in range(10, 30):
            rig.store(chain(name, 4))
            assert rig.sound(lease) == 3
        rig.cache.release(lease)
        rig.cache.release(lease)
        for name in range(30, 60):
            rig.store(chain(name, 4))
        assert rig.recall(A) == 0
        rig.cache.check_integrity()


def test_a_chain_longer_than_the_arena_is_stored_as_far_as_it_fits(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 8)) as rig:
        rig.store(A)
        assert rig.store(chain(9, 20)) == 8
        assert rig.recall(chain(9, 20)) == 8
        rig.cache.check_integrity()


def test_max_entries_bounds_the_chains(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, max_entries=1)) as rig:
        for tokens in (A, B, C):
            rig.store(tokens)
        assert usable(rig, A, B, C) == [0, 0, 2]
        assert rig.store((*C, *range(8))) == 2
        assert rig.store((*C, *range(50, 58))) == 2, "another turn of the same conversation"
        assert rig.recall((*C, *range(50, 58))) == 4
        rig.cache.check_integrity()


# -- writing ---------------------------------------------------------------------------------------------------------


def test_blocks_are_found_only_once_they_are_entered(rig: Rig) -> None:
    grant = rig.cache.grant(A, "")
    assert [number for number, _ in grant.grants] == [0, 1, 2]
    written = rig.payloads(A, grant)
    assert rig.recall(A) == 0
    assert rig.cache.enter(grant, written) == 3
    assert rig.recall(A) == 3


def test_what_was_not_written_is_given_back(rig: Rig) -> None:
    grant = rig.cache.grant(B, "")
    written = rig.payloads(B, grant)
    assert rig.cache.enter(grant, written[:2]) == 2
    assert rig.recall(B) == 2
    assert rig.store(B) == 2


def test_a_hole_takes_what_follows_along(rig: Rig) -> None:
    grant = rig.cache.grant(B, "")
    written = rig.payloads(B, grant)
    assert rig.cache.enter(grant, [written[0], *written[2:]]) == 1
    assert rig.recall(B) == 1
    assert rig.cache.stats().blocks == 1


def test_an_engine_that_writes_what_it_was_not_granted_is_not_heard(rig: Rig) -> None:
    rig.store(A)
    grant = rig.cache.grant(C, "")
    slots = {slot for _, slot in grant.grants}
    other = next(slot for slot in range(16) if slot not in slots)
    assert rig.cache.enter(grant, [(other, bytes(32)), (10**6, bytes(32))]) == 0
    assert rig.cache.stats().blocks == 3


def test_an_engine_that_dies_gives_all_slots_back(rig: Rig) -> None:
    first = rig.cache.grant(A, "")
    # The second continues what the first has not stored yet.
    second = rig.cache.grant(A + C, "")
    assert [number for number, _ in second.grants] == [3, 4]
    assert rig.cache.enter(first, ()) == 0
    rig.cache.check_integrity()
    assert rig.cache.enter(second, ()) == 0
    assert rig.cache.stats().blocks == 0
    assert rig.store(chain(7, 16)) == 16


def test_late_words_about_a_block_that_is_gone_change_nothing(rig: Rig) -> None:
    first = rig.cache.grant(A, "")
    second = rig.cache.grant(A + C, "")
    written = rig.payloads(A + C, second)
    rig.cache.enter(first, ())
    third = rig.cache.grant(B, "")
    assert rig.cache.enter(second, written) == 0
    assert rig.cache.enter(third, rig.payloads(B, third)) == 4
    assert usable(rig, A, A + C, B) == [0, 0, 4]


def test_eviction_makes_room_and_the_old_entry_is_gone_from_the_file(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 4)) as rig:
        rig.store(B)
        grant = rig.cache.grant(A, "")
        rig.payloads(A, grant)
    # A node that dies here left new payloads under no entry.
    with closing(open_rig(tmp_path, None)) as rig:
        assert usable(rig, A, B) == [0, 1]


# -- bad blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_bad_block_is_dropped_with_its_continuations(rig: Rig, bad: int, caplog: pytest.LogCaptureFixture) -> None:
    rig.store(B)
    rig.store((*B[:12], *C))
    lease = rig.cache.lease((*B, 0), "")
    rig.file.write(lease.refs[bad].slot, memoryview(bytes(BLOCK_BYTES)))
    assert rig.recall(B) == bad
    assert rig.cache.stats().bad == 1
    assert rig.recall((*B[:12], *C)) == (5 if bad == 3 else bad)
    rig.cache.release(lease)
    assert len(caplog.records) == 1
    assert rig.store(B) == 4 - bad
    assert rig.recall(B) == 4


def test_two_requests_that_meet_the_same_bad_block_report_it_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.store(B)
    first, second = (rig.cache.lease((*B, 0), "") for _ in range(2))
    rig.file.write(first.refs[1].slot, memoryview(bytes(BLOCK_BYTES)))
    for lease in (first, second):
        rig.cache.release(lease, rig.sound(lease) * BLOCK_TOKENS)
    assert (rig.cache.stats().bad, len(caplog.records)) == (1, 1)
    assert rig.store(B) == 3


def test_a_slot_that_is_written_anew_does_not_fool_an_older_lease(rig: Rig) -> None:
    rig.store(B)
    older = rig.cache.lease((*B, 0), "")
    assert rig.sound(older) == 4
    rig.cache.release(rig.cache.lease((*B, 0), ""), BLOCK_TOKENS)
    assert rig.store(chain(8, 15)) == 15
    assert rig.sound(older) <= 1
    rig.cache.release(older, 0)


def test_a_report_about_less_than_was_leased_by_a_slot_hit_is_no_complaint(rig: Rig) -> None:
    rig.store(B)
    rig.cache.release(rig.cache.lease((*B, 0), ""))
    assert rig.recall(B) == 4


@dataclass(slots=True)
class Impostor:
    """A BlockFile that gives other bytes than were asked for: a hash collision, as far as its readers can tell."""

    inner: BlockFile
    instead: dict[int, bytes] = field(default_factory=dict)

    def read_into(self, slot: int, target: memoryview) -> bool:
        if slot in self.instead:
            target[:] = self.instead[slot]
            return True
        return self.inner.read_into(slot, target)

    def write(self, slot: int, payload: memoryview) -> bool:
        return self.inner.write(slot, payload)


def test_other_bytes_under_a_right_key_are_a_miss(rig: Rig) -> None:
    rig.store(A)
    rig.store(B)
    lease = rig.cache.lease((*B, 0), "")
    rig.cache.release(lease)
    whole = bytearray(BLOCK_BYTES)
    rig.file.read_into(lease.refs[0].slot, memoryview(whole))
    impostor = Impostor(rig.file, {lease.refs[2].slot: bytes(whole)})
    liar = Rig(rig.cache, impostor)
    assert liar.recall(B) == 2
    assert liar.recall(B) == 2
    assert liar.recall(A) == 3


def test_a_key_that_two_chains_share_gives_the_first_ones_bytes_or_nothing(rig: Rig) -> None:
    """A collision of keys cannot be noticed: the entry is the first one's, and its digest holds."""
    rig.store(A)
    keys = rig.cache.keys(A, "")
    rig.cache.keys = lambda tokens, salt: keys[: len(tokens) // BLOCK_TOKENS]  # type: ignore[method-assign]
    assert rig.cache.grant(B[:12], "").grants == ()
    lease = rig.cache.lease(B[:12], "")
    assert rig.sound(lease) == 2


# -- restarts --------------------------------------------------------------------------------------------------------


def test_blocks_outlive_the_node_in_the_order_of_their_use(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 9)) as rig:
        for tokens in (A, B, C):
            rig.store(tokens)
        rig.recall(A)
    with closing(open_rig(tmp_path, None)) as rig:
        rig.store(chain(9, 4))
        assert rig.recall(A) == 3, "used last"
        assert rig.recall(B) + rig.recall(C) == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("sru"), st.integers(0, 3), st.integers(1, 6)), max_size=30), st.integers(0, 3)
)
def test_any_history_survives_a_restart(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, int]], max_entries: int
) -> None:
    directory = tmp_path_factory.mktemp("history")
    chains = [chain(name, 6) for name in range(4)]
    with closing(open_rig(directory, 10, max_entries=max_entries)) as rig:
        for action, name, count in history:
            tokens = chains[name][: count * BLOCK_TOKENS]
            if action == "s":
                rig.store(tokens)
            elif action == "u":
                rig.recall(tokens)
            else:
                rig.cache.enter(rig.cache.grant(tokens, ""), ())
            rig.cache.check_integrity()
        before = usable(rig, *chains)
        if max_entries:
            assert sum(map(bool, before)) <= max_entries
    with closing(open_rig(directory, None, max_entries=max_entries)) as rig:
        assert usable(rig, *chains) == before
        rig.cache.check_integrity()


# -- threads ---------------------------------------------------------------------------------------------------------


def test_threads_never_see_a_wrong_block(tmp_path: Path) -> None:
    """Four threads store and use overlapping chains in an arena that holds a quarter of them."""
    with closing(open_rig(tmp_path, 24, max_entries=6)) as rig:
        errors: list[BaseException] = []
        hits = [0] * 4

        def work(seed: int) -> None:
            draw = random.Random(seed)
            try:
                for _ in range(400):
                    name = draw.randrange(12)
                    tokens = (*chain(name // 3, 3), *chain(name, 5))[: BLOCK_TOKENS * draw.randint(1, 8)]
                    lease = rig.cache.lease(tokens, "")
                    # Leased blocks are not written again, so all of them are sound.
                    assert rig.sound(lease) == len(lease.refs)
                    hits[seed] += len(lease.refs)
                    rig.cache.release(lease, len(lease.refs) * BLOCK_TOKENS)
                    grant = rig.cache.grant(tokens, "")
                    written = rig.payloads(tokens, grant)
                    kept = len(written) if draw.random() < 0.8 else draw.randint(0, len(written))
                    rig.cache.enter(grant, written[:kept])
                    if draw.random() < 0.1:
                        rig.cache.check_integrity()
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert min(hits) > 0
        rig.cache.check_integrity()
        assert all(block.pins == 0 for block in rig.cache._index._blocks.values())
        # Nothing is pinned any more: one chain can take everything.
        assert rig.store(chain(99, 24)) == 24


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_table_that_cannot_be_written_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_rig(tmp_path)) as rig:
        rig.store(A)
        rig.cache._arena.close()
        assert [rig.store(tokens) for tokens in (B, C)] == [0, 0]
        rig.cache.check_integrity()
        assert rig.recall(A) == 3
    assert len(caplog.records) == 1


def test_numbers_of_a_fresh_cache(tmp_path: Path) -> None:
    arena = open_arena(tmp_path, 5)
    with closing(PrefixCache(arena, IDENTITY)) as cache:
        stats = cache.stats()
        assert (cache.path, cache.block_bytes, cache.n_blocks) == (arena.path, BLOCK_BYTES, 5)
        assert (stats.blocks, stats.capacity, stats.evictions, stats.stored, stats.bad) == (0, 5, 0, 0, 0)
        assert cache.in_place()


def test_the_diagnosis_tells_tokens_and_time(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        rig.store(A)
        rig.recall(B)
        rig.recall(A)
    text = caplog.text
    assert "prefix-cache insert" in text
    assert "prefix-cache MISS" in text
    assert "prefix-cache HIT" in text
    assert f"tokens={len(A)}" in text
    assert "ms=" in text


def test_an_evicted_slot_is_erased_before_it_is_written(tmp_path: Path) -> None:
    """Otherwise a crash in between leaves an old entry over new bytes; its digest would catch that, but so late."""
    with closing(open_rig(tmp_path, 2)) as rig:
        rig.store(C)
        digests = {blake3(rig.cache._arena.read(slot)).digest() for slot in range(2)}
        rig.cache.grant(chain(9, 2), "")
        assert {block.digest for block in rig.cache._arena.entries()} == set()
        assert len(digests) == 2
