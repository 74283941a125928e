"""Blocks of peers in the prefix cache: what comes in, what goes out, and what others are told of it."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from kv.blocks_on_disk import BLOCK_BYTES, BLOCK_TOKENS, Rig, chain, open_rig, payload_of

from swarmcpp.errors import SnapshotError
from swarmcpp.kv import arena as arena_module
from swarmcpp.kv.arena import Hashed
from swarmcpp.kv.cache import PIECE_VALUES, PrefixCache, relative_rms

A, B, C = chain(1, 3), chain(2, 4), chain(3, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with closing(open_rig(tmp_path)) as rig:
        yield rig
        rig.cache.check_integrity()
        assert all(block.pins == 0 for block in rig.cache._index._blocks.values())


def payloads(keys: Sequence[bytes]) -> list[Hashed]:
    return [Hashed.of(payload_of(key)) for key in keys]


def insert(
    cache: PrefixCache, tokens: Sequence[int], first: int = 0, *, exact: bool = True, count: int | None = None
) -> int:
    keys = cache.keys(tokens, "")
    stop = None if count is None else first + count
    return cache.insert(keys, first, payloads(keys[first:stop]), exact=exact)


class Mirror:
    """What a peer knows that hears every change."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.keys = set(cache.all_keys())
        self.calls: list[tuple[list[bytes], list[bytes]]] = []
        cache.on_change = self.hear

    def hear(self, added: list[bytes], dropped: list[bytes]) -> None:
        # From outside the lock, or this never returns.
        self.cache.stats()
        assert not self.keys.intersection(added), "told twice"
        assert self.keys.issuperset(dropped), "lost before it was there"
        self.keys |= set(added)
        self.keys -= set(dropped)
        self.calls.append((added, dropped))

    def check(self) -> None:
        keys = self.cache.all_keys()
        assert self.keys == set(keys)
        assert len(keys) == len(self.keys)


# -- coming in -------------------------------------------------------------------------------------------------------


def test_blocks_of_a_peer_serve_as_if_they_had_been_computed_here(rig: Rig) -> None:
    assert insert(rig.cache, B) == 4
    assert rig.recall(B) == 4
    assert rig.cache.grant(B, "").grants == ()
    assert rig.cache.stats().stored == 4


def test_they_come_in_parts_and_what_is_there_is_skipped(rig: Rig) -> None:
    assert insert(rig.cache, B, 0, count=2) == 2
    assert insert(rig.cache, B, 1, count=2) == 2
    assert rig.recall(B) == 3
    assert insert(rig.cache, B, 3) == 1
    assert rig.recall(B) == 4
    assert rig.cache.stats().stored == 4
    assert insert(rig.cache, B, 4) == 0
    assert insert(rig.cache, (), 0) == 0


def test_a_block_without_the_one_before_it_is_not_stored(rig: Rig) -> None:
    assert insert(rig.cache, B, 1) == 0
    assert rig.cache.stats().blocks == 0


def test_frames_of_the_wire_are_taken_as_they_are(rig: Rig) -> None:
    keys = rig.cache.keys(A, "")
    assert rig.cache.insert(keys, 0, [Hashed.of(memoryview(each.data)) for each in payloads(keys)], exact=True) == 3
    assert rig.recall(A) == 3


@pytest.mark.parametrize(
    "bad", [b"", bytes(BLOCK_BYTES - 1), bytes(BLOCK_BYTES + 1), bytes(10 * BLOCK_BYTES), b"\x00\x7c" * 300]
)
def test_a_payload_that_is_no_block_stops_there(rig: Rig, bad: bytes) -> None:
    keys = rig.cache.keys(B, "")
    sound = payloads(keys)
    with pytest.raises(SnapshotError, match="block 2"):
        rig.cache.insert(keys, 0, [*sound[:2], Hashed.of(bad), sound[3]], exact=True)
    assert rig.recall(B) == 2
    assert insert(rig.cache, B, 2) == 2


def test_more_blocks_than_the_chain_has_are_refused(rig: Rig) -> None:
    keys = rig.cache.keys(A, "")
    with pytest.raises(SnapshotError, match="3 blocks from block 1"):
        rig.cache.insert(keys, 1, payloads(keys), exact=True)
    assert rig.cache.stats().blocks == 0


def test_room_is_made_by_eviction_but_not_of_the_chain_itself(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 4)) as rig:
        mirror = Mirror(rig.cache)
        rig.store(A)
        assert insert(rig.cache, chain(9, 6)) == 4
        assert rig.recall(A) == 0
        assert rig.recall(chain(9, 6)) == 4
        mirror.check()
        rig.cache.check_integrity()


