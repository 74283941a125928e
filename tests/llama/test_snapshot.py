"""States of sequences: what is cut from one and put into another is the same, and every other state is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp._native import all_finite_f16
from swarmcpp.core import KvLayout
from swarmcpp.errors import SnapshotError
from swarmcpp.llama.snapshot import Bytes, Snapshot, block_of, block_part, compose, learn_layout, parse


@dataclass(frozen=True)
class State:
    """What a state says, apart from how: `k[layer][position]` is the row of a token."""

    layout: KvLayout
    k: list[list[bytes]]
    v: list[list[bytes]]
    cells: list[int]
    """Positions in the order of their cells."""
    stream: int = 0
    seq: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.cells)


@dataclass(frozen=True)
class Field:
    """A number in a written state."""

    name: str
    offset: int
    kind: str


def written(state: State) -> tuple[bytes, list[Field]]:
    """The state as llama.cpp lays it out, by the description in swarmcpp.llama.snapshot alone."""
    out = bytearray()
    found: list[Field] = []

    def put(name: str, kind: str, value: int) -> None:
        found.append(Field(name, len(out), kind))
        out.extend(struct.pack(kind, value))

    layout = state.layout
    put("magic", "<I", layout.magic)
    put("seq", "<i", state.seq)
    put("n_stream", "<I", layout.n_stream)
    for stream in range(layout.n_stream):
        filled = stream == state.stream and state.n_tokens > 0
        put("cell_count", "<I", state.n_tokens if filled else 0)
        if not filled:
            continue
        for position in state.cells:
            put("pos", "<i", position)
            put("n_seq_id", "<I", 1)
            put("cell_seq", "<i", state.seq)
        put("v_trans", "<I", 0)
        put("n_layer", "<I", layout.n_layers)
        sides = ((layout.k_type, layout.k_rows, state.k), (layout.v_type, layout.v_rows, state.v))
        for kind, widths, rows in sides:
            for width, layer in zip(widths, rows, strict=True):
                put("type", "<i", kind)
                put("row_bytes", "<Q", width)
                for position in state.cells:
                    # A position that no token has is still written with some row.
                    out.extend(layer[position % len(layer)])
    return bytes(out), found


def array(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


widths = st.lists(st.integers(1, 6).map(lambda pairs: 2 * pairs), min_size=1, max_size=4)


@st.composite
def states(draw: st.DrawFn, min_tokens: int = 1, max_tokens: int = 13) -> State:
    k_rows = tuple(draw(widths))
    v_rows = tuple(draw(st.lists(st.integers(1, 12), min_size=len(k_rows), max_size=len(k_rows))))
    n_stream = draw(st.integers(1, 5))
    n_tokens = draw(st.integers(min_tokens, max_tokens))
    layout = KvLayout(
        draw(st.integers(0, 2**32 - 1)), n_stream, draw(st.integers(0, 9)), draw(st.integers(0, 9)), k_rows, v_rows
    )
    rng = random.Random(draw(st.integers(0, 2**16)))
    k, v = ([[rng.randbytes(width) for _ in range(n_tokens)] for width in rows] for rows in (k_rows, v_rows))
    cells = draw(st.permutations(range(n_tokens))) if draw(st.booleans()) else list(range(n_tokens))
    return State(layout, k, v, list(cells), draw(st.integers(0, n_stream - 1)), draw(st.integers(0, 9)))


def rows_of(snapshot: Snapshot) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """Rows by layer and position."""

    def side(layers: tuple[Bytes, ...]) -> list[list[bytes]]:
        return [[layer[cell].tobytes() for cell in snapshot.order] for layer in layers]

    return side(snapshot.k), side(snapshot.v)


# -- reading ---------------------------------------------------------------------------------------------------------


@given(states())
def test_a_state_is_read_as_it_was_written(state: State) -> None:
    blob = array(written(state)[0])
    snapshot = parse(blob, state.layout)
    assert snapshot.n_tokens == state.n_tokens
    assert rows_of(snapshot) == (state.k, state.v)
    assert snapshot.order.tolist() == [state.cells.index(position) for position in range(state.n_tokens)]


@given(states())
def test_the_layout_is_learned_from_any_state(state: State) -> None:
    assert learn_layout(array(written(state)[0])) == state.layout


@given(states(min_tokens=0, max_tokens=0))
def test_an_empty_state_has_no_tokens_and_no_layout(state: State) -> None:
    blob = array(written(state)[0])
    snapshot = parse(blob, state.layout)
    assert snapshot.n_tokens == 0
    assert len(snapshot.k) == len(snapshot.v) == state.layout.n_layers
    assert [len(rows) for side in snapshot.part(0) for rows in side] == [0] * 2 * state.layout.n_layers
    with pytest.raises(SnapshotError, match="empty"):
        learn_layout(blob)


# -- cutting and composing -------------------------------------------------------------------------------------------


@given(states(), st.integers(1, 5), st.data())
def test_blocks_hold_k_by_layer_then_v_by_layer(state: State, block_tokens: int, data: st.DataObject) -> None:
    snapshot = parse(array(written(state)[0]), state.layout)
    held = snapshot.part(data.draw(st.integers(0, state.n_tokens)))
    for number in range(len(held[0][0]) // block_tokens):
        payload = block_of(held, number, block_tokens)
        assert payload.shape == (state.layout.token_bytes * block_tokens,)
        part = slice(number * block_tokens, (number + 1) * block_tokens)
        assert payload.tobytes() == b"".join(b"".join(layer[part]) for layer in (*state.k, *state.v))
        assert payload.flags["C_CONTIGUOUS"]


@given(states(), st.integers(1, 5), st.integers(0, 9))
def test_blocks_compose_to_the_same_rows(state: State, block_tokens: int, seq: int) -> None:
    snapshot = parse(array(written(state)[0]), state.layout)
    full = state.n_tokens // block_tokens
    payloads = np.empty((full, state.layout.token_bytes * block_tokens), np.uint8)
    for number in range(full):
        payloads[number] = block_of(snapshot.part(state.n_tokens), number, block_tokens)
    part = block_part(state.layout, payloads, block_tokens)
    kept = full * block_tokens
    again = parse(compose(state.layout, seq, [part]), state.layout)
    assert again.n_tokens == kept
    assert rows_of(again) == ([layer[:kept] for layer in state.k], [layer[:kept] for layer in state.v])


@given(states(), st.data())
def test_a_prefix_composes_to_the_same_rows(state: State, data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(1, state.n_tokens))
    snapshot = parse(array(written(state)[0]), state.layout)
    again = parse(compose(state.layout, 3, [snapshot.part(n_tokens)]), state.layout)
    assert rows_of(again) == ([layer[:n_tokens] for layer in state.k], [layer[:n_tokens] for layer in state.v])


@given(states(min_tokens=2), st.integers(0, 9), st.data())
def test_what_is_composed_is_what_llama_cpp_would_write(state: State, seq: int, data: st.DataObject) -> None:
    """Byte for byte, from any number of parts: the tokens of the first stream, cells in order."""
    snapshot = parse(array(written(state)[0]), state.layout)
    cut = data.draw(st.integers(1, state.n_tokens - 1))
    rows = [[np.array([list(row) for row in layer], np.uint8) for layer in side] for side in (state.k, state.v)]
    rest = ([layer[cut:] for layer in rows[0]], [layer[cut:] for layer in rows[1]])
    blob = compose(state.layout, seq, [snapshot.part(cut), rest])
    ordered = replace(state, cells=list(range(state.n_tokens)), stream=0, seq=seq)
    assert blob.tobytes() == written(ordered)[0]


@given(states(min_tokens=0, max_tokens=0))
def test_nothing_composes_to_an_empty_state(state: State) -> None:
    assert compose(state.layout, state.seq, []).tobytes() == written(state)[0]


@given(states(), st.integers(1, 5))
def test_blocks_that_are_not_there_are_an_error(state: State, block_tokens: int) -> None:
    snapshot = parse(array(written(state)[0]), state.layout)
    full = state.n_tokens // block_tokens
    for number in (full, full + 1, -1):
        with pytest.raises(SnapshotError):
            block_of(snapshot.part(state.n_tokens), number, block_tokens)
    for n_tokens in (state.n_tokens + 1, -1):
        with pytest.raises(SnapshotError):
            snapshot.part(n_tokens)


@given(states(), st.integers(1, 5), st.sampled_from((-1, 1, 7)))
def test_payloads_of_another_size_are_an_error(state: State, block_tokens: int, more: int) -> None:
    payloads = np.zeros((2, state.layout.token_bytes * block_tokens + more), np.uint8)
    with pytest.raises(SnapshotError):
        block_part(state.layout, payloads, block_tokens)


# -- refusing --------------------------------------------------------------------------------------------------------

FREE = ("seq", "cell_seq")
"""Not judged: a state is composed anew for the sequence that takes it."""


def refused(blob: Bytes, layout: KvLayout) -> None:
    with pytest.raises(SnapshotError) as caught:
        parse(blob, layout)
    assert "\n" not in str(caught.value)


@given(states(), st.data())
def test_every_field_that_is_changed_is_noticed(state: State, data: st.DataObject) -> None:
    blob, fields = written(state)
    for field in fields:
        size = struct.calcsize(field.kind)
        old = blob[field.offset : field.offset + size]
        new = data.draw(st.binary(min_size=size, max_size=size).filter(lambda drawn, old=old: drawn != old))
        damaged = array(blob[: field.offset] + new + blob[field.offset + size :])
        if field.name in FREE:
            assert rows_of(parse(damaged, state.layout)) == (state.k, state.v)
        else:
            refused(damaged, state.layout)
            refused_or_other(damaged, state.layout)


def refused_or_other(blob: Bytes, layout: KvLayout) -> None:
    """`learn_layout` knows no layout: it may find another one, but only one that the blob has."""
    try:
        learned = learn_layout(blob)
    except SnapshotError:
        return
    assert learned != layout
    parse(blob, learned)


@given(states(max_tokens=5))
def test_every_cut_and_every_extension_is_noticed(state: State) -> None:
    blob = written(state)[0]
    for length in range(len(blob)):
        refused(array(blob[:length]), state.layout)
        with pytest.raises(SnapshotError):
            learn_layout(array(blob[:length]))
    for tail in (b"\0", bytes(4), bytes(4096), blob):
        refused(array(blob + tail), state.layout)
        with pytest.raises(SnapshotError):
            learn_layout(array(blob + tail))


CHANGES: dict[str, Callable[[KvLayout], KvLayout]] = {
    "magic": lambda layout: replace(layout, magic=layout.magic ^ 1),
    "streams": lambda layout: replace(layout, n_stream=layout.n_stream + 1),
    "K type": lambda layout: replace(layout, k_type=layout.k_type + 1),
    "V type": lambda layout: replace(layout, v_type=layout.v_type + 1),
    "one layer more": lambda layout: replace(layout, k_rows=(*layout.k_rows, 2), v_rows=(*layout.v_rows, 2)),
    "one layer less": lambda layout: replace(layout, k_rows=layout.k_rows[1:], v_rows=layout.v_rows[1:]),
    "wider K": lambda layout: replace(layout, k_rows=(layout.k_rows[0] + 2, *layout.k_rows[1:])),
    "swapped sides": lambda layout: replace(layout, k_rows=layout.v_rows, v_rows=layout.k_rows),
    "swapped layers": lambda layout: replace(layout, k_rows=layout.k_rows[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
@given(states())
def test_another_layout_is_refused(change: str, state: State) -> None:
    other = CHANGES[change](state.layout)
    if other != state.layout:
        refused(array(written(state)[0]), other)


@given(states(min_tokens=2), st.data())
def test_positions_must_be_all_from_0_each_once(state: State, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, state.n_tokens - 1))
    position = data.draw(st.integers(-5, 20).filter(lambda drawn: drawn != state.cells[at]))
    refused(
        array(written(replace(state, cells=[*state.cells[:at], position, *state.cells[at + 1 :]]))[0]), state.layout
    )


def test_two_streams_with_cells_are_refused() -> None:
    layout = KvLayout(7, 2, 1, 1, (2,), (2,))
    one = written(State(replace(layout, n_stream=1), [[b"ab"]], [[b"cd"]], [0]))[0]
    refused(array(struct.pack("<IiI", 7, 0, 2) + one[12:] + one[12:]), layout)


@pytest.mark.parametrize("count", [2**31 - 1, 2**31, 2**32 - 1])
def test_absurd_numbers_cost_nothing(count: int) -> None:
    layout = KvLayout(7, 1, 1, 1, (2,), (2,))
    blob, fields = written(State(layout, [[b"ab"]], [[b"cd"]], [0]))
    for field in fields:
        if field.kind == "<I" and field.name not in FREE:
            damaged = bytearray(blob)
            struct.pack_into("<I", damaged, field.offset, count)
            refused(array(bytes(damaged)), layout)
            refused_or_other(array(bytes(damaged)), layout)
    wide = bytearray(blob)
    struct.pack_into("<Q", wide, next(field.offset for field in fields if field.name == "row_bytes"), 2**64 - 1)
    refused(array(bytes(wide)), layout)
    with pytest.raises(SnapshotError):
        learn_layout(array(bytes(wide)))


def test_rows_of_no_bytes_are_no_layout() -> None:
    layout = KvLayout(7, 1, 1, 1, (0,), (2,))
    with pytest.raises(SnapshotError):
        learn_layout(array(written(State(layout, [[b""]], [[b"cd"]], [0]))[0]))


def test_twenty_thousand_mutations() -> None:
    """Only SnapshotError, or a state that differs in values and sequence ids alone."""
    rng = random.Random(1)
    accepted = 0
    for turn in range(100):
        state = states_at(rng)
        blob, fields = written(state)
        judged = [field for field in fields if field.name not in FREE]
        for _ in range(200):
            damaged = mutated(rng, blob)
            try:
                parse(array(damaged), state.layout)
            except SnapshotError:
                pass
            else:
                accepted += 1
                assert len(damaged) == len(blob), turn
                for field in judged:
                    part = slice(field.offset, field.offset + struct.calcsize(field.kind))
                    assert damaged[part] == blob[part], field
            try:
                learned = learn_layout(array(damaged))
            except SnapshotError:
                continue
            assert parse(array(damaged), learned).n_tokens > 0
    assert accepted > 100, "values must be free, or this tells nothing"


def states_at(rng: random.Random) -> State:
    """A state, without hypothesis, which would take seconds for so many."""
    n_layers, n_tokens, n_stream = rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 3)
    k_rows, v_rows = (tuple(rng.randint(1, 6) for _ in range(n_layers)) for _ in range(2))
    layout = KvLayout(rng.getrandbits(32), n_stream, 1, rng.randint(0, 1), k_rows, v_rows)
    k, v = ([[rng.randbytes(width) for _ in range(n_tokens)] for width in rows] for rows in (k_rows, v_rows))
    return State(layout, k, v, rng.sample(range(n_tokens), n_tokens), rng.randrange(n_stream))


def mutated(rng: random.Random, blob: bytes) -> bytes:
    """`blob` with bytes changed, removed, inserted or repeated."""
    data = bytearray(blob)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(8):
            case 0:
                del data[at : at + rng.randint(1, 16)]
            case 1:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case 3:
                data[at : at + 4] = rng.choice((0, 1, 2, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
            case _ if data:
                data[min(at, len(data) - 1)] ^= rng.randint(1, 255)
    return bytes(data) if bytes(data) != blob else blob[:-1]


# -- values ----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=64))
@settings(max_examples=300)
def test_the_finite_check_agrees_with_numpy(data: bytes) -> None:
    data = data[: len(data) // 2 * 2]
    assert all_finite_f16(array(data)) == bool(np.isfinite(np.frombuffer(data, "<f2")).all())


def test_the_finite_check_knows_every_half() -> None:
    halves = np.arange(2**16, dtype="<u2")
    finite = np.isfinite(halves.view("<f2"))
    assert [all_finite_f16(half.view(np.uint8)) for half in halves[:, None]] == finite.tolist()
    assert all_finite_f16(halves[finite].view(np.uint8))


@pytest.mark.parametrize("at", [0, 1, 1023, 4095])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_bad_value_among_many_is_found(at: int, value: float) -> None:
    halves = np.ones(4096, "<f2")
    halves[at] = value
    assert not all_finite_f16(halves.view(np.uint8))
