"""The messages between nodes. Requests go to a peer's ROUTER, each with an id; replies carry the id of their request.

On the socket a request or reply is a list of frames: 8 bytes of id, one message, and raw payload frames beside it.
Gossip is one frame on a node's PUB socket. Sizes are bounded here, and checked again where they are used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta

from swarmcpp.core import MAX_OUTPUTS, MAX_ROWS, GenerateRequest, Sampled, TokenPart
from swarmcpp.errors import SwarmError
from swarmcpp.peers import Address, Capability, Load
from swarmcpp.wire.codec import Codec, RowEncoding

PROTOCOL: Final = 3
"""First byte of every frame. A Hello also tells the range that a node speaks, which old and new nodes agree on."""

MAX_MESSAGE: Final = 4 << 20
"""Bytes of one message. A prompt takes 3 bytes a token, 5 at most: longer ones than this are not delegated."""

MAX_PAYLOAD: Final = 64 << 20
"""Bytes of one raw frame: a block of 1,024 tokens of a model with 64 KiB of KV a token."""

MAX_FRAMES: Final = 64
"""Raw frames beside one message."""

MAX_IDS: Final = 4096
"""Block ids in one message."""

MAX_PARTS: Final = MAX_ROWS
"""Sequences in one pass."""

MAX_HOPS: Final = 64
"""Stages of a route."""

BlockId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Ids = Annotated[tuple[BlockId, ...], Meta(max_length=MAX_IDS)]
Text = Annotated[str, Meta(max_length=1000)]


# -- requests ------------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First on every link. Answered by Welcome."""

    lowest: int
    highest: int
    """Protocol versions that the sender speaks."""
    capability: Capability


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by Pong with `reply_bytes` of payload (0 to 1 MiB): measures round trip and rate of a link."""

    reply_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Run a whole request. Answered by Parts, KeepAlive in between, ended by the Part with `finish` or a Failure."""

    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for the replies to the request of this id any more. Never answered."""


class FetchBlocks(msgspec.Struct, frozen=True, tag="fetch-blocks"):
    """Blocks by id, in the order of their chain. Answered by Blocks with those from the first that could be had within
    `budget_s` at the server, at least none."""

    root: Digest
    ids: Ids
    encoding: Annotated[str, Meta(pattern="^(f16|q8_0)$")]
    budget_s: Annotated[float, Meta(ge=0.0, le=60.0)]


class ListBlocks(msgspec.Struct, frozen=True, tag="list-blocks"):
    """All block ids of a root, in pages: those after `after` in byte order. Answered by BlockPage."""

    root: Digest
    after: bytes = b""


class GetManifest(msgspec.Struct, frozen=True, tag="get-manifest"):
    """What a model's files are made of. Answered by ManifestReply with the manifest as payload."""

    fingerprint: Digest


class GetChunk(msgspec.Struct, frozen=True, tag="get-chunk"):
    """A chunk of a model's files, counted over all of them. Answered by ChunkReply with the bytes as payload."""

    fingerprint: Digest
    index: Annotated[int, Meta(ge=0, le=2**32)]


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """A stage of a route: layers [first, last) at `node`."""

    node: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    first: int
    last: int


class _OfStage(msgspec.Struct, frozen=True):
    """What is asked of a stage of the model with `fingerprint`; `stage` is the one that is asked."""

    fingerprint: Digest
    stage: Hop


class _OfSequence(_OfStage, frozen=True):
    sequence: BlockId


class OpenSequence(_OfSequence, frozen=True, tag="open-sequence"):
    """See `contract.StageCaller.open`. Answered by SequenceReady."""

    epoch: int
    keys: Annotated[tuple[Digest, ...], Meta(max_length=MAX_IDS)]
    n_tokens: int
    request: GenerateRequest | None = None


class ResumeSequence(_OfSequence, frozen=True, tag="resume-sequence"):
    """See `contract.StageCaller.resume`. Answered by SequenceReady."""

    epoch: int
    n_tokens: int