def test_leased_blocks_are_no_room(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path, 4)) as rig:
        rig.store(A)
        lease = rig.cache.lease((*A, 0), "")
        assert insert(rig.cache, B) == 1
        assert rig.sound(lease) == 3


class Slow(list[Hashed]):
    """Payloads between which others use the cache."""

    def __init__(self, payloads: Sequence[Hashed], meanwhile: Callable[[], object]) -> None:
        super().__init__(payloads)
        self.meanwhile = meanwhile

    def __iter__(self) -> Iterator[Hashed]:
        for payload in super().__iter__():
            self.meanwhile()
            yield payload


@pytest.mark.parametrize("there", [0, 2])
def test_others_do_not_evict_a_chain_that_is_coming_in(tmp_path: Path, there: int) -> None:
    with closing(open_rig(tmp_path, 4)) as rig:
        keys = rig.cache.keys(B, "")
        insert(rig.cache, B, count=there)
        rounds = iter(range(4))
        # Not before the first one: until then, all is room.
        others = Slow(payloads(keys), lambda: (name := next(rounds)) and rig.store(chain(10 + name, 4)))
        assert rig.cache.insert(keys, 0, others, exact=True) == 4
        assert rig.recall(B) == 4


def test_a_block_that_an_engine_writes_is_left_to_it(rig: Rig) -> None:
    grant = rig.cache.grant(A, "")
    assert insert(rig.cache, A) == 0
    assert rig.cache.enter(grant, rig.payloads(A, grant)) == 3
    assert insert(rig.cache, A) == 3


def test_a_full_disk_stops_with_what_is_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = Mirror(rig.cache)
    write = rig.cache._arena.write
    written: list[int] = []

    def full(slot: int, payload: bytes | memoryview) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(slot)
        write(slot, payload)

    monkeypatch.setattr(rig.cache._arena, "write", full)
    assert insert(rig.cache, B) == 2
    assert insert(rig.cache, B, 2) == 0
    assert len(caplog.records) == 1
    assert rig.recall(B) == 2
    monkeypatch.undo()
    assert insert(rig.cache, B, 2) == 2
    mirror.check()


