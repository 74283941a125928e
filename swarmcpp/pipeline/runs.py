"""One request of a head, from its admission to its end, and what the parts of a head have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmcpp.core import Chunk, TokenPart
from swarmcpp.engine.drafting import Drafter
from swarmcpp.engine.sequence import Generation
from swarmcpp.errors import StageFailed
from swarmcpp.llama.rows import FloatRows
from swarmcpp.peers import NodeId
from swarmcpp.pipeline.contract import StageCaller, StageRef
from swarmcpp.pipeline.guessing import AskGuesses
from swarmcpp.route.passes import Curve
from swarmcpp.wire.codec import RowEncoding

Chain = tuple[StageRef, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a head must know of its model; `ctx_size` is that of a sequence, in tokens."""

    fingerprint: bytes
    n_layers: int
    n_vocab: int
    ctx_size: int
    eog_tokens: frozenset[int]


@dataclass(frozen=True, slots=True)
class PipelinePolicy:
    """The switches of a head. `slots` requests run and `queue_size` more wait.

    `persistent`: passes overlap; without it each waits until the one before is back. `copy_every`: tokens after which
    stages store the blocks of requests that still run, on chains that have `copies`; 0: never.
    """

    slots: int
    queue_size: int
    prefill_chunk_tokens: int = 128
    prefill_budget_s: float = 0.7
    persistent: bool = True
    copy_every: int = 0
    drafters: tuple[Callable[[], Drafter], ...] = ()
    """Who guesses ahead what passes verify; each lane has its own."""
    gamma: int = 4
    draft: bool = False
    """A draft model is beside a stage of the head's node."""
    ahead: bool = True
    """Further guesses go out before the earlier ones are verified."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of the route search. `tokens` are prompt and what was generated, `answer` how many may follow,
    `streams` how many other requests this head runs; nodes of `avoid` failed a moment ago."""

    request: str
    tokens: int
    answer: int
    streams: int
    avoid: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a head uses of its node. All are called on the event loop's thread and none may block it.

    `routes` gives the best chain now, or raises NotReady, whose text says what is missing. `keys` are those of the
    full blocks of tokens under a salt; none where caching is off. `rtt` is the sum of the delays of a chain's links,
    from the head round to the head, in seconds. `copies` says whether a stage of a chain has a double that may want
    copies of what it stores. `encodings` are those of rows to the first stage and between the others.
    `micro_batches(streams, curves, rtt_s, most)` is how many micro-batches to keep in flight. `guess` asks the draft
    model beside a stage of the node.
    """

    embed: Callable[[Sequence[int]], FloatRows]
    keys: Callable[[Sequence[int], str], list[bytes]]
    routes: Callable[[Ask], Sequence[StageRef]]
    caller: Callable[[StageRef], StageCaller]
    pass_times: Callable[[StageRef], Curve]
    rtt: Callable[[Chain], float]
    encodings: Callable[[Chain], tuple[RowEncoding, RowEncoding]]
    micro_batches: Callable[[int, Sequence[Curve], float, int], int]
    copies: Callable[[Chain], bool] = lambda _chain: False
    guess: AskGuesses = lambda _parts, _done: False


@dataclass(frozen=True, slots=True)
class Broken:
    """What a run is told when its stages failed; `own`: in a pass that had rows of it."""

    error: StageFailed
    own: bool


@dataclass(slots=True, eq=False, kw_only=True)
class Run(Generation):
    """A request that runs or waits, on the stages of `chain`, where it has been opened `epoch` times."""

    sequence: bytes
    arrived_s: float
    parts: asyncio.Queue[TokenPart | Broken] = field(default_factory=asyncio.Queue)
    untold: list[TokenPart] = field(default_factory=list)
    """Not in `parts` yet."""
    chain: Chain = ()
    ran: Chain = ()
    """The chain that it was opened on last, also when that was given back."""
    epoch: int = 0
    place: int = -1
    """Its number in a lane, which stages should give it too; -1 when it is in none."""
    flying: int = 0
    """Chunks on their way of which tokens are to come."""
    turn: int = 0
    """How often what was assumed of it was wrong; chunks of an earlier turn are void."""
    passes: set[asyncio.Future[None]] = field(default_factory=set)
    """Those that have rows of it, outdated ones too."""
    stored: int = 0
    """Blocks that its stages were told to store."""
    failures: int = 0
    """Since its last token; those of links are not among them."""
    broken_links: int = 0
    """Passes since its last token that a link failed, and when the first did."""
    broken_since: float = 0.0
    cause: StageFailed | None = None
    """Why it was opened again."""
    seated: bool = False

    def placed(self, position: int, now: float) -> None:
        """The stages hold its first `position` tokens, and the rest is to be computed."""
        if not self.begun_s:
            self.queue_s = now - self.arrived_s
        self.begun_s = now
        self.n_past = position
        self.stored = 0
        self.decoding = False
        self.void()
        if not self.sampled:
            self.cached, self.tier = position, "arena" if position else ""

    @property
    def stamp(self) -> tuple[int, int]:
        """What a chunk must have been sent in to count when it is back."""
        return self.epoch, self.turn

    def sent(self, chunk: Chunk) -> None:
        """A chunk that tokens are wanted of is on its way."""
        self.flying += 1
        self.n_past += chunk.count
        self.assumed += ([chunk.follows] if chunk.follows >= 0 else []) + list(chunk.guesses)

    def came(self, ids: list[int]) -> bool:
        """Compare tokens that were just accepted with what was assumed; whether chunks behind them hold."""
        if self.assumed[: len(ids)] == ids:
            del self.assumed[: len(ids)]
            return True
        self.n_past = len(self.tokens) - 1
        self.void()
        return False

    def void(self) -> None:
        """Nothing that is on its way counts any more."""
        self.turn += 1
        self.flying = 0
        self.assumed.clear()

    @property
    def is_waited_for(self) -> bool:
        """It has a first token or a last one to tell."""
        untold = sum(len(part.tokens) for part in self.untold)
        return self.sampled == untold or any(part.finish for part in self.untold)

    def hand_out(self) -> None:
        """Give the reader all tokens that were accepted."""
        for part in self.untold:
            self.parts.put_nowait(part)
        self.untold.clear()

    def tell(self, news: Broken) -> None:
        """Tell the reader that its stages failed, after its tokens."""
        self.hand_out()
        self.parts.put_nowait(news)