class PassPart(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one sequence in a pass: `count` from position `start`; what a stage has from there on it forgets first.

    `outputs`: the tail samples after the last so many of them, whose rows but the first are of `guesses`: up to the
    first token that is none of these. `epoch`: that of the sequence's last `open`; rows of an earlier one are refused.
    `place`: the number that the sequence should have among those of the stage, -1 for any. Those of one pass should be
    neighbours, as llama.cpp reads all weights once for each run of neighbours; a stage moves KV for it, unless the
    place belongs to another. `follows`: the first row is of this guess; unless that was drawn last, and for this
    position, the part is void: stages compute it, but nothing is sampled, and its tokens are none.
    """

    sequence: BlockId
    epoch: int
    start: int
    count: int
    outputs: int
    place: int = -1
    guesses: Annotated[tuple[int, ...], Meta(max_length=MAX_OUTPUTS)] = ()
    follows: int = -1


class RunStage(_OfStage, frozen=True, tag="run-stage"):
    """See `contract.Pass`. Frames beside it: the encoded rows, cut anywhere. Answered by PassReply once the whole chain
    has computed it; the replies of one head come in the order of its passes."""

    parts: Annotated[tuple[PassPart, ...], Meta(min_length=1, max_length=MAX_PARTS)]
    encoding: RowEncoding
    onward: Annotated[tuple[Hop, ...], Meta(max_length=MAX_HOPS)] = ()
    wire: RowEncoding = "f32"
    limit_s: float = 60.0
    """How long the end of the pass is waited for from now on; see route/patience.py."""


class StoreSequence(_OfSequence, frozen=True, tag="store-sequence"):
    """See `contract.StageCaller.store`. Answered by Pong."""

    epoch: int
    keys: Annotated[tuple[Digest, ...], Meta(max_length=MAX_IDS)]


class CloseSequence(_OfSequence, frozen=True, tag="close-sequence"):
    """See `contract.StageCaller.close`. Answered by Pong."""


class OfferBlocks(_OfStage, frozen=True, tag="offer-blocks"):
    """Node `source` has the blocks of `keys`, a chain from its beginning, for layers that `stage` has too; that may
    fetch them. Answered by Pong at once."""

    source: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    keys: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=MAX_IDS)]


# -- replies -------------------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to Hello: the version to speak, who answers, and whom else it knows."""

    protocol: int
    capability: Capability
    peers: Annotated[tuple[Address, ...], Meta(max_length=1024)] = ()


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to Ping."""


class Part(msgspec.Struct, frozen=True, tag="part"):
    """Some tokens of a Generate."""

    part: TokenPart


class KeepAlive(msgspec.Struct, frozen=True, tag="keep-alive"):
    """Nothing to tell yet, but still at work."""


class Blocks(msgspec.Struct, frozen=True, tag="blocks"):
    """The first len(digests) blocks that were asked for; payload: one frame each. `digests`: BLAKE3 of each frame."""

    digests: Annotated[tuple[Digest, ...], Meta(max_length=MAX_FRAMES)]


class BlockPage(msgspec.Struct, frozen=True, tag="block-page"):
    """Ids in byte order; `sequence` is that of the last gossip whose changes they contain; `more` follow."""

    ids: Ids
    sequence: int
    more: bool


class ManifestReply(msgspec.Struct, frozen=True, tag="manifest"):
    """Beside it: the manifest's bytes, whose `Manifest.fingerprint` is what was asked for."""


class ChunkReply(msgspec.Struct, frozen=True, tag="chunk"):
    """Beside it: the chunk's bytes, whose BLAKE3 is in the manifest."""


class SequenceReady(msgspec.Struct, frozen=True, tag="sequence"):
    """The answer to OpenSequence and ResumeSequence: tokens, as `contract.StageCaller` says."""

    n_tokens: int


class PassReply(msgspec.Struct, frozen=True, tag="passed"):
    """See `contract.Passed`; `times` are (compute_s, queue_s) of each stage from the one asked. With a `code`, the pass
    failed at `node` for this reason."""

    tokens: Annotated[Sampled, Meta(max_length=MAX_PARTS)] = ()
    times: Annotated[tuple[tuple[float, float], ...], Meta(max_length=MAX_HOPS + 1)] = ()
    node: Text = ""
    code: Text = ""
    message: Text = ""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """A request failed; `code` is a wire code of swarmcpp.errors."""

    code: Text
    message: Text
    retry_after: float = 0.0


# -- gossip --------------------------------------------------------------------------------------------------------


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A heartbeat with the load."""

    load: Load


class PrefixCacheAnnounce(msgspec.Struct, frozen=True, tag="blocks-changed"):
    """Blocks of `root` that the sender's arena gained and lost since its last announcement."""

    root: Digest
    added: Ids = ()
    dropped: Ids = ()


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """The sender ends in order."""


class NodeCapability(msgspec.Struct, frozen=True, tag="capability"):
    """All that a node says of itself."""

    capability: Capability


class Gossip(msgspec.Struct, frozen=True, tag="gossip"):
    """One piece of news. `sequence` rises by one with each message of a boot: no rise is a replay, a gap a loss."""

    node: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    boot: int
    sequence: int
    news: Alive | PrefixCacheAnnounce | Leaving | NodeCapability


AskStage = OpenSequence | ResumeSequence | RunStage | StoreSequence | CloseSequence | OfferBlocks
Ask = Hello | Ping | Generate | Cancel | FetchBlocks | ListBlocks | GetManifest | GetChunk | AskStage
StageReply = SequenceReady | PassReply
Reply = Welcome | Pong | Part | KeepAlive | Blocks | BlockPage | ManifestReply | ChunkReply | StageReply | Failure
PeerMessage = Ask | Reply | Gossip

_codec: Codec[PeerMessage] = Codec(PeerMessage, PROTOCOL, MAX_MESSAGE)
encode = _codec.encode
decode = _codec.decode

AskDone = Callable[["Reply | SwarmError", "list[memoryview]"], None]
"""What is called once with the end of a request. It must not raise."""


class Caller(Protocol):
    """Requests to one peer over its link. Used on the event loop's thread."""

    async def ask(
        self, message: Ask, payload: Sequence[bytes | memoryview] = (), *, timeout_s: float
    ) -> tuple[Reply, list[memoryview]]:
        """The one reply to `message` with its raw frames; those beside it must not be changed any more.

        Raises PeerTimeout, PeerLost (the link broke), QueueFull (too many requests are under way), WireError, or the
        error that the peer answered with.
        """

    def begin(self, message: Ask, payload: Sequence[bytes | memoryview], done: AskDone, *, timeout_s: float) -> None:
        """The same without a task: `done` is called with the reply and its frames, or with the error, and not before
        `begin` has returned. Raises PeerLost, QueueFull and WireError when nothing can be sent."""

    def stream(self, message: Ask, *, silence_s: float) -> AsyncGenerator[Reply, None]:
        """All replies to `message`, ended by the peer. Closing it early tells the peer to cancel.

        Raises PeerTimeout after `silence_s` without any reply, PeerLost, WireError, or what the peer answered with.
        """


SEQUENCE_BYTES = 16
"""Of a sequence's name, which its head draws at random."""
