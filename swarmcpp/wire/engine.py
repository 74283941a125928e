"""The messages between a node and its engine, and the links that carry them."""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from swarmcpp.core import BlockRef, EngineStats, GenerateRequest, KvLayout, Sampled, TokenPart
from swarmcpp.wire.codec import Buffer, Codec, RowEncoding

VERSION: Final = 1
MAX_FRAME: Final = 16 << 20
"""Bytes. A million-token prompt is 5 MB in msgpack; anything near this limit is not one of our messages."""

MAX_TENSOR: Final = 64 << 20
"""Bytes of a raw frame beside a message: 512 rows of 32768 values, more than any model's, in F32."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an engine shall run: sizes in tokens, the budget in seconds, 0 never means 'choose' here."""

    model_path: str
    ctx_size: int
    slots: int
    threads: int
    use_extra_bufts: bool
    q8_kernel: bool
    attention_kernel: bool
    """See `llama.probe.Candidate`."""
    prefill_chunk_tokens: int
    prefill_budget_s: float
    continuous_batching: bool = True
    batched_prefill_forward: bool = True
    prefix_block_tokens: int = 64
    """Tokens of a block; 0 turns every reuse of prefixes off."""
    diag: bool = False
    """Say what every step does, on standard error."""
    gamma: int = 0
    """Most guesses of a drafter that computes; 0: nothing is guessed. Otherwise clients' predictions are verified too,
    and with `ngram` what followed the same tokens before."""
    ngram: bool = False
    draft_path: str = ""
    """A model that guesses ahead; empty: none. At a stage it answers what its node asks."""
    skip_ratio: float = 0.0
    """Layers of the model itself without which it guesses ahead; 0: it does not. `skip_dir` is where that is kept."""
    skip_dir: str = ""
    stage: bool = False
    """The file is a slice: the engine computes the Runs that its node sends, and samples if it has the last layer."""
    poll_s: float = 0.0
    """See `engine.stageloop.StageLoop`."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Node to engine, first and once."""

    options: EngineOptions


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Node to engine: queue a request. `serial` is never used twice in a node's life."""

    serial: int
    request: GenerateRequest
    blocks: tuple[BlockRef, ...] = ()
    """The beginning of the prompt in the arena, kept there until the request's first token or its end."""


class UseArena(msgspec.Struct, frozen=True, tag="arena"):
    """Node to engine, after Ready: where blocks are. Only once, and only if the engine reported a KV layout."""

    path: str
    block_bytes: int
    n_blocks: int


class StoreBlocks(msgspec.Struct, frozen=True, tag="store"):
    """Node to engine, in answer to BlocksFull: write these (block number, arena slot). Answered by BlocksStored."""

    serial: int
    grants: tuple[tuple[int, int], ...]


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Node to engine: KV that is there now, and blocks of requests that wait, may be wrong and are used no more.

    Requests that run go on with theirs, of which nothing is shared or stored.
    """


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Node to engine: forget `serial`; unknown or finished ones are ignored."""

    serial: int


class Place(msgspec.Struct, frozen=True, tag="place"):
    """Node to stage: give `serial` a sequence, or keep the one it has, with `tokens` tokens in its KV. Answered by
    Placed.

    What it has of more is cut off. If it has fewer, its KV becomes that of `blocks`, which have the beginning of the
    same tokens. `request` only to a tail: what it samples by, after `generated`.
    """

    serial: int
    tokens: int = 0
    blocks: tuple[BlockRef, ...] = ()
    request: GenerateRequest | None = None


