"""The codec of all messages. The only user of msgspec's.

A frame is one version byte, then a msgpack-encoded tagged union. Unknown fields of known messages are ignored, so a
newer peer may add some; an unknown message, version or oversized frame is a WireError. Tensors never travel inside a
message: they are raw frames beside it.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec

from swarmcpp.errors import WireError

Buffer = bytes | bytearray | memoryview

RowEncoding = Literal["f32", "q8_0"]
"""How rows between stages are written: little-endian float32, or ggml's Q8_0 (34 bytes for 32 values), row by row."""

Sent = TypeVar("Sent")


class Codec(Generic[Sent]):
    """Frames of one union of messages: a version byte, then msgpack."""

    def __init__(self, union: Any, version: int, max_frame: int) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Sent] = msgspec.msgpack.Decoder(union)
        self._version = version
        self._max_frame = max_frame

    def encode(self, message: Sent) -> bytes:
        """One frame. Raises WireError when it would exceed the limit, or holds what msgpack cannot carry."""
        try:
            frame = bytes((self._version,)) + self._encoder.encode(message)
        except (UnicodeEncodeError, OverflowError) as error:
            # A lone surrogate, or an integer beyond 64 bits.
            raise WireError(f"cannot encode a {type(message).__name__} message: {error}") from error
        if len(frame) > self._max_frame:
            raise WireError(
                f"a {type(message).__name__} message of {len(frame)} bytes exceeds the limit of {self._max_frame}"
            )
        return frame

    def decode(self, frame: bytes) -> Sent:
        """The message in `frame`. Raises WireError on anything else than a complete message of this version."""
        if not frame or len(frame) > self._max_frame:
            raise WireError(f"a frame of {len(frame)} bytes is outside 1..{self._max_frame}")
        if frame[0] != self._version:
            raise WireError(
                f"protocol version {frame[0]} where {self._version} is spoken; run the same swarmcpp on both sides"
            )
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(" ".join(f"cannot decode a message: {error}".split())) from error
