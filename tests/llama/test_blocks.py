"""Blocks and copies on real llama.cpp: the logits after them are bit for bit those of a prompt that was computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from engine_support import prompt_of
from fake_backend import FakeBlockFile

from swarmcpp.core import BlockRef, KvLayout, Rows
from swarmcpp.errors import DecodeFailed, SnapshotError
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.llama.kvmemory import KvMemory
from swarmcpp.llama.snapshot import block_of, block_part, compose, parse

BLOCK = 64
TOKENS = prompt_of(200, 5)
TAIL = TOKENS[192:]
Logits = npt.NDArray[np.float32]
Maker = Callable[..., LlamaBackend]


@pytest.fixture
def make(tiny: Model) -> Iterator[Maker]:
    """Backends with a file of their own (`file`) and a known layout; contexts are closed afterwards."""
    contexts: list[Context] = []

    def backend(n_seqs: int = 3, n_ctx: int = 256, file: FakeBlockFile | None = None) -> LlamaBackend:
        contexts.append(Context(tiny, ContextOptions(n_ctx=n_ctx, n_seqs=n_seqs, n_threads=1)))
        made = LlamaBackend(tiny, contexts[-1], BLOCK)
        made.learn()
        made.use_file(file if file is not None else FakeBlockFile())
        return made

    yield backend
    for context in contexts:
        context.close()


def compute(backend: LlamaBackend, slot: int, tokens: Sequence[int], start: int = 0) -> Logits:
    """Append `tokens` from position `start`, in tiles; logits after the last."""
    at = start
    while at < start + len(tokens):
        count = min(BLOCK - at % BLOCK, start + len(tokens) - at)
        part = tokens[at - start : at - start + count]
        backend.decode([Rows(slot, at, list(part), outputs=int(at + count == start + len(tokens)))])
        at += count
    return backend.logits(slot)


def stored(backend: LlamaBackend, slot: int, numbers: Sequence[int]) -> list[BlockRef]:
    """Store blocks of a slot under arena slots 10, 11, ...; how to load them."""
    written = backend.store_blocks(slot, [(number, 10 + number) for number in numbers])
    assert [arena_slot for arena_slot, _ in written] == [10 + number for number in numbers]
    return [BlockRef(arena_slot, digest) for arena_slot, digest in written]


@pytest.fixture
def reference(make: Maker) -> Logits:
    """Logits after TOKENS, computed in a context of its own."""
    return compute(make(n_seqs=1), 0, TOKENS)


def test_the_layout_of_a_context(make: Maker) -> None:
    backend = make(n_seqs=3)
    layout = backend.learn()
    # Two KV heads of 16 halves.
    assert layout == KvLayout(layout.magic, 3, 1, 1, (64, 64), (64, 64))
    assert [backend.length(slot) for slot in range(3)] == [0, 0, 0]


def test_blocks_give_the_same_logits_in_another_slot(make: Maker, reference: Logits) -> None:
    backend = make()
    np.testing.assert_array_equal(compute(backend, 0, TOKENS), reference)
    refs = stored(backend, 0, range(3))
    assert backend.load_blocks(2, refs) == 3
    assert backend.length(2) == 192
    np.testing.assert_array_equal(compute(backend, 2, TAIL, 192), reference)


def test_blocks_give_the_same_logits_in_another_context(make: Maker, reference: Logits) -> None:
    """With another number of streams and another length, as after a restart with other options."""
    file = FakeBlockFile()
    first = make(n_seqs=3, file=file)
    compute(first, 1, TOKENS)
    refs = stored(first, 1, range(3))
    second = make(n_seqs=5, n_ctx=512, file=file)
    assert second.load_blocks(4, refs) == 3
    np.testing.assert_array_equal(compute(second, 4, TAIL, 192), reference)


@pytest.mark.parametrize("count", [1, 2])
def test_a_part_of_a_prefix(make: Maker, reference: Logits, count: int) -> None:
    backend = make()
    compute(backend, 0, TOKENS)
    assert backend.load_blocks(1, stored(backend, 0, range(count))) == count
    np.testing.assert_array_equal(compute(backend, 1, TOKENS[count * BLOCK :], count * BLOCK), reference)
    backend.copy_prefix(0, 2, count * BLOCK)
    np.testing.assert_array_equal(compute(backend, 2, TOKENS[count * BLOCK :], count * BLOCK), reference)


def test_blocks_that_were_stored_one_by_one_while_the_slot_grew(make: Maker, reference: Logits) -> None:
    backend = make()
    refs: list[BlockRef] = []
    for number in range(3):
        compute(backend, 0, TOKENS[number * BLOCK : (number + 1) * BLOCK], number * BLOCK)
        refs += stored(backend, 0, [number])
    assert backend.load_blocks(1, refs) == 3
    np.testing.assert_array_equal(compute(backend, 1, TAIL, 192), reference)


def test_blocks_of_a_slot_that_was_itself_loaded(make: Maker) -> None:
    backend = make()
    compute(backend, 0, TOKENS)
    refs = stored(backend, 0, range(3))
    backend.load_blocks(1, refs)
    assert stored(backend, 1, range(3)) == refs, "the same bytes"
    backend.copy_prefix(1, 2, 192)
    assert stored(backend, 2, range(3)) == refs


# -- where llama.cpp keeps it ----------------------------------------------------------------------------------------


def assert_in_place(backend: LlamaBackend, slot: int) -> None:
    """What is read in a slot's memory is what llama.cpp exports of it."""
    kv, layout = backend._context.kv, backend._known_layout()
    assert kv is not None
    here = kv.part(slot, backend.length(slot))
    assert here is not None
    exported = parse(backend._context.export(slot), layout).part(backend.length(slot))
    for side, copies in zip(here, exported, strict=True):
        for rows, copy in zip(side, copies, strict=True):
            np.testing.assert_array_equal(rows, copy.reshape(rows.shape))


