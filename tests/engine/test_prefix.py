"""Where a request finds the beginning of its prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.engine.prefix import OVERWRITE_SHARE, Held, Placement, common_blocks, pack, place

BLOCK = 4


def naive_common(a: list[int], b: list[int], size: int) -> int:
    """Whole blocks in common, block by block."""
    count = 0
    while len(a) >= (count + 1) * size <= len(b) and a[: (count + 1) * size] == b[: (count + 1) * size]:
        count += 1
    return count


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(1, 7), st.data())
def test_common_blocks_are_those_that_a_look_at_each_finds(
    a: list[int], b: list[int], size: int, data: st.DataObject
) -> None:
    b = a[: data.draw(st.integers(0, len(a)))] + b
    assert common_blocks(pack(a), pack(b), size) == naive_common(a, b, size)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_packing_takes_four_bytes_for_any_token(tokens: list[int]) -> None:
    packed = pack(tokens)
    assert len(packed) == 4 * len(tokens)
    assert memoryview(packed).cast("i").tolist() == tokens


# -- any state of the slots ------------------------------------------------------------------------------------------


@st.composite
def held_slots(draw: st.DrawFn) -> list[Held]:
    """Slots as an engine may have them: beginnings of few chains, so that many are shared."""
    slots = []
    for index in range(draw(st.integers(1, 5))):
        tokens = draw(prompts(0))
        busy = draw(st.booleans()) and bool(tokens)
        n_past = draw(st.integers(0, len(tokens))) if busy else len(tokens)
        # A running answer makes KV grow beyond the prompt.
        n_past += draw(st.integers(0, 6)) if busy and n_past == len(tokens) else 0
        slots.append(Held(index, pack(tokens), n_past, draw(st.sampled_from(("", "s"))), busy, draw(st.integers(0, 9))))
    return slots


@st.composite
def prompts(draw: st.DrawFn, min_blocks: int = 1) -> list[int]:
    pieces = draw(st.lists(st.sampled_from(([1] * BLOCK, [2] * BLOCK)), min_size=min_blocks, max_size=6))
    return [token for piece in pieces for token in piece] + draw(st.lists(st.just(3), max_size=BLOCK))


def shared(tokens: list[int], salt: str, held: Held) -> int:
    """Blocks of a prompt that a slot has or will have, and that may be reused."""
    there = memoryview(held.tokens).cast("i").tolist()
    return min(naive_common(tokens, there, BLOCK), (len(tokens) - 1) // BLOCK) if held.salt == salt else 0


def now(tokens: list[int], salt: str, held: Held) -> int:
    """The same, of what is in the KV already."""
    return min(shared(tokens, salt, held), held.n_past // BLOCK)


@given(prompts(), st.sampled_from(("", "s")), st.integers(0, 8), held_slots())
def test_any_placement_keeps_the_rules(tokens: list[int], salt: str, stored: int, slots: list[Held]) -> None:
    placement = place(pack(tokens), salt, stored, slots, BLOCK)
    usable = (len(tokens) - 1) // BLOCK
    best_slot = max(now(tokens, salt, held) for held in slots)
    best = max(best_slot, min(stored, usable))
    waits = [held for held in slots if held.growing and shared(tokens, salt, held) > best]
    if placement is None:
        assert waits or all(held.busy for held in slots), "waits for nobody"
        return
    assert not waits, "computes what another request is just computing"
    target = slots[placement.slot]
    assert not target.busy, "a busy slot is taken"
    assert placement.tokens == best * BLOCK, "less than the most that can be had"
    assert placement.tokens < len(tokens), "no token is left to compute"
    match placement.tier:
        case "":
            assert placement == Placement(target.slot)
        case "arena":
            assert placement.source is None
            assert min(stored, usable) > best_slot, "a slot has as much"
        case "slot" if placement.source is None:
            assert now(tokens, salt, target) == best
        case "slot":
            assert placement.source != placement.slot
            assert now(tokens, salt, slots[placement.source]) == best


@given(prompts(), st.integers(0, 8), held_slots())
def test_nothing_is_reused_across_salts(tokens: list[int], stored: int, slots: list[Held]) -> None:
    placement = place(pack(tokens), "of nobody else", stored, slots, BLOCK)
    if placement is None:
        assert all(held.busy for held in slots)
    else:
        assert placement.tier in ("", "arena")


@given(prompts(), st.integers(0, 8), held_slots())
def test_without_blocks_the_lowest_free_slot_is_taken_empty(tokens: list[int], stored: int, slots: list[Held]) -> None:
    free = [held.slot for held in slots if not held.busy]
    assert place(pack(tokens), "", stored, slots, 0) == (Placement(min(free)) if free else None)


# -- preferences -----------------------------------------------------------------------------------------------------


def held(slot: int, *tokens: int, n_past: int | None = None, busy: bool = False, salt: str = "", used: int = 1) -> Held:
    """A slot that holds `tokens`, each a block of it."""
    expanded = [token for token in tokens for _ in range(BLOCK)]
    return Held(slot, pack(expanded), len(expanded) if n_past is None else n_past, salt, busy, used)


def empty(slot: int) -> Held:
    return Held(slot, b"", 0, "", False, 0)


def wanted(*tokens: int, stored: int = 0, slots: list[Held]) -> Placement | None:
    """The placement of a prompt of these blocks and one token more."""
    return place(pack([*(token for token in tokens for _ in range(BLOCK)), 0]), "", stored, slots, BLOCK)


def test_the_next_turn_goes_on_in_its_slot() -> None:
    slots = [empty(0), held(1, 1, 2, 3), empty(2)]
    assert wanted(1, 2, 3, 4, slots=slots) == Placement(1, "slot", 3 * BLOCK)


def test_a_slot_is_preferred_to_as_much_in_the_arena() -> None:
    assert wanted(1, 2, slots=[empty(0), held(1, 1, 2)], stored=2) == Placement(1, "slot", 2 * BLOCK)


def test_more_in_the_arena_is_loaded_into_an_empty_slot() -> None:
    assert wanted(1, 2, 3, slots=[held(0, 1, 2), empty(1)], stored=3) == Placement(1, "arena", 3 * BLOCK)


def test_another_conversation_with_the_same_beginning_is_copied_not_overwritten() -> None:
    slots = [held(0, 1, 2, 3, 4, 5), empty(1)]
    assert wanted(1, 9, slots=slots) == Placement(1, "slot", BLOCK, source=0)
    # It keeps half of what is there.
    assert OVERWRITE_SHARE == 0.5
    assert wanted(1, 2, 3, 9, slots=slots) == Placement(0, "slot", 3 * BLOCK)


def test_the_only_free_slot_is_taken_over_whatever_is_kept() -> None:
    slots = [held(0, 1, 2, 3, 4, 5), held(1, 7, busy=True)]
    assert wanted(1, 9, slots=slots) == Placement(0, "slot", BLOCK)


def test_a_busy_slot_is_copied_from() -> None:
    slots = [held(0, 1, 2, 3, busy=True), held(1, 7, used=5), held(2, 8, used=3)]
    assert wanted(1, 2, 4, slots=slots) == Placement(2, "slot", 2 * BLOCK, source=0)


def test_a_free_slot_is_preferred_to_a_busy_one_that_holds_as_much() -> None:
    slots = [held(0, 1, 2, busy=True), held(1, 1, 2)]
    assert wanted(1, 2, slots=slots) == Placement(1, "slot", 2 * BLOCK)


def test_without_anything_to_reuse_an_empty_slot_then_the_oldest() -> None:
    assert wanted(9, slots=[held(0, 1), held(1, 2), empty(2)]) == Placement(2)
    assert wanted(9, slots=[held(0, 1, used=5), held(1, 2, used=3)]) == Placement(1)


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    growing = held(0, 1, 2, 3, n_past=BLOCK, busy=True)
    assert growing.growing
    assert wanted(1, 2, 3, 4, slots=[growing, empty(1)]) is None
    assert wanted(1, 2, 3, 4, slots=[growing, empty(1)], stored=3) == Placement(1, "arena", 3 * BLOCK)
    assert wanted(1, 9, slots=[growing, empty(1)]) == Placement(1, "slot", BLOCK, source=0), "no more will come"
    assert wanted(9, slots=[growing, empty(1)]) == Placement(1)


def test_a_prompt_that_is_read_is_waited_for_no_more() -> None:
    done = held(0, 1, 2, 3, busy=True)
    assert not done.growing
    assert not replace(done, n_past=done.n_past + 5).growing
    assert wanted(1, 2, 3, 4, slots=[done, empty(1)]) == Placement(1, "slot", 3 * BLOCK, source=0)


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_last_token_is_always_left(tokens: int) -> None:
    slots = [Held(0, pack([1] * 20), 20, "", False, 1)]
    placement = place(pack([1] * tokens), "", 9, slots, BLOCK)
    assert placement is not None
    assert placement.tokens == (BLOCK if tokens > BLOCK else 0)
