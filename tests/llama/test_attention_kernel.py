"""The kernel for attention of few rows: against exact sums, bit by bit in any company, and inside llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp._native import attend, attention_problem, register_kernels
from swarmcpp.llama.lib import GGML_FUNCTIONS, address
from swarmcpp.models.synthetic import TINY, write_model

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

if problem := attention_problem():
    pytest.skip(problem, allow_module_level=True)


@dataclass(frozen=True)
class Case:
    """Shapes as of `attend`; the mask is causal: row r sees all positions but the last rows - 1 - r."""

    queries: Floats
    keys: Halves
    values: Halves
    mask: Halves

    def ask(self, lanes: int = 64, *, apart: bool = False) -> Floats:
        streams, heads, rows, _ = self.queries.shape
        out = np.full((streams, rows, heads, self.values.shape[3]), np.nan, np.float32)
        halves = (each.view(np.uint16) for each in (self.keys, self.values, self.mask))
        attend(self.queries, *halves, SCALE, lanes, apart, out)
        return out

    def exact(self) -> npt.NDArray[np.float64]:
        group = self.queries.shape[1] // self.keys.shape[1]
        keys, values = (np.repeat(each.astype(float), group, axis=1) for each in (self.keys, self.values))
        scores = (
            SCALE * np.einsum("shrd,shpd->shrp", self.queries.astype(float), keys) + self.mask.astype(float)[:, None]
        )
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        return np.einsum("shrp,shpd->srhd", weights / weights.sum(axis=3, keepdims=True), values)


SCALE = 0.3


def case(
    rng: np.random.Generator, streams: int, kv_heads: int, group: int, rows: int, positions: int, dk: int, dv: int
) -> Case:
    mask = np.zeros((streams, rows, positions), np.float16)
    for row in range(rows):
        mask[:, row, positions - rows + 1 + row :] = -np.inf
    return Case(
        rng.standard_normal((streams, kv_heads * group, rows, dk), np.float32) * 2,
        rng.standard_normal((streams, kv_heads, positions, dk), np.float32).astype(np.float16),
        rng.standard_normal((streams, kv_heads, positions, dv), np.float32).astype(np.float16),
        mask,
    )


shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 7]),
    st.integers(1, 40),
    st.integers(0, 400),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([8, 24, 64]),
)


def drawn(shape: tuple[int, int, int, int, int, int, int], seed: int) -> Case:
    streams, kv_heads, group, rows, more, dk, dv = shape
    return case(np.random.default_rng(seed), streams, kv_heads, group, rows, rows + more, dk, dv)


@given(shapes, st.sampled_from([8, 16, 64]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_results_are_those_of_exact_sums(
    shape: tuple[int, int, int, int, int, int, int], lanes: int, seed: int
) -> None:
    asked = drawn(shape, seed)
    np.testing.assert_allclose(asked.ask(lanes), asked.exact(), rtol=0, atol=2e-5)


@given(shapes, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_row_gives_the_same_bits_in_any_company(shape: tuple[int, int, int, int, int, int, int], seed: int) -> None:
    """Alone, beside others, by few or many lanes or threads, and whatever nobody may see lies behind it."""
    asked = drawn(shape, seed)
    together = asked.ask()
    for lanes, apart in ((8, False), (16, True), (32, False), (64, True)):
        assert np.array_equal(asked.ask(lanes, apart=apart), together)
    rows, positions = asked.mask.shape[1:]
    for row in {0, rows // 2, rows - 1}:
        end = positions - rows + 1 + row
        for kept in {end, min(positions, end + 70)}:
            alone = Case(
                np.ascontiguousarray(asked.queries[:, :, row : row + 1]),
                np.ascontiguousarray(asked.keys[:, :, :kept]),
                np.ascontiguousarray(asked.values[:, :, :kept]),
                np.ascontiguousarray(asked.mask[:, row : row + 1, :kept]),
            )
            assert np.array_equal(alone.ask(8)[:, 0], together[:, row])


def test_a_row_that_may_see_nothing_gives_zeros_and_harms_no_other() -> None:
    rng = np.random.default_rng(1)
    asked = case(rng, 1, 2, 3, 4, 150, 16, 16)
    good = asked.ask()
    asked.mask[:, 2] = -np.inf
    got = asked.ask()
    assert not got[:, 2].any()
    assert np.array_equal(np.delete(got, 2, 1), np.delete(good, 2, 1))


def test_scores_that_are_far_apart_leave_one_value() -> None:
    asked = case(np.random.default_rng(2), 1, 1, 1, 1, 200, 8, 8)
    asked.keys[0, 0, 137] = asked.queries[0, 0, 0].astype(np.float16) * np.float16(1000)
    np.testing.assert_array_equal(asked.ask()[0, 0, 0], asked.values[0, 0, 137].astype(np.float32))


def test_what_is_not_finite_stays_so_in_its_row_alone() -> None:
    asked = case(np.random.default_rng(3), 1, 1, 2, 5, 100, 16, 16)
    good = asked.ask()
    asked.queries[0, 1, 3, 5] = np.nan
    got = asked.ask()
    assert np.isnan(got[0, 3, 1]).all()
    got[0, 3, 1] = good[0, 3, 1]
    assert np.array_equal(got, good)


CHILD = """
import json, sys
from pathlib import Path
from swarmcpp.core import Rows
from swarmcpp.llama import lib
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model

