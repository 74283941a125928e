"""KV on the wire at about half its size: F16 values as ggml's Q8_0 and back, computed by ggml itself.

Q8_0, as `block_q8_0` in ggml-common.h: for each 32 values an F16 scale, the largest magnitude over 127, and 32 int8.
The rows of a block of KV lie one after another and their sizes are multiples of 32 values in every common model, so a
payload is quantised as one row.

The vectorised conversions of ggml-cpu are used, not the portable ones of ggml-base (`ggml_fp16_to_fp32_row`,
`ggml_quantize_chunk`), which are 10 to 30 times slower.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from swarmcpp._native import all_finite_f16
from swarmcpp.errors import SnapshotError, SwarmError
from swarmcpp.llama.convert import Conversion, Convert, float_converter
from swarmcpp.llama.lib import PINNED, ggml_library, start

QK8_0 = 32
"""Values that share a scale."""

F16_BYTES = 2 * QK8_0
Q8_0_BYTES = 2 + QK8_0

_SCALE_MAX = 516.0
"""The scale of 65504, the largest half: 65504 / 127 in F16."""

_SCALE_SAFE = 511.0
"""Up to this scale no value leaves the range of F16: 128 * 511 < 65504."""

_PIECE = 1 << 16
"""Values at a time: 256 KiB of F32 stay in a core's cache, where a whole block would go to memory and back."""


class _Ggml:
    """The four conversions. Each takes (source address, target address, number of values) and runs without the GIL."""

    def __init__(self) -> None:
        # Loads the CPU backend, which fills the tables that these functions use where F16C is missing.
        start()
        cpu = ggml_library("ggml-cpu")
        self.f16_to_f32 = Conversion(("ggml_cpu_fp16_to_fp32", cpu))
        self.f32_to_f16 = Conversion(("ggml_cpu_fp32_to_fp16", cpu))
        # These by their tables and not by their names, which are not part of ggml's interface.
        q8_0_to_f32 = float_converter(GGMLQuantizationType.Q8_0)
        assert q8_0_to_f32 is not None
        self.q8_0_to_f32 = q8_0_to_f32
        traits = cpu.ggml_get_type_traits_cpu
        traits.argtypes, traits.restype = [ctypes.c_int], ctypes.POINTER(ctypes.c_void_p)
        # The first member of ggml_type_traits_cpu: from_float.
        self.f32_to_q8_0 = to_q8_0_at(traits(GGMLQuantizationType.Q8_0)[0])


def to_q8_0_at(address: int | None) -> Convert:
    """What makes Q8_0 of floats, from a table that nothing else tells the layout of: tried on 32 values that need no
    rounding, at a scale of 1. Raises SwarmError when something else comes out."""
    convert, known = Conversion(address or 0), np.arange(-127, 128, 8).astype(np.int8)
    # With room for what any other conversion writes.
    values, found = known.astype(np.float32), np.zeros(4 * QK8_0, np.uint8)
    if address:
        convert(values.ctypes.data, found.ctypes.data, QK8_0)
    if found[:Q8_0_BYTES].tobytes() != np.float16(1).tobytes() + known.tobytes():
        raise SwarmError(f"ggml_type_traits_cpu of Q8_0 is laid out otherwise; install llama-cpp-python {PINNED}")
    return convert


_ggml = cache(_Ggml)


def quantise(payload: bytes | memoryview) -> bytes:
    """F16 values as Q8_0, 34/64 of the size. Thread-safe.

    Raises ValueError when the values are not a multiple of 32 in number (ship them as they are), and SnapshotError when
    one is not finite.
    """
    source = np.frombuffer(payload, np.uint8) if memoryview(payload).nbytes else np.empty(0, np.uint8)
    if source.size % F16_BYTES:
        raise ValueError(f"{source.size} bytes of KV are no multiple of {F16_BYTES}; Q8_0 cannot carry them")
    if not all_finite_f16(source):
        raise SnapshotError("values that are not finite cannot be quantised")
    n_values = source.size // 2
    target = np.empty(n_values // QK8_0 * Q8_0_BYTES, np.uint8)
    rows = np.empty(min(n_values, _PIECE), np.float32)
    ggml = _ggml()
    for at in range(0, n_values, _PIECE):
        count = min(_PIECE, n_values - at)
        ggml.f16_to_f32(source.ctypes.data + 2 * at, rows.ctypes.data, count)
        ggml.f32_to_q8_0(rows.ctypes.data, target.ctypes.data + at // QK8_0 * Q8_0_BYTES, count)
    return target.tobytes()


def dequantise(data: bytes | memoryview, size: int) -> bytes:
    """`size` bytes of F16 values, all finite, from Q8_0. Thread-safe.

    Raises SnapshotError when `data` is not of the size that Q8_0 has for it, or has a scale that no F16 values give.
    """
    wire_bytes = memoryview(data).nbytes
    if size % F16_BYTES or wire_bytes != size // F16_BYTES * Q8_0_BYTES:
        raise SnapshotError(f"{wire_bytes} bytes of Q8_0 for {size} bytes of F16")
    if not size:
        return b""
    source = np.frombuffer(data, np.uint8)
    largest = _largest_scale(source)
    # Written so that a NaN does not pass.
    if not largest <= _SCALE_MAX:
        raise SnapshotError(f"a Q8_0 scale of {largest} where F16 values give at most {_SCALE_MAX}")
    n_values = size // 2
    target = np.empty(size, np.uint8)
    rows = np.empty(min(n_values, _PIECE), np.float32)
    ggml = _ggml()
    for at in range(0, n_values, _PIECE):
        count = min(_PIECE, n_values - at)
        ggml.q8_0_to_f32(source.ctypes.data + at // QK8_0 * Q8_0_BYTES, rows.ctypes.data, count)
        if largest > _SCALE_SAFE:
            # A scale that was rounded up takes the largest half beyond itself.
            np.clip(rows, -65504.0, 65504.0, out=rows)
        ggml.f32_to_f16(rows.ctypes.data, target.ctypes.data + 2 * at, count)
    return target.tobytes()


def _largest_scale(source: npt.NDArray[np.uint8]) -> float:
    """The largest magnitude of a scale, NaN if one is."""
    # As integers, which compare much faster than halves: without their sign halves have the order of their bits, and
    # infinity and NaN come last.
    scales = source.reshape(-1, Q8_0_BYTES)[:, :2].copy().view("<u2")
    return float(np.array(int((scales & 0x7FFF).max()), "<u2").view("<f2"))
