"""The vocabulary that every layer shares: requests, events, plans, and the Protocols where siblings meet.

Standard library only, and msgspec for what crosses processes by the thousand. Everything here is frozen: what crosses
a module boundary is never mutated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length"]
"""Why a generation ended: an end-of-generation token or stop string; or max_tokens or the slot's context."""

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]

TILE_ROWS: Final = 64
"""Rows of one sequence from which ggml's flash attention on CPUs takes its tiled kernel (`ggml_fa_tile_config::Q`).

The tiled kernel and the one for fewer rows round differently. So a prompt's full tiles are always computed as tiles and
its tail always as fewer rows, whatever runs beside it: that is what makes its tokens the same alone and under load.
"""

DrafterName = Literal["prediction", "ngram", "draft", "skip"]
"""Who guesses ahead: what the client predicts, what followed the same tokens before, a smaller model, and the model
itself without some of its layers."""

MAX_GAMMA: Final = 31
"""Guesses that a pass verifies of one sequence at most. Far below the 64 rows from which on llama.cpp's attention
rounds differently: what comes out would depend on what was guessed."""

MAX_OUTPUTS: Final = 48
"""Rows of a call whose logits are wanted, unless there are more sequences; each costs a float for every word of the
vocabulary twice, in llama.cpp's output buffer and in its graph."""