path, kernel, threads = Path(sys.argv[1]), sys.argv[2] == "kernel", int(sys.argv[3])
lib.use_kernels(q8=False, attention=kernel)
model = Model(path, use_extra_bufts=False)
context = Context(model, ContextOptions(n_ctx=1024, n_seqs=12, n_threads=threads))
backend = LlamaBackend(model, context)
# A prompt, then some tokens: one after another, all in one pass, and beside other sequences.
prompt, tokens = [1 + i % 90 for i in range(640)], [7, 11, 13, 17, 19]
backend.decode([Rows(0, 0, prompt[:320], outputs=0)])
backend.decode([Rows(0, 320, prompt[320:], outputs=1)])
told = []
for at, token in enumerate(tokens):
    backend.decode([Rows(0, 640 + at, [token], outputs=1)])
    told.append(backend.logits(0).tolist())
backend.truncate(0, 640)
backend.decode([Rows(0, 640, tokens, outputs=5)])
together = [context.logits(row).tolist() for row in range(5)]
backend.truncate(0, 640)
backend.decode([Rows(0, 640, tokens[:1], outputs=1), *(Rows(1 + i, 0, [9 + i], outputs=1) for i in range(11))])
json.dump([told, together, [backend.logits(0).tolist()]], sys.stdout)
"""


def logits(model: Path, *arguments: str) -> list[Floats]:
    """Of CHILD, which has a process of its own: a backend that is registered stays."""
    child = subprocess.run([sys.executable, "-c", CHILD, str(model), *arguments], capture_output=True, check=True)
    return [np.array(each, np.float32) for each in json.loads(child.stdout)]


def test_a_ggml_without_what_is_needed_is_left_as_it_was() -> None:
    others = {each: address(each) for each in GGML_FUNCTIONS if each != "ggml_flash_attn_ext"}
    assert "missing" in register_kernels(others, q8=False, attention=True)


@pytest.mark.e2e
def test_llama_cpp_uses_it_and_a_guess_gives_the_bits_of_a_token_alone(tmp_path: Path) -> None:
    # Q8_0, whose products give a row the same bits in any company: what could differ is attention.
    model = write_model(tmp_path / "tiny.gguf", TINY, quant="Q8_0", tokenizer="none")
    one_by_one, together, beside = logits(model, "kernel", "1")
    stock = logits(model, "stock", "1")[0]
    assert not np.array_equal(one_by_one, stock), "llama.cpp's own kernel was used"
    assert np.abs(one_by_one - stock).max() < 0.02 * np.ptp(stock)
    assert np.array_equal(one_by_one, together)
    assert np.array_equal(one_by_one[:1], beside)
    for threads in ("2", "3"):
        assert np.array_equal(logits(model, "kernel", threads)[0], one_by_one)
