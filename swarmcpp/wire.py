"""The messages that processes exchange, their codec, version and size limit. The only user of msgspec's codec.

A frame is one version byte, then a msgpack-encoded tagged union. Unknown fields of known messages are ignored, so a
newer peer may add some; an unknown message, version or oversized frame is a WireError. Tensors never travel inside a
message: they are raw frames beside it.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from swarmcpp.core import EngineStats, FinishReason, GenerateRequest
from swarmcpp.errors import WireError

VERSION: Final = 1
MAX_FRAME: Final = 16 << 20
"""Bytes. A million-token prompt is 5 MB in msgpack; anything near this limit is not one of our messages."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine shall run: sizes in tokens, the budget in seconds, 0 never means 'choose' here."""

    model_path: str
    ctx_size: int
    slots: int
    threads: int
    use_extra_bufts: bool
    prefill_chunk_tokens: int
    prefill_budget_s: float
    continuous_batching: bool
    batched_prefill_forward: bool


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Node to engine, first and once."""

    options: EngineOptions


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Node to engine: queue a request. `serial` is never used twice in a node's life."""

    serial: int
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Node to engine: forget `serial`; unknown or finished ones are ignored."""

    serial: int


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


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """Engine to node: it cannot go on and exits; `code` is a wire code of swarmcpp.errors."""

    code: str
    message: str


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token of request `serial`; `finish` is set on its last one.

    `queue_s`, `prefill_s`: seconds spent waiting for a slot, and from slot to first token (set on the first token).
    """

    serial: int
    token: int
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0


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


ToEngine = Load | Submit | Cancel | Stop
FromEngine = LoadProgress | Ready | Fault | StepOut
Message = ToEngine | FromEngine

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame. Raises WireError when it would exceed MAX_FRAME, or holds what msgpack cannot carry."""
    try:
        frame = bytes((VERSION,)) + _encoder.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        # A lone surrogate, or an integer beyond 64 bits.
        raise WireError(f"cannot encode a {type(message).__name__} message: {error}") from error
    if len(frame) > MAX_FRAME:
        raise WireError(f"a {type(message).__name__} message of {len(frame)} bytes exceeds the limit of {MAX_FRAME}")
    return frame


def decode(frame: bytes) -> Message:
    """The message in `frame`. Raises WireError on anything else than a complete message of this version."""
    if not frame or len(frame) > MAX_FRAME:
        raise WireError(f"a frame of {len(frame)} bytes is outside 1..{MAX_FRAME}")
    if frame[0] != VERSION:
        raise WireError(f"protocol version {frame[0]} where {VERSION} is spoken; run the same swarmcpp on both sides")
    try:
        message: Message = _decoder.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(" ".join(f"cannot decode a message: {error}".split())) from error
    return message


class EngineLink(Protocol):
    """An engine's one connection: to its own node."""

    def receive(self, timeout_s: float) -> ToEngine | None:
        """The next message, or None after `timeout_s` (0: at once). Raises WireError on a bad frame."""
        ...

    def send(self, message: FromEngine) -> None:
        """Queue a message for the node."""
        ...
