"""Q8_0 on the wire: how near it comes, and what it refuses."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp.errors import SnapshotError, SwarmError
from swarmcpp.llama import kvwire
from swarmcpp.llama.convert import Conversion
from swarmcpp.llama.kvwire import dequantise, quantise
from swarmcpp.llama.lib import ggml_library

Halves = npt.NDArray[np.float16]


def there_and_back(values: Halves) -> Halves:
    data = quantise(values.tobytes())
    assert len(data) * 64 == values.nbytes * 34
    return np.frombuffer(dequantise(data, values.nbytes), "<f2")


def rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.mark.parametrize("count", [32, 96, 65536, 65536 + 32, 3 * 65536, 200_000])
def test_the_error_is_half_a_percent_of_the_spread(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype("<f2")
    error = there_and_back(values).astype("f8") - values.astype("f8")
    # A step is the largest of 32 over 127, an error uniform in it: 0.55% of the deviation of normal values.
    assert rms(error) < 0.007 * float(values.std(dtype="f8"))
    assert rms(error) < 0.005 * float(np.abs(values).astype("f8").max())


def test_rows_far_apart_in_size_do_not_disturb_each_other() -> None:
    values = np.random.default_rng(1).standard_normal((64, 32)).astype("f4") * np.logspace(-2, 3, 64)[:, None]
    halves = values.astype("<f2").reshape(-1)
    error = (there_and_back(halves).astype("f8") - halves.astype("f8")).reshape(64, 32)
    assert np.all(np.sqrt((error**2).mean(1)) < 0.01 * values.std(1))


# All halves that are finite, denormals, zeros of both signs and the largest ones among them.
HALF = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7C00 != 0x7C00)


@settings(deadline=None)
@given(st.lists(HALF, min_size=32, max_size=32), st.integers(1, 5))
def test_any_finite_values_come_back_near_and_finite(bits: list[int], repeats: int) -> None:
    values = np.tile(np.array(bits, "<u2").view("<f2"), repeats)
    back = there_and_back(values)
    assert np.isfinite(back).all()
    largest = float(np.abs(values).max())
    # Half a step of int8; then 127 times half a unit of the scale (relative, or of the smallest halves); then F16.
    bound = largest * (0.502 / 127 + 2**-11 + 2**-11) + 127 * 2**-25
    assert float(np.abs(back.astype("f8") - values.astype("f8")).max()) <= bound
    second = there_and_back(back)
    # The same values again: at most the scale is one unit off.
    assert float(np.abs(second.astype("f8") - back.astype("f8")).max()) <= largest * 2**-9 + 127 * 2**-24


def test_a_second_pass_changes_nothing_in_common_values() -> None:
    values = np.random.default_rng(5).standard_normal(1 << 17).astype("<f2")
    once = quantise(values.tobytes())
    assert quantise(dequantise(once, values.nbytes)) == once


@pytest.mark.parametrize("value", [0.0, -0.0, 6e-8, 6.1e-5, 1.0, 65504.0, -65504.0])
def test_one_value_throughout(value: float) -> None:
    values = np.full(64, value, "<f2")
    back = there_and_back(values)
    assert np.allclose(back, values, rtol=2e-3, atol=4e-6)
    assert np.isfinite(back).all()


def test_what_makes_q8_0_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kvwire._Ggml()
    other = ctypes.cast(ggml_library("ggml-cpu").ggml_cpu_fp32_to_fp16, ctypes.c_void_p).value
    for wrong in (other, None):
        with pytest.raises(SwarmError, match=r"Q8_0 is laid out otherwise; install llama-cpp-python 0\.3"):
            kvwire.to_q8_0_at(wrong)
    monkeypatch.setattr(kvwire, "Conversion", lambda _address: Conversion(other))
    with pytest.raises(SwarmError, match="laid out otherwise"):
        kvwire._Ggml()


def test_nothing_is_nothing() -> None:
    assert quantise(b"") == b""
    assert dequantise(b"", 0) == b""


def test_a_view_is_as_good_as_bytes() -> None:
    values = np.random.default_rng(2).standard_normal(320).astype("<f2").tobytes()
    data = quantise(memoryview(values))
    assert data == quantise(values)
    assert dequantise(memoryview(data), len(values)) == dequantise(data, len(values))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 62, 63, 66, 100])
def test_values_that_do_not_fill_a_row_are_for_the_caller_to_ship_as_they_are(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        quantise(bytes(size))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 31, 95])
def test_what_is_not_finite_is_not_quantised(value: float, at: int) -> None:
    values = np.zeros(96, "<f2")
    values[at] = value
    with pytest.raises(SnapshotError, match="finite"):
        quantise(values.tobytes())


@pytest.mark.parametrize(("length", "size"), [(34, 128), (68, 64), (33, 64), (0, 64), (34, 0), (34, 62), (34, -64)])
def test_a_wrong_size_is_refused(length: int, size: int) -> None:
    with pytest.raises(SnapshotError, match=f"{length} bytes"):
        dequantise(bytes(length), size)


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 517.0, -517.0, 65504.0])
@pytest.mark.parametrize("row", [0, 2])
def test_a_scale_that_no_halves_have_is_refused(scale: float, row: int) -> None:
    data = bytearray(quantise(bytes(192)))
    data[34 * row : 34 * row + 2] = np.array([scale], "<f2").tobytes()
    with pytest.raises(SnapshotError, match="scale"):
        dequantise(bytes(data), 192)


def test_any_bytes_give_finite_values_or_are_refused() -> None:
    draw = random.Random(3)
    refused = 0
    for _ in range(2000):
        count = draw.randint(1, 8)
        data = bytearray(draw.randbytes(34 * count))
        for row in range(count):
            # Scales below infinity, up to a little more than what is right.
            data[34 * row + 1] = draw.choice((0x5F, 0x60, 0xDF, draw.randrange(0x60)))
        try:
            back = np.frombuffer(dequantise(bytes(data), 64 * count), "<f2")
        except SnapshotError:
            refused += 1
        else:
            assert np.isfinite(back).all()
    assert 0 < refused < 2000
