"""What a head asks of a stage, be it the node's own or a peer's: the contract that both sides of a pipeline share.

A *head* is the node that answers a request through stages: it looks up embeddings, decides what is computed when, and
gets token ids back. A *stage* keeps the KV of its layers for every sequence that a head has opened there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarmcpp.core import GenerateRequest, Sampled
from swarmcpp.errors import StageFailed
from swarmcpp.peers import NodeId
from swarmcpp.route.patience import UNKNOWN_S
from swarmcpp.wire.codec import RowEncoding
from swarmcpp.wire.peers import PassPart


@dataclass(frozen=True, slots=True)
class StageRef:
    """One stage of one model: layers [first, last) of `n_layers`, at `node`."""

    node: NodeId
    fingerprint: bytes
    first: int
    last: int
    n_layers: int

    @property
    def is_tail(self) -> bool:
        """It samples."""
        return self.last == self.n_layers


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over a chain: `rows` of all parts, in their order, encoded as `encoding`. `onward`: the stages after
    the one that is asked, and `wire` is how rows travel between those. `limit_s`: how long its end is waited for."""

    parts: tuple[PassPart, ...]
    encoding: RowEncoding
    rows: bytes | memoryview
    onward: tuple[StageRef, ...] = ()
    wire: RowEncoding = "f32"
    limit_s: float = UNKNOWN_S

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.count for part in self.parts)


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage of a pass took, in seconds: its call, and waiting for its engine before."""

    compute_s: float
    queue_s: float


@dataclass(frozen=True, slots=True)
class Passed:
    """The end of a pass: tokens of each part with `outputs`, and the time of each stage from the one that was asked."""

    tokens: Sampled
    times: tuple[StageTime, ...]


PassDone = Callable[[Passed | StageFailed], None]
"""What is called once with the end of a pass; a failure names the node that failed and has the code of the error there.
It must not raise."""


class SequenceHolder(Protocol):
    """What holds the sequences of one stage. Used on the event loop's thread.

    Raises, wherever something is wrong: StageLost (the sequence is not known there, has another epoch, was not resumed
    in this one before a pass, or has a hole before `start`: open it again), QueueFull (`open`: no sequence is free),
    PeerLost, PeerTimeout, NotReady, EngineFailed, WireError.
    """

    async def open(
        self, sequence: bytes, epoch: int, keys: Sequence[bytes], request: GenerateRequest | None, n_tokens: int
    ) -> int:
        """Get a sequence, or keep the one of that name, under a new epoch; the tokens that it could go on after.

        `keys` are those of the full blocks of the `n_tokens` tokens (prompt and generated), by whole-model identity;
        the answer is the larger of what its KV holds of them already (only if it was open) and what its arena has, and
        less than `n_tokens`. `request` only to the tail: what it samples by, with `generated`.
        """
        ...

    async def resume(self, sequence: bytes, epoch: int, n_tokens: int) -> int:
        """Bring the first `n_tokens` tokens into the sequence's KV; how many are there now (fewer: blocks were bad)."""
        ...

    async def store(self, sequence: bytes, epoch: int, keys: Sequence[bytes]) -> None:
        """Write the blocks of `keys`, whose KV is in the sequence, into the stage's arena, as far as it has room."""
        ...


class StageCaller(SequenceHolder, Protocol):
    """One stage, as a head drives it. Passes keep the order in which they are begun, and raise nothing."""

    def begin(self, work: Pass, done: PassDone, computed: Callable[[], None] = lambda: None) -> None:
        """Compute a pass here and at the stages onward, then call `done`, but never before `begin` has returned.

        `computed` is called once, or not at all, when this node has computed what was asked of it (a stage of a peer:
        nothing) and has sent it on.

        No coroutine: each pass of one row goes through this twice on every node, and tasks took longer than all else.
        """
        ...

    async def close(self, sequence: bytes) -> None:
        """Give the sequence back. Unknown ones are ignored."""
        ...
