"""ggml's own conversions of rows to floats, by type."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from swarmcpp.errors import SwarmError
from swarmcpp.llama.lib import ggml_library, start

Convert = Callable[[int, int, int], None]
"""(source address, target address, number of values); runs without the GIL."""

Conversion = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""A `Convert` of a C function."""

F32_BYTES: Final = 4


class _Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


def float_converter(kind: GGMLQuantizationType) -> Convert | None:
    """What makes floats of rows of a type; None when this ggml has nothing for it.

    Raises SwarmError when ggml_type_traits is not what it was in the pinned llama.cpp.
    """
    if kind is GGMLQuantizationType.F32:
        return _copy
    start()
    traits = ggml_library("ggml-base").ggml_get_type_traits
    traits.argtypes, traits.restype = [ctypes.c_int], ctypes.POINTER(_Traits)
    found = traits(int(kind)).contents
    if (found.blck_size, found.type_size) != GGML_QUANT_SIZES[kind]:
        raise SwarmError(f"ggml_type_traits of {kind.name} is laid out otherwise; install the pinned llama-cpp-python")
    if not found.to_float:
        return None
    return Conversion(found.to_float)


def _copy(source: int, target: int, count: int) -> None:
    ctypes.memmove(target, source, F32_BYTES * count)
