"""Hidden rows as bytes: how small, how near, how fast, and what is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import WireError
from swarmcpp.llama.rows import FloatRows, decode_rows, encode_rows
from swarmcpp.wire.codec import RowEncoding

shapes = st.tuples(st.integers(1, 9), st.integers(1, 100))
ENCODINGS: tuple[RowEncoding, ...] = ("f32", "q8_0")


def normal(n: int, n_embd: int, seed: int = 0) -> FloatRows:
    return np.random.default_rng(seed).standard_normal((n, n_embd)).astype(np.float32)


@given(shapes)
def test_float32_comes_as_it_went(shape: tuple[int, int]) -> None:
    rows = normal(*shape)
    np.testing.assert_array_equal(decode_rows(bytes(encode_rows(rows, "f32")), *shape, "f32"), rows)


@given(shapes, st.floats(1e-3, 1e4))
def test_q8_0_is_near(shape: tuple[int, int], scale: float) -> None:
    """Rows of any width, padded to whole groups of 32."""
    rows = normal(*shape) * np.float32(scale)
    frame = encode_rows(rows, "q8_0")
    assert frame.nbytes == shape[0] * -(-shape[1] // 32) * 34
    got = decode_rows(bytes(frame), *shape, "q8_0")
    assert got.shape == shape
    # Half a step of the largest, and the rounding of its scale to half precision (subnormal for the smallest rows).
    assert np.abs(got - rows).max() <= np.abs(rows).max() * 0.006 + 1e-5


def test_q8_0_is_3_76_times_smaller_and_half_a_percent_off() -> None:
    rows = normal(512, 4096)
    frame = encode_rows(rows, "q8_0")
    assert round(rows.nbytes / frame.nbytes, 2) == 3.76
    error = decode_rows(frame, 512, 4096, "q8_0") - rows
    # A step is the largest of 32 over 127, and an error uniform in it: 0.54% of normal values.
    assert np.sqrt(np.mean(error**2) / np.mean(rows**2)) < 0.0055


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_full_pass_of_a_wide_model_takes_milliseconds(encoding: RowEncoding) -> None:
    rows = normal(512, 4096)
    times = []
    for _ in range(5):
        begun = time.thread_time()
        decode_rows(encode_rows(rows, encoding), 512, 4096, encoding)
        times.append(time.thread_time() - begun)
    # Measured: 0.4 ms and 12 ms.
    assert min(times) < 0.05


def test_rows_that_are_not_contiguous() -> None:
    rows = normal(8, 128)[::2, :64]
    for encoding in ENCODINGS:
        got = decode_rows(encode_rows(rows, encoding), 4, 64, encoding)
        np.testing.assert_allclose(got, rows, atol=0.02)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_sent(encoding: RowEncoding, value: float) -> None:
    rows = normal(3, 64)
    rows[1, 5] = value
    with pytest.raises(WireError, match="not finite"):
        encode_rows(rows, encoding)


def test_what_q8_0_cannot_hold_is_not_sent_as_it() -> None:
    rows = normal(3, 64)
    rows[2, 63] = 1e7
    with pytest.raises(WireError, match=r"up to 1e\+07 do not fit into Q8_0; send them as f32"):
        encode_rows(rows, "q8_0")
    encode_rows(rows, "f32")


@pytest.mark.parametrize(("encoding", "expected"), [("f32", 768), ("q8_0", 204)])
def test_a_frame_of_another_size_names_both(encoding: RowEncoding, expected: int) -> None:
    for size in (0, expected - 1, expected + 1, 10 * expected):
        with pytest.raises(
            WireError, match=f"{size} bytes of {encoding} for 3 rows of 64 values, which take {expected}"
        ):
            decode_rows(bytes(size), 3, 64, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_not_finite_is_not_taken(encoding: RowEncoding) -> None:
    frame = bytearray(encode_rows(normal(3, 64), encoding))
    # An infinite value, and an infinite scale.
    at = 34 if encoding == "q8_0" else 4
    frame[at : at + 4] = np.array([np.inf], "<f2" if encoding == "q8_0" else "<f4").tobytes().ljust(4, b"\0")
    with pytest.raises(WireError, match="not all of which are finite"):
        decode_rows(frame, 3, 64, encoding)


@given(st.binary(max_size=700), st.sampled_from(ENCODINGS), st.integers(1, 3), st.integers(1, 65))
def test_any_bytes_are_finite_rows_or_refused(frame: bytes, encoding: RowEncoding, n: int, n_embd: int) -> None:
    try:
        rows = decode_rows(frame, n, n_embd, encoding)
    except WireError:
        return
    assert rows.shape == (n, n_embd)
    assert np.isfinite(rows).all()