def test_a_parent_that_goes_while_its_block_is_written_takes_it_along(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.store(A)
    write = rig.cache._arena.write

    def slow(slot: int, payload: bytes | memoryview) -> None:
        write(slot, payload)
        rig.cache.drop(rig.cache.keys(A, "")[:1])

    monkeypatch.setattr(rig.cache._arena, "write", slow)
    assert insert(rig.cache, A + C, 3) == 0
    assert rig.cache.stats().blocks == 0


# -- a prompt's chain ------------------------------------------------------------------------------------------------


def test_held_tells_what_a_request_can_use_and_uses_nothing(rig: Rig) -> None:
    rig.store(A)
    keys = rig.cache.keys(A, "")
    before = [(block.tick, block.uses) for block in rig.cache._index.all_blocks()]
    assert rig.cache.held(A, "") == (keys[:2], 2)
    assert rig.cache.held((*A, 0), "") == (keys, 3)
    more, count = rig.cache.held((*A, *C, 0), "")
    assert (len(more), more[:3], count) == (5, keys, 3)
    assert rig.cache.held(A, "salt")[1] == 0
    assert rig.cache.held((), "") == ([], 0)
    assert [(block.tick, block.uses) for block in rig.cache._index.all_blocks()] == before


# -- exactness -------------------------------------------------------------------------------------------------------


def test_an_inexact_block_serves_here_and_nowhere_else(rig: Rig) -> None:
    mirror = Mirror(rig.cache)
    keys = rig.cache.keys(B, "")
    assert insert(rig.cache, B, exact=False, count=2) == 2
    assert rig.recall(B) == 2
    assert rig.cache.held(B, "")[1] == 2
    assert rig.cache.all_keys() == []
    assert [rig.cache.read_block(key) for key in keys] == [None] * 4
    assert mirror.calls == []
    assert rig.cache.drop(keys) == 2
    assert mirror.calls == []


def test_exactness_outlives_the_node(tmp_path: Path) -> None:
    with closing(open_rig(tmp_path)) as rig:
        insert(rig.cache, A, exact=False)
        rig.store(B)
    with closing(open_rig(tmp_path, None)) as rig:
        assert (rig.recall(A), rig.recall(B)) == (3, 4)
        assert set(rig.cache.all_keys()) == set(rig.cache.keys(B, ""))


def test_an_exact_block_replaces_an_inexact_one_and_not_the_other_way_round(rig: Rig) -> None:
    mirror = Mirror(rig.cache)
    keys = rig.cache.keys(A, "")
    near = [Hashed.of(bytes(BLOCK_BYTES))] * 3
    assert rig.cache.insert(keys, 0, near, exact=False) == 3
    assert insert(rig.cache, A, 1, count=1) == 1
    assert rig.cache.all_keys() == [keys[1]]
    assert rig.cache.read_block(keys[1]) == Hashed.of(payload_of(keys[1]))
    assert insert(rig.cache, A) == 3
    assert [rig.cache.read_block(key) for key in keys] == payloads(keys)
    assert rig.cache.insert(keys, 0, near, exact=False) == 3
    assert [rig.cache.read_block(key) for key in keys] == payloads(keys)
    assert rig.recall(A) == 3
    mirror.check()


def test_an_inexact_block_that_is_being_read_stays(rig: Rig) -> None:
    keys = rig.cache.keys(A, "")
    insert(rig.cache, A, exact=False)
    lease = rig.cache.lease((*A, 0), "")
    assert insert(rig.cache, A) == 3
    assert rig.sound(lease) == 3
    assert rig.cache.all_keys() == []
    rig.cache.release(lease)
    assert insert(rig.cache, A) == 3
    assert rig.cache.all_keys() == keys


def test_a_replacement_that_fails_leaves_a_miss(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(rig.cache, A, exact=False)

    def full(slot: int, payload: bytes | memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rig.cache._arena, "write", full)
    assert insert(rig.cache, A, 1, count=1) == 0
    assert rig.recall(A) == 1


def test_a_replaced_block_is_erased_before_it_is_written(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(rig.cache, A, exact=False)
    write = rig.cache._arena.write

    def watched(slot: int, payload: bytes | memoryview) -> None:
        assert slot not in [block.slot for block in rig.cache._arena.entries()]
        assert rig.recall(A) == 0
        write(slot, payload)

    monkeypatch.setattr(rig.cache._arena, "write", watched)
    assert insert(rig.cache, A, count=1) == 1
    assert rig.recall(A) == 3


def test_what_an_engine_computes_on_inexact_blocks_is_inexact(rig: Rig) -> None:
    mirror = Mirror(rig.cache)
    insert(rig.cache, A, exact=False)
    rig.recall(A)
    assert rig.store(A + C) == 2
    assert rig.recall(A + C) == 5
    assert rig.cache.all_keys() == []
    # The engine's memory of it outlives that of the arena.
    rig.cache.drop(rig.cache.keys(A, "")[:1])
    assert rig.store((*A, *C, *range(4))) == 6
    assert mirror.calls == []


def test_what_an_engine_computed_without_them_is_exact(rig: Rig) -> None:
    rig.store(A)
    insert(rig.cache, B, exact=False)
    assert rig.store(A + C) == 2
    assert set(rig.cache.all_keys()) == set(rig.cache.keys(A + C, ""))


# -- going out -------------------------------------------------------------------------------------------------------


def test_exact_blocks_are_read_for_others(rig: Rig) -> None:
    rig.store(A)
    keys = rig.cache.keys(A, "")
    assert [rig.cache.read_block(key) for key in keys] == payloads(keys)
    assert rig.cache.read_block(bytes(32)) is None
    grant = rig.cache.grant(C, "")
    assert rig.cache.read_block(rig.cache.keys(C, "")[0]) is None, "not written yet"
    rig.cache.enter(grant, ())


def test_a_damaged_block_is_not_handed_on_and_goes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    mirror = Mirror(rig.cache)
    rig.store(B)
    keys = rig.cache.keys(B, "")
    block = rig.cache._index.get(keys[1])
    assert block is not None
    rig.file.write(block.slot, memoryview(bytes(BLOCK_BYTES)))
    assert rig.cache.read_block(keys[1]) is None
    assert rig.recall(B) == 1
    assert (rig.cache.stats().bad, len(caplog.records)) == (1, 1)
    mirror.check()
    assert rig.store(B) == 3


def test_a_file_that_cannot_be_read_is_no_block(rig: Rig) -> None:
    rig.store(A)
    key = rig.cache.keys(A, "")[0]
    rig.cache.close()
    assert rig.cache.read_block(key) is None
    assert insert(rig.cache, B) == 0


def test_a_block_stays_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_rig(tmp_path, 2)) as rig:
        rig.store(C)
        keys = rig.cache.keys(C, "")
        read = rig.cache._arena.read

        def slow(slot: int) -> bytes:
            assert rig.store(A) == 0
            return read(slot)

        monkeypatch.setattr(rig.cache._arena, "read", slow)
        assert rig.cache.read_block(keys[1]) == Hashed.of(payload_of(keys[1]))
        monkeypatch.undo()
        assert rig.store(A) == 2


# -- poison ----------------------------------------------------------------------------------------------------------


def test_drop_takes_continuations_along(rig: Rig) -> None:
    mirror = Mirror(rig.cache)
    rig.store(B)
    rig.store((*B[:8], *C))
    keys = rig.cache.keys(B, "")
    assert rig.cache.drop([keys[2], bytes(32), keys[3]]) == 2
    assert rig.recall((*B[:8], *C)) == 4
    assert rig.cache.drop(keys) == 4
    assert rig.cache.stats().blocks == 0
    mirror.check()
    assert list(rig.cache._arena.entries()) == []


def halves(seed: int, count: int = BLOCK_BYTES // 2) -> np.ndarray[tuple[int], np.dtype[np.float16]]:
    return np.random.default_rng(seed).standard_normal(count).astype("<f2")


def test_compare_tells_how_far_two_blocks_are_apart(rig: Rig) -> None:
    values = halves(1)
    others = {"same": values, "near": (values * np.float16(1.01)).astype("<f2"), "other": halves(2)}
    first = rig.cache.keys(A[:BLOCK_TOKENS], "")[0]
    rig.cache.insert([first], 0, [Hashed.of(values.tobytes())], exact=True)
    distance = {}
    for name, payload in others.items():
        key = rig.cache.keys(A[:BLOCK_TOKENS], name)[0]
        rig.cache.insert([key], 0, [Hashed.of(payload.tobytes())], exact=name != "near")
        distance[name] = rig.cache.compare(key, first)
    assert distance["same"] == 0.0
    assert distance["near"] == pytest.approx(0.01, rel=0.1)
    assert distance["other"] == pytest.approx(2**0.5, rel=0.2)
    assert rig.cache.compare(first, bytes(32)) is None
    assert rig.cache.compare(bytes(32), first) is None


def test_a_wrong_part_is_not_hidden_by_a_large_rest() -> None:
    good = np.concatenate([halves(3, 4 * PIECE_VALUES) * np.float16(200), halves(4, PIECE_VALUES + 10)])
    bad = good.copy()
    bad[4 * PIECE_VALUES : 5 * PIECE_VALUES] = halves(5, PIECE_VALUES)
    assert relative_rms(bad.tobytes(), good.tobytes()) > 1.0
    bad = good.copy()
    bad[-10:] = 0
    assert relative_rms(bad.tobytes(), good.tobytes()) == pytest.approx(1.0)


def test_compare_knows_zeros_and_extremes() -> None:
    zeros, ones, large = (np.full(64, value, "<f2").tobytes() for value in (0, 1, 65504))
    assert relative_rms(zeros, zeros) == 0.0
    assert relative_rms(ones, zeros) == float("inf")
    assert relative_rms(zeros, ones) == 1.0
    assert relative_rms(large, large) == 0.0
    assert relative_rms(zeros, large) == pytest.approx(1.0)


# -- changes ---------------------------------------------------------------------------------------------------------


def test_changes_are_told_in_order_even_by_a_listener_that_makes_some(rig: Rig) -> None:
    rig.store(B)
    keys = rig.cache.keys(B, "")
    heard: list[tuple[int, int]] = []

    def on_change(added: list[bytes], dropped: list[bytes]) -> None:
        if not heard:
            rig.cache.drop(keys[1:2])
        heard.append((len(added), len(dropped)))

    rig.cache.on_change = on_change
    rig.cache.drop(keys[3:])
    assert heard == [(0, 1), (0, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("sqxudebg"), st.integers(0, 3), st.integers(0, 5), st.integers(1, 6)), max_size=40
    ),
    st.integers(0, 3),
)
def test_whoever_hears_every_change_knows_all_keys(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, int, int]], max_entries: int
) -> None:
    directory = tmp_path_factory.mktemp("history")
    with closing(open_rig(directory, 10, max_entries=max_entries)) as rig:
        mirror = Mirror(rig.cache)
        for action, name, first, count in history:
            tokens = chain(name, 6)[: count * BLOCK_TOKENS]
            key = rig.cache.keys(tokens, "")[-1]
            if action in "qx":
                insert(rig.cache, tokens, min(first, count), exact=action == "x")
            elif action == "s":
                rig.store(tokens)
            elif action == "u":
                rig.recall(tokens)
            elif action == "d":
                rig.cache.drop([key])
            elif action == "e":
                rig.cache.enter(rig.cache.grant(tokens, ""), ())
            elif (block := rig.cache._index.get(key)) is not None:
                rig.file.write(block.slot, memoryview(bytes(BLOCK_BYTES)))
                if action == "b":
                    rig.recall(tokens)
                else:
                    rig.cache.release(rig.cache.lease((*tokens, 0), ""), (count - 1) * BLOCK_TOKENS)
            mirror.check()
            rig.cache.check_integrity()
        before = mirror.keys
    with closing(open_rig(directory, None, max_entries=max_entries)) as rig:
        assert set(rig.cache.all_keys()) == before