MAX_ROWS: Final = 512
"""Rows that an engine computes at once: llama.cpp's n_ubatch, and n_batch too, more rows than which kill it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request. Defaults and order of samplers are those of llama.cpp's server.

    `seed` is always set (the API draws one when the client gives none), so that a request that an engine
    lost can be resumed with the same random numbers.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `n` choices of the API are n of these.

    `generated` holds tokens that an earlier engine already produced for this request: they are replayed, not
    sampled again, and count against `max_tokens`.
    """

    id: str
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    generated: tuple[int, ...] = ()
    cache_salt: str = ""
    deadline_s: float | None = None
    """Seconds that the whole request may take, from admission; None: no limit."""
    prediction: tuple[int, ...] = ()
    """What the answer will be, as the client thinks."""
    drafter: str = ""
    """The only one that may guess ahead for it (see `DrafterName`); "none": nobody; "": whoever can."""
    gamma: int = -1
    """Most tokens that are guessed at a time, and always so many if a drafter is named; -1: as many as pay."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One token that was sampled. `logprob` is the natural logarithm of its probability before any sampler, and `top`
    are (id, the same) of the likeliest; neither is there unless the request asked for it."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Sampled = tuple[tuple[Token, ...], ...]
"""What a pass brought: the tokens of each part of it with outputs, in their order."""


class TokenPart(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one request that are told together; `finish` is set with its last ones.

    `cached_tokens` of the prompt came from `tier`, as in `Usage`; `queue_s`, `prefill_s`, `fetch_s` are seconds spent
    waiting for a slot, from slot to first token, and before both waiting for blocks of peers. All of these are set with
    the first token only.
    """

    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    cached_tokens: int = 0
    tier: str = ""
    bad_blocks: bool = False
    """Not all blocks that came with the request were sound; the arena should drop those after `cached_tokens`."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    fetch_s: float = 0.0
    drafted: int = 0
    """Guesses that were verified for these tokens, the first `accepted` of which they are."""
    accepted: int = 0

    @property
    def ids(self) -> list[int]:
        """Of its tokens."""
        return [token.id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cached_tier: str = ""
    """Their source: "slot" (still in the engine's memory), "arena" (blocks on disk) or "peer" (fetched blocks)."""
    drafted: int = 0
    """Tokens that were guessed ahead and verified, `accepted` of which are in the answer."""
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by stage of one finished request; rates in tokens per second follow from Usage."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """A request has its first token: where it runs, and the seconds by stage that it took until then."""

    route: str
    """As users see it: "local", "peer" and the name of the node, or "stages", each with its node and layers."""
    queue_s: float = 0.0
    fetch_s: float = 0.0
    """Waiting for blocks from peers."""
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TextEvent:
    """New text of a request. `text` is whole characters and never contains (part of) a stop string.

    `text` may be empty while a character or a possible stop string is incomplete.
    """

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The one good end of a request."""

    reason: FinishReason
    usage: Usage
    timings: Timings


Event = Started | TextEvent | Done
"""What a stream of a request yields: at most one Started, TextEvents, then exactly one Done. A failure is raised as a
SwarmError."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a node knows of the model that it serves; sizes in bytes, contexts in tokens."""

    id: str
    path: str
    architecture: str
    description: str
    n_params: int
    size_bytes: int
    n_vocab: int
    n_ctx_train: int
    n_layers: int
    created: int = 0
    """Unix time of the file, for `created` in /v1/models."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of one context's KV state: ggml types, and bytes of one token's row by layer."""

    magic: int
    n_stream: int
    k_type: int
    v_type: int
    k_rows: tuple[int, ...]
    v_rows: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        """Layers of the context."""
        return len(self.k_rows)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return sum(self.k_rows) + sum(self.v_rows)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine, sent with every step's events; rates are moving averages in tokens/s."""

    slots: int
    slots_busy: int
    waiting: int
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    calls: int = 0
    """llama_decode calls so far."""


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """What /health, /metrics and the terminal view show of a node, at one moment."""

    state: EngineState
    detail: str
    model: ModelInfo | None
    slots: int
    slots_busy: int
    ctx_size: int
    queued: int
    running: int
    restarts: int
    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, as the chat template sees it."""

    role: str
    content: str
    name: str | None = None


class Service(Protocol):
    """What the API needs of a node. Called on the event loop's thread; no method blocks it."""

    def models(self) -> tuple[ModelInfo, ...]:
        """The models that can be asked for, the default first."""
        ...

    def snapshot(self) -> NodeSnapshot:
        """State now; cheap enough for every scrape."""
        ...

    def limits(self, model: str | None = None) -> Limits:
        """What a request for a model (None: the default) may ask for at most, now."""
        ...

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Prompt tokens of a conversation. Raises UnknownModel, NotReady, BadRequest."""
        ...

    async def tokenize_text(self, model: str, text: str, *, begins: bool = True) -> tuple[int, ...]:
        """Tokens of a text, with which a prompt `begins` or not. Raises UnknownModel, NotReady."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Admit `request` and stream its events. Closing the iterator cancels the work at once.

        Raises, before the first event or instead of Done: QueueFull, PromptTooLong, UnknownModel, NotReady,
        EngineFailed, Cancelled (deadline).
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request on this node."""

    ctx_size: int
    """Tokens of prompt plus answer that one slot holds."""
    n_vocab: int
    max_choices: int = 16
    """Largest `n`."""
    max_stop: int = 16
    """Most stop strings in one request."""
    max_stop_bytes: int = 1024


class Clock(Protocol):
    """Monotonic seconds, injected wherever time decides something."""

    def __call__(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a slot, from position `start`; `last` means that logits of its last row are wanted.

    The last rows may be `guesses` at what follows its tokens; then the logits of all these and of the row before them
    are wanted.
    """

    slot: int
    start: int
    count: int
    last: bool
    guesses: tuple[int, ...] = ()
    follows: int = -1
    """The token of its first row, where that is a guess too: it means nothing unless this was drawn just before it."""

    @property
    def outputs(self) -> int:
        """Rows whose logits are wanted, the last ones."""
        return 1 + len(self.guesses) if self.last else 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: a llama_decode for the decoding slots, then one for each group of prompt chunks of equal length."""

    decode: tuple[Chunk, ...] = ()
    prefill: tuple[tuple[Chunk, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one slot: `tokens` at positions from `start`; logits of the last `outputs` are wanted."""

    slot: int
    start: int
    tokens: Sequence[int]
    outputs: int


class SamplerLike(Protocol):
    """The sampler state of one request."""

    def follow(self, tokens: Sequence[int]) -> None:
        """Be as if it had drawn `tokens`."""
        ...

    def copy(self) -> SamplerLike:
        """One that draws what this one would draw next, and leaves it as it is."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block in the node's arena. `digest` is the BLAKE3 that its payload must have; with `finite` set, a payload of
    this digest is known to hold only finite values."""

    slot: int
    digest: bytes
    finite: bool = False


class BlockFile(Protocol):
    """The payloads of a node's arena, as its engine reads and writes them."""

    def read_into(self, slot: int, target: memoryview) -> bool:
        """Fill `target` (one block) from an arena slot; False when that cannot be done."""
        ...

    def write(self, slot: int, payload: memoryview) -> bool:
        """Put a payload into an arena slot that the node granted; False when that cannot be done."""
        ...