@pytest.mark.parametrize("seed", range(4))
def test_kv_is_in_the_first_cells_of_its_slot_whatever_is_done(make: Maker, seed: int) -> None:
    """Batches of several slots, tokens that are taken back, loads, copies and exchanges."""
    backend, draw = make(), random.Random(seed)
    compute(backend, 0, TOKENS)
    refs = stored(backend, 0, range(3))
    for _ in range(40):
        slot, other = draw.sample(range(3), 2)
        match draw.choice(("decode", "decode", "cut", "load", "copy", "exchange")):
            case "decode":
                rows = []
                for each in draw.sample(range(3), draw.randint(1, 3)):
                    count = min(draw.choice((1, 7, 64)), 256 - backend.length(each))
                    if count:
                        rows.append(Rows(each, backend.length(each), TOKENS[:count], outputs=0))
                backend.decode(rows)
            case "cut":
                backend.truncate(slot, draw.randint(0, backend.length(slot)))
            case "load":
                backend.load_blocks(slot, refs[: draw.randint(1, 3)])
            case "copy" if length := backend.length(slot):
                backend.copy_prefix(slot, other, draw.randint(1, length))
            case "exchange":
                backend.exchange(slot, other)
        for each in range(3):
            assert_in_place(backend, each)


def test_kv_of_a_context_with_one_slot(make: Maker) -> None:
    """Its tensors have no dimension of streams."""
    backend = make(n_seqs=1)
    compute(backend, 0, TOKENS)
    assert_in_place(backend, 0)


def let_cells_be_elsewhere(backend: LlamaBackend, slot: int) -> None:
    """Let a slot of 199 tokens have 200, the last but one in cell 100: the token that was there is taken out, and those
    behind it are one position less."""
    context = backend._context
    c.llama_memory_seq_rm(context._memory, slot, 100, 101)
    backend.decode([Rows(slot, backend.length(slot), [5, 6], outputs=0)])
    c.llama_memory_seq_add(context._memory, slot, 101, -1, -1)


def test_kv_that_is_elsewhere_is_exported(make: Maker) -> None:
    file = FakeBlockFile()
    backend = make(file=file)
    compute(backend, 1, TOKENS[:199])
    let_cells_be_elsewhere(backend, 1)
    assert backend.length(1) == 200
    kv = backend._context.kv
    assert kv is not None
    assert kv.part(1, 200) is None
    stored(backend, 1, range(3))
    snapshot = parse(backend._context.export(1), backend._known_layout())
    assert snapshot.order[198] == 100
    for number in range(3):
        assert file.payloads[10 + number] == block_of(snapshot.part(192), number, BLOCK).tobytes()
    backend.copy_prefix(1, 2, 200)
    assert_in_place(backend, 2)
    backend.exchange(1, 2)
    assert_in_place(backend, 1)


def test_an_emptied_slot_begins_in_its_first_cells_again(make: Maker) -> None:
    backend = make()
    compute(backend, 0, TOKENS[:199])
    let_cells_be_elsewhere(backend, 0)
    backend.truncate(0, 0)
    compute(backend, 0, TOKENS)
    assert_in_place(backend, 0)


def test_a_context_whose_memory_is_not_known_exports(make: Maker) -> None:
    files = [FakeBlockFile(), FakeBlockFile()]
    for file in files:
        backend = make(file=file)
        if file is files[1]:
            backend._context.kv = None
        compute(backend, 0, TOKENS)
        stored(backend, 0, range(3))
    assert files[0].payloads == files[1].payloads


