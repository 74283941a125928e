"""The kernel for Q8_0 matrices: against exact sums, and inside llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp._native import q8_problem, q8_product, register_kernels
from swarmcpp.llama.lib import GGML_FUNCTIONS, address
from swarmcpp.models.synthetic import TINY, write_model

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

if problem := q8_problem():
    pytest.skip(problem, allow_module_level=True)


def matrix(rng: np.random.Generator, n_rows: int, n_blocks: int) -> Bytes:
    """Any scales and any bytes, -128 among them, in ggml's layout."""
    blocks = np.empty((n_rows, n_blocks, 34), np.uint8)
    scales = rng.standard_normal((n_rows, n_blocks)).astype(np.float16)
    blocks[..., :2] = scales.view(np.uint8).reshape(n_rows, n_blocks, 2)
    blocks[..., 2:] = rng.integers(0, 256, (n_rows, n_blocks, 32))
    return blocks.reshape(n_rows, n_blocks * 34)


def rounded(rows: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Values and scales of Q8_0 (ggml's quantize_row_q8_0), shapes (n, blocks, 32) and (n, blocks)."""
    blocks = rows.reshape(len(rows), -1, 32)
    largest = np.abs(blocks).max(axis=2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int64), (largest / np.float32(127)).astype(np.float16).astype(
        float
    )


def exact(weights: Bytes, rows: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The product, and the sum of the sizes of its terms, shapes (n, m)."""
    blocks = weights.reshape(len(weights), -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(float)
    values, factors = rounded(rows)
    sums = np.einsum("nbi,mbi->nmb", values, blocks[..., 2:].view(np.int8).astype(np.int64))
    terms = sums * scales[None] * factors[:, None]
    return terms.sum(axis=2), np.abs(terms).sum(axis=2)


def product(weights: Bytes, rows: Floats) -> Floats:
    out = np.full((len(rows), len(weights)), np.nan, np.float32)
    q8_product(weights, rows, out)
    return out


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_products_are_those_of_exact_sums(n_rows: int, n_blocks: int, n_columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = matrix(rng, n_rows, n_blocks)
    rows = (rng.standard_normal((n_columns, n_blocks * 32)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.1] = 0.0
    want, size = exact(weights, rows)
    assert np.all(np.abs(product(weights, rows) - want) <= 1e-6 * size * (n_blocks + 2))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_row_gives_the_same_bits_in_any_company(n_rows: int, n_blocks: int, n_columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = matrix(rng, n_rows, n_blocks)
    rows = rng.standard_normal((n_columns, n_blocks * 32)).astype(np.float32)
    together = product(weights, rows)
    for index in {0, n_columns // 2, n_columns - 1}:
        assert np.array_equal(product(weights, rows[index : index + 1])[0], together[index])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_harms_no_other_row(bad: float) -> None:
    rng = np.random.default_rng(1)
    weights, rows = matrix(rng, 33, 3), rng.standard_normal((20, 96)).astype(np.float32)
    good = product(weights, rows)
    for place in (0, 31, 95):
        spoiled = rows.copy()
        spoiled[7, place] = bad
        got = product(weights, spoiled)
        assert not np.isfinite(got[7]).any()
        assert np.array_equal(np.delete(got, 7, 0), np.delete(good, 7, 0))


def test_zeros_give_zeros() -> None:
    weights = matrix(np.random.default_rng(2), 17, 2)
    assert not product(weights, np.zeros((3, 64), np.float32)).any()


def test_a_ggml_without_what_is_needed_is_left_as_it_was() -> None:
    for name in GGML_FUNCTIONS:
        assert address(name)
        others = {each: address(each) for each in GGML_FUNCTIONS if each != name}
        assert "missing" in register_kernels(others, q8=True, attention=False)
    assert address("ggml_no_such_function") == 0


CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from swarmcpp.core import Rows
from swarmcpp.llama import lib
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model

path, kernel, threads = Path(sys.argv[1]), sys.argv[2] == "kernel", int(sys.argv[3])
if kernel:
    lib.use_kernels(q8=True, attention=False)
    lib.use_kernels(q8=True, attention=False)
model = Model(path, use_extra_bufts=True)
context = Context(model, ContextOptions(n_ctx=256, n_seqs=12, n_threads=threads))
backend = LlamaBackend(model, context)
# A prompt alone, then one row of it in ever larger company.
backend.decode([Rows(0, 0, list(range(1, 100)), outputs=1)])
logits = [backend.logits(0)]
for others in (0, 1, 11):
    for slot in range(12):
        backend.truncate(slot, 99 if slot == 0 else 0)
    backend.decode([Rows(0, 99, [7], outputs=1), *(Rows(1 + i, 0, [9 + i], outputs=1) for i in range(others))])
    logits.append(backend.logits(0))
json.dump([each.tolist() for each in logits], sys.stdout)
"""


def logits(model: Path, *arguments: str) -> Floats:
    """Of CHILD, which has a process of its own: a backend that is registered stays."""
    child = subprocess.run([sys.executable, "-c", CHILD, str(model), *arguments], capture_output=True, check=True)
    return np.array(json.loads(child.stdout), np.float32)


@pytest.mark.e2e
def test_llama_cpp_uses_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", TINY, quant="Q8_0", tokenizer="none")
    kernel, stock = logits(model, "kernel", "1"), logits(model, "stock", "1")
    assert not np.array_equal(kernel, stock), "llama.cpp's own kernels were used"
    assert np.abs(kernel - stock).max() < 0.02 * np.ptp(stock)
    assert np.array_equal(kernel[1], kernel[2]) and np.array_equal(kernel[1], kernel[3]), "company changes a row"
    for threads in ("2", "3"):
        assert np.array_equal(logits(model, "kernel", threads), kernel)
