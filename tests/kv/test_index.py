"""The index of blocks: what it finds, what it gives up first, and what it must never give up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmcpp.kv.index import MAX_USES, ROOT, Block, BlockIndex


def key_of(name: int) -> bytes:
    return name.to_bytes(32, "big")


def store(index: BlockIndex, *names: int) -> list[Block]:
    """Store a chain from the root; blocks that are there already stay."""
    parent = ROOT
    blocks = []
    for name in names:
        block = index.get(key_of(name))
        if block is None:
            block, _ = index.reserve(key_of(name), parent)
            assert block is not None
            index.commit(block, b"digest")
        blocks.append(block)
        parent = block.key
    return blocks


def names(index: BlockIndex) -> set[int]:
    return {int.from_bytes(block.key) for block in index.all_blocks()}


# -- examples --------------------------------------------------------------------------------------------------------


def test_a_chain_is_found_as_far_as_it_is_stored() -> None:
    index = BlockIndex(8)
    store(index, 1, 2, 3)
    assert [block.key for block in index.match([key_of(1), key_of(2), key_of(9)])] == [key_of(1), key_of(2)]
    assert index.match([key_of(2), key_of(3)]) != []
    assert index.match([key_of(9), key_of(1)]) == []


def test_a_reserved_block_is_not_found_before_it_is_committed() -> None:
    index = BlockIndex(8)
    block, _ = index.reserve(key_of(1), ROOT)
    assert block is not None
    assert index.match([key_of(1)]) == []
    assert index.all_blocks() == []
    index.commit(block, b"d")
    assert index.match([key_of(1)]) == [block]


def test_what_cannot_be_reserved() -> None:
    index = BlockIndex(1)
    assert index.reserve(key_of(2), key_of(1)) == (None, []), "without its parent"
    block, _ = index.reserve(key_of(1), ROOT)
    assert block is not None
    assert index.reserve(key_of(1), ROOT) == (None, []), "twice"
    assert index.reserve(key_of(3), ROOT) == (None, []), "every slot is pinned"
    index.check_integrity()


def test_the_longest_unused_leaf_goes_first() -> None:
    index = BlockIndex(4)
    store(index, 1, 2)
    store(index, 3)
    store(index, 4)
    _, evicted = index.reserve(key_of(5), ROOT)
    assert [block.key for block in evicted] == [key_of(2)], "1 is older but not a leaf"
    _, evicted = index.reserve(key_of(6), ROOT)
    assert [block.key for block in evicted] == [key_of(1)], "now it is"


def test_a_chain_that_is_used_outlives_many_that_are_not() -> None:
    index = BlockIndex(8)
    chain = store(index, 1, 2)
    for name in range(10, 200):
        if name % 5 == 0:
            index.use(chain)
        store(index, name)
    assert {1, 2} <= names(index)


def test_what_was_asked_for_again_outlives_newer_blocks_that_were_not() -> None:
    index = BlockIndex(6)
    chain = store(index, 1, 2)
    index.use(chain)
    for name in range(10, 18):
        store(index, name)
    assert {1, 2} <= names(index)


def test_old_fame_is_forgotten() -> None:
    index = BlockIndex(4)
    chain = store(index, 1, 2)
    for _ in range(100):
        index.use(chain)
    for name in range(10, 10 + 4 * (MAX_USES + 2)):
        store(index, name)
    assert not {1, 2} & names(index)


def test_one_entry_keeps_one_chain() -> None:
    index = BlockIndex(8, max_entries=1)
    store(index, 1, 2, 3)
    store(index, 4, 5)
    assert names(index) == {4, 5}
    assert index.leaves == 1


def test_one_entry_follows_a_conversation_that_takes_another_turn() -> None:
    index = BlockIndex(8, max_entries=1)
    store(index, 1, 2, 3)
    store(index, 1, 2, 4)
    assert names(index) == {1, 2, 4}


def test_two_entries_branch() -> None:
    index = BlockIndex(8, max_entries=2)
    store(index, 1, 2)
    store(index, 1, 3)
    store(index, 1, 4)
    assert names(index) == {1, 3, 4}
    assert index.leaves == 2


@pytest.mark.parametrize("uses", range(MAX_USES + 1))
def test_an_entry_too_many_costs_one_chain_however_often_all_were_used(uses: int) -> None:
    index = BlockIndex(100, max_entries=4)
    chains = [store(index, *range(10 * number, 10 * number + 8)) for number in range(1, 5)]
    for _ in range(uses):
        for chain in chains:
            index.use(chain)
    store(index, *range(90, 98))
    assert names(index) == {10 * number + each for number in (2, 3, 4, 9) for each in range(8)}
    index.check_integrity()


def test_a_beginning_that_was_used_since_outlives_its_chain() -> None:
    index = BlockIndex(100, max_entries=2)
    chain = store(index, 1, 2, 3, 4)
    index.use(chain[:2])
    store(index, 5, 6)
    store(index, 7, 8)
    assert names(index) == {1, 2, 7, 8}


def test_a_chain_that_is_read_is_not_cut_for_another() -> None:
    index = BlockIndex(100, max_entries=2)
    chain = store(index, 1, 2, 3)
    store(index, 4, 5)
    for block in chain[:2]:
        block.pins += 1
    store(index, 6, 7)
    assert names(index) == {1, 2, 6, 7}


def reserve_copy(index: BlockIndex, name: int, parent: bytes = ROOT) -> Block:
    block, _ = index.reserve(key_of(name), parent, copy=True)
    assert block is not None
    index.commit(block, b"digest")
    return block


def test_copies_go_before_what_only_this_node_has() -> None:
    index = BlockIndex(6)
    store(index, 1, 2)
    first = reserve_copy(index, 3)
    reserve_copy(index, 4, first.key)
    store(index, 5, 6)
    store(index, 7, 8)
    assert names(index) == {1, 2, 5, 6, 7, 8}
    store(index, 9)
    assert names(index) == {1, 5, 6, 7, 8, 9}, "without copies, the oldest leaf"


def test_a_copy_that_is_asked_for_outlives_one_that_is_not() -> None:
    index = BlockIndex(3)
    used = reserve_copy(index, 1)
    reserve_copy(index, 2)
    index.use([used])
    store(index, 3, 4)
    assert names(index) == {1, 3, 4}


def test_a_copy_that_is_read_stays() -> None:
    index = BlockIndex(3)
    read = reserve_copy(index, 1)
    read.pins += 1
    store(index, 2, 3)
    store(index, 4)
    assert names(index) == {1, 2, 4}


def test_a_copy_on_which_own_blocks_stand_is_no_leaf() -> None:
    index = BlockIndex(4)
    copy = reserve_copy(index, 1)
    own, _ = index.reserve(key_of(2), copy.key)
    assert own is not None
    index.commit(own, b"digest")
    store(index, 3, 4)
    store(index, 5)
    assert names(index) == {1, 3, 4, 5}
    store(index, 6)
    assert names(index) == {3, 4, 5, 6}


def test_a_removed_block_takes_its_continuations_along() -> None:
    index = BlockIndex(8)
    blocks = store(index, 1, 2, 3)
    store(index, 1, 2, 4)
    store(index, 1, 5)
    assert {int.from_bytes(block.key) for block in index.remove(blocks[1])} == {2, 3, 4}
    assert names(index) == {1, 5}
    index.check_integrity()
    store(index, 10, 11, 12, 13, 14, 15)
    assert index.evictions == 0


def test_loading_keeps_what_hangs_on_a_root() -> None:
    index = BlockIndex(8)
    for slot, (name, parent) in enumerate(((3, 2), (2, 1), (1, 0), (6, 5), (7, 0), (8, 6))):
        assert index.load(key_of(name), key_of(parent), slot, b"d", tick=slot) is not None
    assert index.load(key_of(7), ROOT, 7, b"d", tick=9) is None, "a key twice"
    assert {int.from_bytes(block.key) for block in index.finish_loading()} == {6, 8}
    assert names(index) == {1, 2, 3, 7}
    index.check_integrity()


def test_loading_drops_blocks_that_are_each_others_parent() -> None:
    index = BlockIndex(8)
    for slot, (name, parent) in enumerate(((1, 2), (2, 1), (3, 3), (4, 2), (5, 0))):
        index.load(key_of(name), key_of(parent), slot, b"d", tick=1)
    assert {int.from_bytes(block.key) for block in index.finish_loading()} == {1, 2, 3, 4}
    assert names(index) == {5}
    index.check_integrity()


def test_the_order_of_eviction_survives_loading() -> None:
    index = BlockIndex(3)
    for slot, (name, tick) in enumerate(((1, 30), (2, 10), (3, 20))):
        index.load(key_of(name), ROOT, slot, b"d", tick)
    index.finish_loading()
    gone = [int.from_bytes(index.reserve(key_of(name), ROOT)[1][0].key) for name in (11, 12, 13)]
    assert gone == [2, 3, 1]


def test_fewer_entries_than_were_stored_are_kept_after_loading() -> None:
    index = BlockIndex(8, max_entries=2)
    for slot, name in enumerate((1, 2, 3, 4)):
        index.load(key_of(name), ROOT, slot, b"d", tick=slot)
    assert {int.from_bytes(block.key) for block in index.finish_loading()} == {1, 2}
    assert names(index) == {3, 4}
    index.check_integrity()


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**63)), max_size=16),
    st.integers(0, 3),
)
def test_loading_any_table_leaves_a_sound_forest(table: list[tuple[int, int, int]], max_entries: int) -> None:
    index = BlockIndex(16, max_entries)
    loaded = {}
    for slot, (name, parent, tick) in enumerate(table):
        if index.load(key_of(name), key_of(parent), slot, b"d", tick):
            loaded[name] = parent
    dropped = {int.from_bytes(block.key) for block in index.finish_loading()}
    index.check_integrity()

    def reaches(name: int) -> bool:
        for _ in range(len(loaded) + 1):
            if name == 0:
                return True
            if name not in loaded:
                return False
            name = loaded[name]
        return False

    sound = {name for name in loaded if reaches(name)}
    assert names(index) == set(loaded) - dropped <= sound
    if not max_entries:
        assert names(index) == sound
    else:
        assert index.leaves <= max_entries


@pytest.mark.parametrize("n_slots", [1, 64])
def test_the_heap_does_not_grow_with_uses(n_slots: int) -> None:
    index = BlockIndex(n_slots)
    blocks = store(index, 1)
    for _ in range(10_000):
        index.use(blocks)
    assert len(index._heap) < 3000


# -- against a model -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Known:
    parent: bytes
    slot: int
    pins: int
    ready: bool


class IndexMachine(RuleBasedStateMachine):
    """Every operation on a small index, against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, Known] = {}
        self.leases: list[list[Block]] = []
        self.reserved: list[Block] = []
        self.name = 0

    @initialize(n_slots=st.integers(1, 9), max_entries=st.integers(0, 4))
    def begin(self, n_slots: int, max_entries: int) -> None:
        self.n_slots, self.max_entries = n_slots, max_entries
        self.index = BlockIndex(n_slots, max_entries)

    def leaves(self) -> set[bytes]:
        return set(self.model) - {known.parent for known in self.model.values()}

    def chain(self, key: bytes) -> list[bytes]:
        keys = []
        while key != ROOT:
            keys.append(key)
            key = self.model[key].parent
        return keys[::-1]

    def pick(self, data: st.DataObject) -> bytes:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(data=st.data(), root=st.booleans())
    def reserve(self, data: st.DataObject, root: bool) -> None:
        parent = ROOT if root or not self.model else self.pick(data)
        self.name += 1
        key = key_of(self.name)
        block, evicted = self.index.reserve(key, parent)
        ancestors = set(self.chain(parent)) if parent != ROOT else set()
        for gone in evicted:
            assert gone.key in self.leaves(), "only leaves are evicted"
            assert not self.model[gone.key].pins, "a pinned block is evicted"
            assert gone.key not in ancestors, "the chain that is being stored is evicted"
            del self.model[gone.key]
        grows = parent == ROOT or parent not in self.leaves()
        full = len(self.model) >= self.n_slots
        if self.max_entries and grows and len(self.leaves()) >= self.max_entries:
            full = True
        if block is None:
            assert full, "refused although there is room"
            spare = {leaf for leaf in self.leaves() if not self.model[leaf].pins} - {parent}
            assert not spare, "refused although something could go"
            return
        assert not full
        assert (block.key, block.parent, block.pins, block.ready) == (key, parent, 1, False)
        assert block.slot not in {known.slot for known in self.model.values()}
        assert 0 <= block.slot < self.n_slots
        self.model[key] = Known(parent, block.slot, 1, False)
        self.reserved.append(block)

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def reserve_twice(self, data: st.DataObject) -> None:
        assert self.index.reserve(self.pick(data), ROOT) == (None, [])

    @rule()
    def reserve_an_orphan(self) -> None:
        assert self.index.reserve(key_of(10**9), key_of(10**9 + 1)) == (None, [])

    @rule(data=st.data())
    @precondition(lambda self: self.reserved)
    def commit(self, data: st.DataObject) -> None:
        block = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        if self.index.get(block.key) is block:
            self.index.commit(block, b"d")
            self.model[block.key].pins -= 1
            self.model[block.key].ready = True

    @rule(data=st.data())
    @precondition(lambda self: self.reserved)
    def give_up(self, data: st.DataObject) -> None:
        block = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        if self.index.get(block.key) is block:
            block.pins -= 1
            self.drop(block)

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def lease(self, data: st.DataObject) -> None:
        keys = self.chain(self.pick(data))
        found = self.index.match(keys)
        wanted = []
        for key in keys:
            if not self.model[key].ready:
                break
            wanted.append(key)
        assert [block.key for block in found] == wanted
        self.index.use(found)
        for block in found:
            block.pins += 1
            self.model[block.key].pins += 1
        self.leases.append(found)

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def release(self, data: st.DataObject) -> None:
        for block in self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))):
            block.pins -= 1
            if self.index.get(block.key) is block:
                self.model[block.key].pins -= 1

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def remove(self, data: st.DataObject) -> None:
        block = self.index.get(self.pick(data))
        assert block is not None
        self.drop(block)

    def drop(self, block: Block) -> None:
        doomed = {key for key in self.model if block.key in self.chain(key)}
        assert {gone.key for gone in self.index.remove(block)} == doomed
        for key in doomed:
            del self.model[key]

    @invariant()
    @precondition(lambda self: hasattr(self, "index"))
    def same(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.model)
        assert self.index.leaves == len(self.leaves())
        if self.max_entries:
            assert self.index.leaves <= self.max_entries
        for key, known in self.model.items():
            block = self.index.get(key)
            assert block is not None
            assert (block.parent, block.slot, block.pins, block.ready) == (
                known.parent,
                known.slot,
                known.pins,
                known.ready,
            )


IndexMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestIndex = IndexMachine.TestCase
