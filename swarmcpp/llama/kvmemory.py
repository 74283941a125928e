"""A context's KV rows where llama.cpp keeps them: what is stored or copied needs no export of a whole sequence.

llama_kv_cache of the pinned llama.cpp has per layer one tensor of K rows and one of V rows (not transposed, with flash
attention), of `n_stream` times as many cells as a sequence may have tokens. That token i of a sequence is in cell i of
its stream follows from how its cells are used here: they are filled one after another and given up from the end. It is
checked all the same, in every decode and after every restored state; what is elsewhere is exported instead.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence

import numpy as np

from swarmcpp._native import GraphTap
from swarmcpp.core import KvLayout
from swarmcpp.errors import SnapshotError
from swarmcpp.llama.snapshot import Bytes, Part, parse

logger = logging.getLogger(__name__)


class KvMemory:
    """Views of the KV of one context, shape (cells of all streams, row bytes) per layer. Valid as long as that is."""

    def __init__(self, tap: GraphTap, layout: KvLayout, state: Bytes) -> None:
        """`tap` has seen the decode of all that sequence 0 has, and `state` is what llama.cpp exports of that.

        Raises SnapshotError when the rows are not where the tap saw them written.
        """
        places = {(side, layer): place for side, layer, *place in tap.places()}
        sides = [[places[key] for key in sorted(places) if key[0] == side] for side in "kv"]
        seen = tuple(tuple(row_bytes for _, row_bytes, _ in side) for side in sides)
        counts = {n_rows for side in sides for _, _, n_rows in side}
        if seen != (layout.k_rows, layout.v_rows) or len(counts) != 1:
            raise SnapshotError(f"KV rows of {seen} bytes in {counts} cells where a state has {layout}")
        (n_rows,) = counts
        self.n_cells = n_rows // layout.n_stream
        self._layout = layout
        self._k, self._v = ([_view(*place) for place in side] for side in sides)
        self._elsewhere: set[int] = set()
        exported = parse(state, layout)
        here = zip((*self._k, *self._v), (*exported.k, *exported.v), strict=True)
        if not all(np.array_equal(rows[: exported.n_tokens], copies) for rows, copies in here):
            raise SnapshotError("KV rows that differ from those of the state")

    def part(self, seq: int, n_tokens: int) -> Part | None:
        """The first `n_tokens` of a sequence, which it must have; None when they are not in its first cells."""
        if seq in self._elsewhere:
            return None
        cells = slice(seq * self.n_cells, seq * self.n_cells + n_tokens)
        return [rows[cells] for rows in self._k], [rows[cells] for rows in self._v]

    def check_decode(self, seqs: Sequence[int], positions: Sequence[int], cells: Sequence[int]) -> None:
        """Rows of these sequences and positions have been written to `cells`: those of each sequence in their order."""
        expected = [seq * self.n_cells + position for seq, position in zip(seqs, positions, strict=True)]
        if cells == expected:
            return
        # llama.cpp takes rows of several sequences in turn.
        found = _by_stream(cells, self.n_cells)
        for seq, wanted in _by_stream(expected, self.n_cells).items():
            if found.get(seq) != wanted:
                self._leave(seq)

    def check_restored(self, seq: int, state: Bytes) -> None:
        """A sequence has got this state."""
        # One layer is enough: the others use the same cells.
        k, first = parse(state, self._layout).k[0], seq * self.n_cells
        if np.array_equal(self._k[0][first : first + len(k)].reshape(k.shape), k):
            self._elsewhere.discard(seq)
        else:
            self._leave(seq)

    def _leave(self, seq: int) -> None:
        if seq not in self._elsewhere:
            logger.debug("slot %d has KV in cells that are not its first ones: it is exported until it is empty", seq)
        self._elsewhere.add(seq)

    def check_emptied(self, seq: int) -> None:
        """A sequence has no tokens any more."""
        self._elsewhere.discard(seq)


def _by_stream(cells: Sequence[int], n_cells: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for cell in cells:
        found.setdefault(cell // n_cells, []).append(cell)
    return found


def _view(address: int, row_bytes: int, n_rows: int) -> Bytes:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (n_rows, row_bytes))
