"""How messages and raw frames lie in the byte stream between a node and its engine (see supervisor/nodelink.py)."""

from __future__ import annotations

import struct
from typing import Final

from swarmcpp.errors import WireError
from swarmcpp.wire.codec import Buffer
from swarmcpp.wire.engine import MAX_FRAME, MAX_TENSOR

HEADER = struct.Struct("<II")
"""Bytes of the message, and of the frame beside it."""

READ_BYTES: Final = 1 << 18
_NO_FRAME: Final = 0xFFFFFFFF

Ticket = dict[str, str]
"""What an engine needs to connect; handed over on its stdin, never on the command line."""


def pieces(message: bytes, frame: Buffer | None) -> tuple[Buffer, ...]:
    """A message and what is beside it, to be written one after another. Raises WireError for too large a frame."""
    if frame is None:
        return HEADER.pack(len(message), _NO_FRAME), message
    size = memoryview(frame).nbytes
    if size > MAX_TENSOR:
        raise WireError(f"{size} bytes beside a message, where {MAX_TENSOR} are the limit; send fewer rows")
    return HEADER.pack(len(message), size), message, frame


def sizes(buffer: Buffer, at: int) -> tuple[int, int]:
    """Bytes of the message whose header is at `at`, and of the frame beside it: -1 without. Raises WireError."""
    size, beside = HEADER.unpack_from(buffer, at)
    if size > MAX_FRAME or (beside != _NO_FRAME and beside > MAX_TENSOR):
        raise WireError(f"a message of {size} bytes with {beside} beside it; {MAX_FRAME} and {MAX_TENSOR} are the most")
    return size, -1 if beside == _NO_FRAME else beside