def test_threads_neither_see_a_wrong_block_nor_lose_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An engine and three fetches at once, in an arena that holds a quarter of what they want, while others read."""
    caplog.set_level(logging.ERROR)
    with closing(open_rig(tmp_path, 24, max_entries=6)) as rig:
        mirror = Mirror(rig.cache)
        errors: list[BaseException] = []
        served = [0] * 4

        def work(seed: int) -> None:
            draw = random.Random(seed)
            try:
                for _ in range(300):
                    name = draw.randrange(12)
                    tokens = (*chain(name // 3, 3), *chain(name, 5))[: BLOCK_TOKENS * draw.randint(1, 8)]
                    if seed:
                        keys, count = rig.cache.held((*tokens, 0), "")
                        rig.cache.insert(keys, count, payloads(keys[count:]), exact=draw.random() < 0.7)
                    else:
                        rig.recall(tokens)
                        rig.store(tokens)
                    for key in rig.cache.keys(tokens, ""):
                        payload = rig.cache.read_block(key)
                        assert payload is None or payload == Hashed.of(payload_of(key))
                        served[seed] += payload is not None
                    if draw.random() < 0.1:
                        rig.cache.drop(keys[-1:] if seed else ())
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
        assert min(served) > 0
        mirror.check()
        rig.cache.check_integrity()
        assert all(block.pins == 0 for block in rig.cache._index._blocks.values())
        for block in rig.cache._arena.entries():
            assert blake3(rig.cache._arena.read(block.slot)).digest() == block.digest


def test_a_payload_under_way_when_the_arena_closes_reaches_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = open_rig(tmp_path)
    other = tmp_path / "other"
    write_at = arena_module.write_at
    opened: list[int] = []

    def late(fd: int, data: bytes | memoryview, offset: int) -> None:
        rig.close()
        # The lowest free number: that of the arena's file, if it was closed.
        opened.append(os.open(other, os.O_RDWR | os.O_CREAT))
        write_at(fd, data, offset)

    monkeypatch.setattr(arena_module, "write_at", late)
    rig.cache._arena.write(0, bytes(BLOCK_BYTES))
    assert other.stat().st_size == 0
    os.close(opened[0])


# -- by keys ---------------------------------------------------------------------------------------------------------


def test_who_has_only_keys_gets_what_tokens_get(rig: Rig) -> None:
    tokens = A + C
    keys = rig.cache.keys(tokens, "")
    rig.store(A)
    assert rig.cache.held_keys(keys) == 3
    lease = rig.cache.lease_keys(keys, len(tokens))
    by_tokens = rig.cache.lease(tokens, "")
    assert lease.refs == by_tokens.refs
    rig.cache.release(lease)
    rig.cache.release(by_tokens)
    grant = rig.cache.grant_keys(keys)
    assert [number for number, _ in grant.grants] == [3, 4]
    assert rig.cache.enter(grant, rig.payloads(tokens, grant)) == 2
    assert rig.cache.held_keys(keys) == 5
    assert rig.cache.held_keys(keys[1:2]) == 1
    assert set(rig.cache.all_keys()) == set(keys)


def test_what_was_computed_from_quantised_rows_is_inexact(rig: Rig) -> None:
    keys = rig.cache.keys(A + C, "")
    rig.store(A)
    grant = rig.cache.grant_keys(keys, exact=False)
    assert rig.cache.enter(grant, rig.payloads(A + C, grant)) == 2
    assert rig.cache.held_keys(keys) == 5
    assert set(rig.cache.all_keys()) == set(keys[:3])
