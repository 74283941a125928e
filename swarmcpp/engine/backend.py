"""What the loops drive: one model with its context, whole or a slice of it. Used by one thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from swarmcpp.core import BlockRef, GenerateRequest, Rows, SamplerLike, Token
from swarmcpp.wire.codec import Buffer, RowEncoding
from swarmcpp.wire.engine import RunPart, UseArena

logger = logging.getLogger(__name__)

FloatRows = npt.NDArray[np.float32]
OpenArena = Callable[[UseArena], None]
"""Opens the node's arena for the backend. Raises OSError when it cannot."""


def opens(open_arena: OpenArena, message: UseArena) -> bool:
    """Whether the node's arena can be opened; a line in the log says why not."""
    try:
        open_arena(message)
    except OSError as error:
        logger.warning("%s: the engine cannot open the arena: %s", message.path, error)
        return False
    return True


class Backend(Protocol):
    """What whole models and slices have in common: sequences in slots, their KV, and what samples."""

    n_slots: int
    n_ctx: int
    """Tokens that one slot holds."""
    max_rows: int
    """Rows of one call at most, of which `max_outputs` may be outputs."""
    max_outputs: int

    def sampler(self, request: GenerateRequest) -> SamplerLike:
        """A sampler that goes on after `request.generated`."""
        ...

    def sample(self, sampler: SamplerLike, slot: int, output: int = 0) -> Token:
        """The token after one of the rows of `slot` in the last call that asked for output; `output` counts them from
        the first. A sampler draws once for each token, in their order."""
        ...

    def truncate(self, slot: int, n_past: int) -> None:
        """Forget the slot's positions from `n_past`."""
        ...

    def length(self, slot: int) -> int:
        """Tokens in the slot's KV."""
        ...

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        """Replace the KV of slot `target` by the first `n_tokens` of slot `source`."""
        ...

    def load_blocks(self, slot: int, blocks: Sequence[BlockRef]) -> int:
        """Replace a slot's KV by that of `blocks`; how many of them were sound and are loaded, from the first."""
        ...

    def store_blocks(self, slot: int, grants: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
        """Write blocks of a slot's KV into the arena; grants are (block number, arena slot).

        Returns (arena slot, BLAKE3 of the payload) of each that was written; values that are not finite are not.
        """
        ...


class WholeBackend(Backend, Protocol):
    """A whole model: token ids go in."""

    eog_tokens: frozenset[int]

    def decode(self, rows: Sequence[Rows]) -> None:
        """Compute rows; their KV is appended to their slots.

        Raises DecodeAborted (some rows may be in the KV: truncate before going on) and DecodeFailed (unusable).
        """
        ...


class StageBackend(Backend, Protocol):
    """A slice: rows of hidden state go in, and come out unless it is the tail."""

    n_embd: int
    is_tail: bool

    def compute(self, slots: Sequence[int], parts: Sequence[RunPart], rows: FloatRows) -> FloatRows:
        """Compute rows, which must continue the KV of the slots. What comes out, shape (rows of all parts, n_embd), in
        the order of what goes in; at the tail none.

        Raises DecodeFailed: truncate before going on.
        """
        ...

    def finite(self, slot: int) -> bool:
        """Whether all logits after the rows of `slot` with output are finite. Tail only."""
        ...

    def encode(self, rows: FloatRows, encoding: RowEncoding) -> Buffer:
        """See llama/rows.py. Raises WireError."""
        ...

    def decode_frame(self, frame: Buffer, n: int, encoding: RowEncoding) -> FloatRows:
        """See llama/rows.py. Raises WireError."""
        ...

    def exchange(self, first: int, second: int) -> None:
        """Let two slots have each other's KV."""
        ...
