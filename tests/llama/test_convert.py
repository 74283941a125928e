"""ggml's conversions to floats give what gguf's own arithmetic does."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from swarmcpp.llama.convert import float_converter

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS")
ROWS, COLUMNS = 7, 512


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_gguf(kind: str) -> None:
    """Of random bytes, so of every scale; those that are not finite are not finite in both."""
    of = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[of]
    stored = np.random.default_rng(3).integers(0, 256, (ROWS, COLUMNS // values * size), np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(stored, of)
    convert = float_converter(of)
    assert convert is not None
    got = np.full((ROWS, COLUMNS), np.nan, np.float32)
    for stored_row, row in zip(stored, got, strict=True):
        convert(stored_row.ctypes.data, row.ctypes.data, COLUMNS)
    finite = np.isfinite(expected)
    assert finite.any()
    np.testing.assert_array_equal(got[finite], expected[finite])
    assert not np.isfinite(got[~finite]).any()


def test_integers_have_no_conversion() -> None:
    assert float_converter(GGMLQuantizationType.I32) is None