def test_memory_that_is_not_what_was_exported_is_not_used(make: Maker) -> None:
    backend = make()
    layout, context = backend._known_layout(), backend._context
    backend.decode([Rows(0, 0, [0], outputs=0)])
    state = context.export(0)
    KvMemory(context.tap, layout, state)
    wrong = state.copy()
    # Behind the last V row are the cell counts of the two other streams.
    wrong[-9] ^= 1
    with pytest.raises(SnapshotError, match="differ"):
        KvMemory(context.tap, layout, wrong)
    with pytest.raises(SnapshotError, match="KV rows of"):
        KvMemory(context.tap, replace(layout, k_rows=(64, 32)), state)


def greedy(backend: LlamaBackend, slot: int, logits: Logits, count: int, beside: Callable[[int], None]) -> list[int]:
    tokens = [int(logits.argmax())]
    for step in range(count):
        beside(step)
        backend.decode([Rows(slot, backend.length(slot), tokens[-1:], outputs=1)])
        tokens.append(int(backend.logits(slot).argmax()))
    return tokens


def test_a_copy_while_the_source_goes_on(make: Maker, reference: Logits) -> None:
    alone = make()
    expected = greedy(alone, 0, compute(alone, 0, TOKENS), 20, lambda step: None)
    backend = make()
    seen: list[Logits] = []

    def beside(step: int) -> None:
        if step in (0, 7, 15):
            backend.copy_prefix(0, 1 + step % 2, 192)
            seen.append(compute(backend, 1 + step % 2, TAIL, 192))

    logits = compute(backend, 0, TOKENS)
    assert greedy(backend, 0, logits, 20, beside) == expected
    assert len(seen) == 3
    for each in seen:
        np.testing.assert_array_equal(each, reference)


def test_loading_replaces_a_slot_and_leaves_the_others(make: Maker, reference: Logits) -> None:
    backend = make()
    compute(backend, 0, TOKENS)
    refs = stored(backend, 0, range(3))
    other = compute(backend, 1, prompt_of(130, 9))
    compute(backend, 2, prompt_of(230, 2))
    assert backend.load_blocks(2, refs) == 3
    assert [backend.length(slot) for slot in range(3)] == [200, 130, 192]
    np.testing.assert_array_equal(compute(backend, 2, TAIL, 192), reference)
    backend.truncate(1, 128)
    np.testing.assert_array_equal(compute(backend, 1, prompt_of(130, 9)[128:], 128), other)


def test_random_copies_loads_and_truncations(make: Maker) -> None:
    """Chains of blocks travel between slots and the file in any order; what a slot then says depends on its chain."""
    file = FakeBlockFile()
    backend = make(n_seqs=3, file=file)
    pieces = [prompt_of(BLOCK, seed) for seed in range(3)]
    probe = prompt_of(9, 8)
    expected: dict[tuple[int, ...], Logits] = {}
    fresh = make(n_seqs=1)
    saved: dict[tuple[int, ...], BlockRef] = {}
    held: list[tuple[int, ...]] = [()] * 3
    draw = random.Random(4)

    def check(slot: int) -> None:
        chain, n_past = held[slot], len(held[slot]) * BLOCK
        assert backend.length(slot) == n_past
        if chain not in expected:
            fresh.truncate(0, 0)
            expected[chain] = compute(fresh, 0, [*(token for name in chain for token in pieces[name]), *probe])
        np.testing.assert_array_equal(compute(backend, slot, probe, n_past), expected[chain])
        backend.truncate(slot, n_past)

    for _ in range(120):
        slot, other = draw.sample(range(3), 2)
        chain = held[slot]
        match draw.randrange(5):
            case 0 if len(chain) < 3:
                name = draw.randrange(3)
                compute(backend, slot, pieces[name], len(chain) * BLOCK)
                held[slot] = (*chain, name)
            case 1 if chain:
                count = draw.randint(1, len(chain))
                backend.copy_prefix(slot, other, count * BLOCK)
                held[other] = chain[:count]
            case 2 if chain:
                numbers = [number for number in range(len(chain)) if chain[: number + 1] not in saved]
                places = [(number, 100 + len(saved) + at) for at, number in enumerate(numbers)]
                for number, (place, digest) in zip(numbers, backend.store_blocks(slot, places), strict=True):
                    saved[chain[: number + 1]] = BlockRef(place, digest, finite=draw.random() < 0.5)
            case 3 if saved:
                wanted = draw.choice(sorted(saved))
                refs = [saved[wanted[: count + 1]] for count in range(len(wanted))]
                assert backend.load_blocks(slot, refs) == len(wanted)
                held[slot] = wanted
            case 4 if chain and draw.random() < 0.5:
                held[slot] = chain[: draw.randrange(len(chain))]
                backend.truncate(slot, len(held[slot]) * BLOCK)
        check(slot)
    assert len(expected) > 8
    assert len(saved) > 4


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("how", ["payload", "digest", "no digest", "unreadable", "missing", "short"])
@pytest.mark.parametrize("finite", [False, True])
def test_loading_stops_at_the_first_block_that_is_not_sound(
    make: Maker, reference: Logits, bad: int, how: str, finite: bool
) -> None:
    file = FakeBlockFile()
    backend = make(file=file)
    compute(backend, 0, TOKENS)
    refs = [BlockRef(ref.slot, ref.digest, finite) for ref in stored(backend, 0, range(3))]
    place, payload = refs[bad].slot, file.payloads[refs[bad].slot]
    match how:
        case "payload":
            file.payloads[place] = payload[:-1] + bytes([payload[-1] ^ 1])
        case "digest":
            refs[bad] = BlockRef(place, bytes(32), finite)
        case "no digest":
            refs[bad] = BlockRef(place, b"", finite)
        case "unreadable":
            file.broken.add(place)
        case "missing":
            del file.payloads[place]
        case "short":
            file.payloads[place] = payload[:-1]
    compute(backend, 1, prompt_of(100, 3))
    assert backend.load_blocks(1, refs) == bad
    assert backend.length(1) == bad * BLOCK
    np.testing.assert_array_equal(compute(backend, 1, TOKENS[bad * BLOCK :], bad * BLOCK), reference)


