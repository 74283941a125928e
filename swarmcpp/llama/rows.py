"""Hidden rows between stages as bytes: float32 as they are, or ggml's Q8_0 at 3.76 times less.

Q8_0 is as in llama/kvwire.py: for each 32 values an F16 scale and 32 int8, so the largest error of a value is 1/254 of
the largest of its 32, which for normal values is 0.5% RMS. A row whose width is no multiple of 32 ends in zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swarmcpp._native import all_finite_f32
from swarmcpp.errors import WireError
from swarmcpp.llama.kvwire import Q8_0_BYTES, QK8_0, _ggml
from swarmcpp.wire.codec import Buffer, RowEncoding

FloatRows = npt.NDArray[np.float32]


def frame_bytes(n: int, n_embd: int, encoding: RowEncoding) -> int:
    """Bytes of `n` rows of `n_embd` values."""
    return 4 * n * n_embd if encoding == "f32" else n * -(-n_embd // QK8_0) * Q8_0_BYTES


def encode_rows(rows: FloatRows, encoding: RowEncoding) -> memoryview:
    """`rows`, shape (n, n_embd), as one frame, which for "f32" is their own memory. Thread-safe.

    Raises WireError for values that are not finite, or too large for Q8_0.
    """
    rows = np.ascontiguousarray(rows, "<f4")
    if not all_finite_f32(rows.ctypes.data, rows.size):
        raise WireError("rows with values that are not finite are not sent")
    if encoding == "f32":
        return rows.reshape(-1).view(np.uint8).data
    n, n_embd = rows.shape
    if n_embd % QK8_0:
        rows = np.pad(rows, ((0, 0), (0, -n_embd % QK8_0)))
    target = np.empty(frame_bytes(n, n_embd, encoding), np.uint8)
    _ggml().f32_to_q8_0(rows.ctypes.data, target.ctypes.data, rows.size)
    if not _scales_are_finite(target):
        raise WireError(f"rows with values up to {np.abs(rows).max():g} do not fit into Q8_0; send them as f32")
    return target.data


def decode_rows(frame: Buffer, n: int, n_embd: int, encoding: RowEncoding) -> FloatRows:
    """The `n` rows of a frame, shape (n, n_embd), all finite; maybe a view of it. Thread-safe.

    Raises WireError for a frame of another size, and for values that are not finite.
    """
    size, expected = memoryview(frame).nbytes, frame_bytes(n, n_embd, encoding)
    if size != expected:
        raise WireError(f"{size} bytes of {encoding} for {n} rows of {n_embd} values, which take {expected}")
    if encoding == "f32":
        rows = np.frombuffer(frame, "<f4").reshape(n, n_embd)
        finite = all_finite_f32(rows.ctypes.data, rows.size)
    else:
        source = np.frombuffer(frame, np.uint8)
        rows = np.empty((n, -(-n_embd // QK8_0) * QK8_0), np.float32)
        finite = _scales_are_finite(source)
        if finite:
            _ggml().q8_0_to_f32(source.ctypes.data, rows.ctypes.data, rows.size)
        rows = rows[:, :n_embd]
    if not finite:
        raise WireError(f"{size} bytes of {encoding} for {n} rows of {n_embd} values, not all of which are finite")
    return rows


def _scales_are_finite(data: npt.NDArray[np.uint8]) -> bool:
    scales = data.reshape(-1, Q8_0_BYTES)[:, :2].copy().view("<u2")
    # As integers, which compare much faster than halves: infinity and NaN are all that have these bits set.
    return not ((scales & 0x7C00) == 0x7C00).any()