class RunPart(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one sequence: `count` from position `start`, to which its KV is cut back. `outputs`, `place`, `guesses`,
    `follows`: see `PassPart`."""

    serial: int
    start: int
    count: int
    outputs: int
    place: int = -1
    guesses: tuple[int, ...] = ()
    follows: int = -1


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Node to stage: compute these rows, in one call. One frame beside it: the rows of all parts, in their order,
    encoded as `encoding`; those that come back are encoded as `reply`. Answered by Ran, in the order of Runs."""

    run: int
    parts: tuple[RunPart, ...]
    encoding: RowEncoding
    reply: RowEncoding


class GuessPart(msgspec.Struct, frozen=True, array_like=True):
    """Request `serial` goes on with `tokens` from position `start`; up to `count` tokens that may follow are wanted (0:
    it has ended). `request` says how it is sampled, where the engine may not know it yet."""

    serial: int
    start: int
    tokens: tuple[int, ...]
    count: int
    request: GenerateRequest | None = None


class Guess(msgspec.Struct, frozen=True, tag="guess"):
    """Node to stage: let the draft model guess for these requests, together. Answered by Guessed, in the order of
    Guesses, unless all parts have ended."""

    parts: tuple[GuessPart, ...]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Node to engine: free everything and exit."""


class LoadProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Engine to node while the weights load; `fraction` in 0..1."""

    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Engine to node once it accepts work. `ctx_size` is per slot, as llama.cpp rounded it."""

    ctx_size: int
    slots: int
    threads: int
    resident_bytes: int
    layout: KvLayout | None = None
    """The shape of its KV; None when it cannot be cut into blocks, and `no_blocks` says why."""
    no_blocks: str = ""


class BlocksFull(msgspec.Struct, frozen=True, tag="full"):
    """Engine to node: the KV of all blocks of `tokens` is there, and those from `first` may be new to the arena."""

    serial: int
    salt: str
    tokens: tuple[int, ...]
    first: int


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    """Engine to node: the answer to a StoreBlocks. (arena slot, digest) of what was written; the rest was not."""

    serial: int
    written: tuple[tuple[int, bytes], ...]


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """Stage to node: the answer to Place. `tokens` are in the KV, and `blocks` were loaded for it; with a `code`, there
    is no sequence for this reason."""

    serial: int
    tokens: int = 0
    blocks: int = 0
    bad_blocks: bool = False
    """Not all blocks of the Place were sound; the arena should drop those after `blocks`."""
    code: str = ""
    message: str = ""


class Ran(msgspec.Struct, frozen=True, tag="ran"):
    """Stage to node: the answer to Run. A tail's has tokens of each part with `outputs`; the others' a frame of rows
    beside it. With a `code`, it failed for this reason, and the sequences are as if only cut back."""

    run: int
    tokens: Sampled = ()
    seconds: float = 0.0
    """Of the call."""
    neighbours: bool = True
    """Its sequences were neighbours, so that the weights were read once."""
    code: str = ""
    message: str = ""


class Guessed(msgspec.Struct, frozen=True, tag="guessed"):
    """Stage to node: the answer to Guess, for each part that has not ended; None where the engine does not know what
    comes before `start`."""

    tokens: tuple[tuple[int, ...] | None, ...]


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """Engine to node: it cannot go on and exits; `code` is a wire code of swarmcpp.errors."""

    code: str
    message: str


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of request `serial`."""

    serial: int
    part: TokenPart


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """A submitted request that the engine did not take, and why."""

    serial: int
    code: str
    message: str


class StepOut(msgspec.Struct, frozen=True, tag="step"):
    """Engine to node after each step: everything that it produced, in one message."""

    tokens: tuple[TokenOut, ...]
    stats: EngineStats
    refused: tuple[Refused, ...] = ()


ToEngine = Load | UseArena | Submit | StoreBlocks | Forget | Cancel | Place | Run | Guess | Stop
FromEngine = LoadProgress | Ready | Fault | StepOut | BlocksFull | BlocksStored | Placed | Ran | Guessed
Message = ToEngine | FromEngine

_codec: Codec[Message] = Codec(Message, VERSION, MAX_FRAME)
encode = _codec.encode
decode = _codec.decode


class EngineLink(Protocol):
    """An engine's one connection: to its own node."""

    def receive(self, timeout_s: float) -> ToEngine | None:
        """The next message, or None after `timeout_s` (0: at once). Raises WireError on a bad frame."""

    def send(self, message: FromEngine) -> None:
        """Send a message to the node; waits while that does not read. Raises ConnectionError when it is gone."""


class StageLink(Protocol):
    """The connection of a stage's engine to its own node."""

    frame: bytes | None
    """What came beside the message that `receive` returned last."""

    def receive(self, timeout_s: float, poll_s: float = 0.0) -> ToEngine | None:
        """See `EngineLink`. For `poll_s` it looks again and again instead of sleeping."""

    def send(self, message: FromEngine, frame: Buffer | None = None) -> None:
        """See `EngineLink`; with at most one frame beside it. Raises WireError over MAX_TENSOR, ConnectionError."""
