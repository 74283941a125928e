"""llama.cpp's sequence state as numpy views: parse it, cut it into blocks, compose it from blocks.

The state of one sequence in a context with streams, as `llama_kv_cache::state_write` of the pinned llama.cpp has it,
all little-endian:

    u32 magic, i32 seq_id, u32 n_stream, then for each stream: u32 cell_count, and where that is not 0:
        per cell: i32 position, u32 n_seq_id (1), i32 seq_id
        u32 v_trans (0), u32 n_layer
        per layer: i32 type, u64 row bytes, K rows (cell_count x row bytes)
        per layer: i32 type, u64 row bytes, V rows

A state carries no identity and llama.cpp asserts on some wrong ones, so nothing is handed to it that was not composed
here from checked blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmcpp.core import KvLayout
from swarmcpp.errors import SnapshotError

Bytes = npt.NDArray[np.uint8]
Part = tuple[Sequence[Bytes], Sequence[Bytes]]
"""K rows per layer and V rows per layer of some tokens, each of shape (tokens, row bytes)."""

_CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])
_HEAD_BYTES = 12
_LAYER_HEAD = 12


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A parsed state: per layer K and V rows, shape (cells, row bytes), views into the blob in cell order.

    `order[i]` is the cell of position i: cells of a sequence may lie in any order.
    """

    layout: KvLayout
    order: npt.NDArray[np.intp]
    k: tuple[Bytes, ...]
    v: tuple[Bytes, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens in the state: positions 0 to n_tokens - 1."""
        return len(self.order)

    def part(self, n_tokens: int) -> Part:
        """The first `n_tokens` of it. Raises SnapshotError when it has not that many."""
        if not 0 <= n_tokens <= self.n_tokens:
            raise SnapshotError(f"{n_tokens} tokens of a state of {self.n_tokens}")
        cells = _as_slice(self.order[:n_tokens])
        return [rows[cells] for rows in self.k], [rows[cells] for rows in self.v]


def _as_slice(cells: npt.NDArray[np.intp]) -> Any:
    """`cells` as a slice where they are consecutive, which copies several times faster."""
    if len(cells) and np.array_equal(cells, np.arange(cells[0], cells[0] + len(cells))):
        return slice(int(cells[0]), int(cells[0]) + len(cells))
    return cells


class _Reader:
    """A cursor over the blob that never reads past its end."""

    def __init__(self, blob: Bytes) -> None:
        self._blob = blob
        self.at = 0

    def take(self, n_bytes: int) -> Bytes:
        if not 0 <= n_bytes <= len(self._blob) - self.at:
            raise SnapshotError(f"state ends at byte {len(self._blob)}, {n_bytes} more are needed at {self.at}")
        self.at += n_bytes
        return self._blob[self.at - n_bytes : self.at]

    def number(self, kind: str) -> int:
        dtype = np.dtype(kind)
        return int(self.take(dtype.itemsize).view(dtype)[0])

    def expect(self, kind: str, wanted: int, what: str) -> None:
        got = self.number(kind)
        if got != wanted:
            raise SnapshotError(f"{what} is {got}, expected {wanted}, at byte {self.at}")


def parse(blob: Bytes, layout: KvLayout) -> Snapshot:
    """Views into a state of the context that `layout` describes. Raises SnapshotError on any difference from it."""
    reader = _Reader(blob)
    reader.expect("<u4", layout.magic, "magic")
    reader.take(4)
    reader.expect("<u4", layout.n_stream, "stream count")
    found: Snapshot | None = None
    for _ in range(layout.n_stream):
        count = reader.number("<u4")
        if count == 0:
            continue
        if found is not None:
            raise SnapshotError("more than one stream holds cells")
        found = _parse_stream(reader, count, layout)
    if reader.at != len(blob):
        raise SnapshotError(f"{len(blob) - reader.at} bytes too many")
    if found is None:
        empty = np.empty((0, 0), np.uint8)
        return Snapshot(layout, np.empty(0, np.intp), (empty,) * layout.n_layers, (empty,) * layout.n_layers)
    return found


def _parse_stream(reader: _Reader, count: int, layout: KvLayout) -> Snapshot:
    cells = reader.take(count * _CELL.itemsize).view(_CELL)
    if not np.all(cells["n_seq"] == 1):
        raise SnapshotError("a cell belongs to another number of sequences than one")
    order = np.argsort(cells["pos"], kind="stable")
    if not np.array_equal(cells["pos"][order], np.arange(count)):
        raise SnapshotError("positions are not 0 to n-1, each once")
    reader.expect("<u4", 0, "V transposition")
    reader.expect("<u4", layout.n_layers, "layer count")
    k = tuple(_parse_layer(reader, count, layout.k_type, row) for row in layout.k_rows)
    v = tuple(_parse_layer(reader, count, layout.v_type, row) for row in layout.v_rows)
    return Snapshot(layout, order, k, v)


def _parse_layer(reader: _Reader, count: int, kind: int, row_bytes: int) -> Bytes:
    reader.expect("<i4", kind, "tensor type")
    reader.expect("<u8", row_bytes, "row size")
    return reader.take(count * row_bytes).reshape(count, row_bytes)


def learn_layout(blob: Bytes) -> KvLayout:
    """The layout of the context that exported `blob` (a state of one sequence with at least one token).

    Raises SnapshotError for states of another shape: transposed V, several caches, cells with extra data.
    """
    reader = _Reader(blob)
    magic = reader.number("<u4")
    reader.take(4)
    n_stream = reader.number("<u4")
    if not 0 < n_stream <= 4096:
        raise SnapshotError(f"{n_stream} streams")
    count = 0
    for _ in range(n_stream):
        count = reader.number("<u4")
        if count:
            break
    if not count:
        raise SnapshotError("the state is empty")
    reader.take(count * _CELL.itemsize)
    reader.expect("<u4", 0, "V transposition")
    n_layers = reader.number("<u4")
    if not 0 < n_layers <= 4096:
        raise SnapshotError(f"{n_layers} layers")
    k_types, k_rows = _learn_layers(reader, count, n_layers)
    v_types, v_rows = _learn_layers(reader, count, n_layers)
    if len(set(k_types)) != 1 or len(set(v_types)) != 1:
        raise SnapshotError("layers have different KV types")
    layout = KvLayout(magic, n_stream, k_types[0], v_types[0], k_rows, v_rows)
    parse(blob, layout)
    return layout


def _learn_layers(reader: _Reader, count: int, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    types: list[int] = []
    rows: list[int] = []
    for _ in range(n_layers):
        types.append(reader.number("<i4"))
        rows.append(reader.number("<u8"))
        if not rows[-1]:
            raise SnapshotError(f"a layer's rows have no bytes, at byte {reader.at}")
        reader.take(count * rows[-1])
    return tuple(types), tuple(rows)


def compose(layout: KvLayout, seq: int, parts: Sequence[Part]) -> Bytes:
    """A state for `llama_state_seq_set_data` into sequence `seq`, whose tokens are those of `parts`, one after another.

    The rows of a part may have any shape that reshapes to a part's.
    """
    counts = [part[0][0].size // layout.k_rows[0] for part in parts]
    n_tokens = sum(counts)
    head = np.array([layout.magic, seq, layout.n_stream], "<i8").astype("<u4")
    size = _HEAD_BYTES + 4 * layout.n_stream + n_tokens * (_CELL.itemsize + layout.token_bytes)
    size += 8 + 2 * layout.n_layers * _LAYER_HEAD if n_tokens else 0
    blob = np.empty(size, np.uint8)
    blob[:_HEAD_BYTES] = head.view(np.uint8)
    at = _HEAD_BYTES
    for stream in range(layout.n_stream):
        filled = stream == 0 and n_tokens > 0
        at = _put(blob, at, "<u4", n_tokens if filled else 0)
        if not filled:
            continue
        cells = np.empty(n_tokens, _CELL)
        cells["pos"], cells["n_seq"], cells["seq"] = np.arange(n_tokens), 1, seq
        blob[at : at + cells.nbytes] = cells.view(np.uint8)
        at = _put(blob, at + cells.nbytes, "<u4", 0)
        at = _put(blob, at, "<u4", layout.n_layers)
        for side, kind, rows in ((0, layout.k_type, layout.k_rows), (1, layout.v_type, layout.v_rows)):
            for layer, row_bytes in enumerate(rows):
                at = _put(blob, _put(blob, at, "<i4", kind), "<u8", row_bytes)
                for part, count in zip(parts, counts, strict=True):
                    target = blob[at : at + count * row_bytes]
                    source = part[side][layer]
                    target.reshape(source.shape)[...] = source
                    at += count * row_bytes
    return blob


def _put(blob: Bytes, at: int, kind: str, value: int) -> int:
    data = np.array([value], kind).view(np.uint8)
    blob[at : at + len(data)] = data
    return at + len(data)


def block_of(part: Part, number: int, block_tokens: int) -> Bytes:
    """The payload of full block `number` of the tokens of a part, shape (block bytes,): K layers, then V layers.

    Raises SnapshotError when the part does not hold that many tokens.
    """
    start, stop = number * block_tokens, (number + 1) * block_tokens
    held = len(part[0][0])
    if not 0 <= start < stop <= held:
        raise SnapshotError(f"tokens {start} to {stop} of {held}")
    return np.concatenate([rows[start:stop].reshape(-1) for side in part for rows in side])


def block_part(layout: KvLayout, payloads: Bytes, block_tokens: int) -> Part:
    """Payloads of consecutive blocks, shape (count, block bytes), as a part for `compose`."""
    at = 0
    sides: list[list[Bytes]] = []
    for rows in (layout.k_rows, layout.v_rows):
        side: list[Bytes] = []
        for row_bytes in rows:
            side.append(payloads[:, at : at + row_bytes * block_tokens])
            at += row_bytes * block_tokens
        sides.append(side)
    if at != payloads.shape[1]:
        raise SnapshotError(f"a block of {payloads.shape[1]} bytes where the layout has {at}")
    return sides[0], sides[1]