def with_value(backend: LlamaBackend, slot: int, value: float, block: int, at: int) -> None:
    """Put one value into the KV of a slot, as an overflow in a layer would."""
    layout = backend._known_layout()
    whole = parse(backend._context.export(slot), layout).part(3 * BLOCK)
    payloads = np.stack([block_of(whole, number, BLOCK) for number in range(3)])
    payloads[block].view("<f2")[at] = value
    backend._context.restore(slot, compose(layout, slot, [block_part(layout, payloads, BLOCK)]))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_neither_stored_nor_loaded(make: Maker, value: float) -> None:
    file = FakeBlockFile()
    backend = make(file=file)
    compute(backend, 0, TOKENS)
    refs = stored(backend, 0, range(3))
    with_value(backend, 0, value, block=1, at=4000)
    assert [place for place, _ in backend.store_blocks(0, [(0, 20), (1, 21), (2, 22)])] == [20, 22]
    assert 21 not in file.payloads
    damaged = bytearray(file.payloads[refs[1].slot])
    damaged[8000:8002] = np.array([value], "<f2").tobytes()
    file.payloads[refs[1].slot] = bytes(damaged)
    # The right hash of wrong values: a hash proves bytes, not arithmetic.
    refs[1] = BlockRef(refs[1].slot, blake3(damaged).digest())
    assert backend.load_blocks(1, refs) == 1
    assert backend.length(1) == BLOCK


def test_what_cannot_be_written_is_not_reported(make: Maker) -> None:
    backend = make(file=FakeBlockFile(broken={11}))
    compute(backend, 0, TOKENS)
    assert [place for place, _ in backend.store_blocks(0, [(0, 10), (1, 11), (2, 12)])] == [10, 12]


def test_nothing_granted_and_no_file_cost_nothing(make: Maker, tiny: Model) -> None:
    backend = make()
    assert backend.store_blocks(0, []) == []
    assert backend.load_blocks(0, []) == 0
    context = Context(tiny, ContextOptions(n_ctx=256, n_seqs=1, n_threads=1))
    try:
        bare = LlamaBackend(tiny, context, BLOCK)
        compute(bare, 0, TOKENS[:100])
        assert bare.store_blocks(0, [(0, 1)]) == []
        bare.truncate(0, 0)
        assert bare.load_blocks(0, [BlockRef(1, bytes(32))]) == 0
    finally:
        context.close()


def test_blocks_that_a_slot_does_not_hold_are_an_error(make: Maker) -> None:
    backend = make()
    compute(backend, 0, TOKENS[:100])
    with pytest.raises(SnapshotError):
        backend.store_blocks(0, [(1, 5)])


def test_more_than_a_slot_holds_is_refused_and_leaves_the_context_usable(make: Maker, reference: Logits) -> None:
    file = FakeBlockFile()
    long = make(n_seqs=1, n_ctx=512, file=file)
    tokens = prompt_of(448, 4)
    compute(long, 0, tokens)
    refs = stored(long, 0, range(7))
    short = make(n_seqs=2, n_ctx=256, file=file)
    with pytest.raises(DecodeFailed):
        short.load_blocks(0, refs)
    short.truncate(0, 0)
    np.testing.assert_array_equal(compute(short, 0, TOKENS), reference)
    np.testing.assert_array_equal(compute(short, 1, TOKENS), reference)


def test_a_state_of_another_sequence_count_is_refused_before_llama_cpp_sees_it(make: Maker) -> None:
    first, second = make(n_seqs=3), make(n_seqs=2)
    compute(first, 0, TOKENS[:70])
    with pytest.raises(SnapshotError, match="stream count"):
        parse(first._context.export(0), second._known_layout())
