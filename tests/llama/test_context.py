"""The context: bit-identical streams, truncation, abort, and refusals that do not end the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_support import poll, prompt_of, request
from llama_support import BackendMaker

from swarmcpp import _native
from swarmcpp.core import Rows, SamplingParams
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.errors import DecodeAborted, DecodeFailed
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Batch, Context, ContextOptions, Model
from swarmcpp.models.synthetic import Shape, write_model

TOKENS = prompt_of(133, 5)


def last_logits(backend: LlamaBackend, chunks: Sequence[int], neighbours: int = 0) -> np.ndarray:
    """Logits after TOKENS, computed in `chunks` in slot 0 while other slots decode.

    Rows of ascending slots: only those share a ubatch with streams.
    """
    for slot in range(backend.n_slots):
        backend.truncate(slot, 0)
    at = 0
    for step, count in enumerate(chunks):
        others = [Rows(slot, step, [9 * slot], outputs=1) for slot in range(1, neighbours + 1)]
        backend.decode([Rows(0, at, TOKENS[at : at + count], outputs=1), *others])
        at += count
    assert at == len(TOKENS) == backend.length(0)
    return backend.logits(0)


@pytest.mark.parametrize("chunks", [[1] * 133, [16] * 8 + [5]])
def test_a_sequence_is_the_same_alone_and_beside_others(
    tiny: Model, backend_on: BackendMaker, chunks: list[int]
) -> None:
    backend = backend_on(tiny)
    alone = last_logits(backend, chunks)
    for neighbours in (1, 3):
        np.testing.assert_array_equal(last_logits(backend, chunks, neighbours), alone)


@pytest.mark.parametrize("held", [192, 640])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_decode_rows_beside_others_at_any_length(tiny: Model, held: int, n_threads: int) -> None:
    """Bit-identical but for one case: from 512 cells and with several threads, a lone row takes a kernel of its own.

    ggml then splits the KV between the threads (`use_split_kv_path`), and sums in another order.
    """
    context = Context(tiny, ContextOptions(n_ctx=1024, n_seqs=3, n_threads=n_threads))
    backend = LlamaBackend(tiny, context)
    prompt = prompt_of(held, 3, 500)

    def logits_beside(neighbours: Sequence[int]) -> np.ndarray:
        for slot in range(3):
            backend.truncate(slot, 0)
        for start in range(0, held, 64):
            backend.decode([Rows(0, start, prompt[start : start + 64], outputs=0)])
        for step in range(4):
            others = [Rows(slot, step, [slot + step], outputs=1) for slot in neighbours]
            backend.decode([Rows(0, held + step, [5 * step], outputs=1), *others])
        return backend.logits(0)

    alone, pair, trio = logits_beside([]), logits_beside([1]), logits_beside([1, 2])
    context.close()
    np.testing.assert_array_equal(pair, trio)
    if n_threads == 1 or held < 512:
        np.testing.assert_array_equal(alone, pair)
    else:
        assert np.abs(alone - pair).max() < 0.1 * np.ptp(pair)


def test_whole_tiles_of_64_are_the_same_in_any_chunks(tiny: Model, backend_on: BackendMaker) -> None:
    """llama.cpp's attention changes its kernel at 64 rows: what stays on one side of it is bit-identical."""
    backend = backend_on(tiny)
    np.testing.assert_array_equal(last_logits(backend, [64, 64, 5]), last_logits(backend, [128, 5]))
    np.testing.assert_array_equal(last_logits(backend, [16] * 8 + [5]), last_logits(backend, [32] * 4 + [5]))


def test_slots_do_not_differ(tiny: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(tiny)
    backend.decode([Rows(slot, 0, TOKENS[:40], outputs=1) for slot in range(4)])
    for slot in range(1, 4):
        np.testing.assert_array_equal(backend.logits(slot), backend.logits(0))


def test_truncated_and_recomputed_is_the_same(tiny: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(tiny)
    expected = last_logits(backend, [64, 64, 5])
    for n_past in (132, 100, 1, 0):
        backend.truncate(0, n_past)
        assert backend.length(0) == n_past
    backend.decode([Rows(0, 0, prompt_of(90, 1), outputs=1)])
    np.testing.assert_array_equal(last_logits(backend, [64, 64, 5]), expected)


def test_logits_are_what_the_sampler_sees(tiny: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(tiny)
    logits = last_logits(backend, [133])
    assert logits.shape == (tiny.vocab.n_vocab,)
    assert np.isfinite(logits).all()


def test_rows_that_do_not_follow_are_a_failed_decode(tiny: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(tiny)
    backend.decode([Rows(0, 0, [1, 2, 3], outputs=1)])
    with pytest.raises(DecodeFailed, match=r"llama_decode returned -?\d+ on 1 rows: .+"):
        backend.decode([Rows(0, 7, [4], outputs=1)])


def test_a_token_outside_the_vocabulary_is_a_failed_decode(tiny: Model, backend_on: BackendMaker) -> None:
    with pytest.raises(DecodeFailed):
        backend_on(tiny).decode([Rows(0, 0, [512], outputs=1)])


def test_a_full_slot_is_a_failed_decode(tiny: Model, backend_on: BackendMaker) -> None:
    backend = backend_on(tiny)
    backend.decode([Rows(0, 0, prompt_of(256), outputs=0)])
    with pytest.raises(DecodeFailed):
        backend.decode([Rows(0, 256, [1], outputs=1)])


def test_a_batch_never_exceeds_its_capacity() -> None:
    batch = Batch(8)
    assert batch.add(0, 0, [1] * 5, outputs=1) == 4
    with pytest.raises(ValueError, match="9 rows do not fit into a batch of 8"):
        batch.add(1, 0, [1] * 4, outputs=1)
    assert batch.add(1, 0, [1] * 3, outputs=0) == 7
    batch.clear()
    assert batch.count == 0


def test_a_batch_is_laid_out_for_llama_cpp() -> None:
    batch = Batch(8)
    batch.add(3, 10, [7, 8], outputs=0)
    batch.add(1, 0, [9], outputs=1)
    struct = batch.struct
    assert struct.n_tokens == 3
    assert [struct.token[i] for i in range(3)] == [7, 8, 9]
    assert [struct.pos[i] for i in range(3)] == [10, 11, 0]
    assert [struct.seq_id[i][0] for i in range(3)] == [3, 3, 1]
    assert [struct.n_seq_id[i] for i in range(3)] == [1, 1, 1]
    assert [struct.logits[i] for i in range(3)] == [0, 0, 1]


def test_closing_twice_is_harmless(tiny: Model) -> None:
    context = Context(tiny, ContextOptions(n_ctx=256, n_seqs=1, n_threads=1))
    context.close()
    context.close()


# -- abort -------------------------------------------------------------------------------------------------------

# 512 rows of it take some tenths of a second: long enough to be interrupted by another thread.
SLOW = Shape("slow", "llama", 6, 512, 8, 2, 1408, 2048, 512)
PROMPT = prompt_of(512, 2, 500)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write_model(tmp_path_factory.mktemp("slow") / "slow.gguf", SLOW, quant="Q8_0"), use_extra_bufts=False)
    yield model
    model.close()


@pytest.fixture
def abortable(slow_model: Model, tmp_path: Path) -> Iterator[tuple[LlamaBackend, AbortFlag, AbortFlag]]:
    """A backend, its engine's abort flag, and the node's."""
    node = AbortFlag(tmp_path / "abort", create=True)
    engine = AbortFlag(tmp_path / "abort", create=False)
    options = ContextOptions(1024, 2, 1, _native.abort_callback_address(), engine.address)
    context = Context(slow_model, options)
    yield LlamaBackend(slow_model, context), engine, node
    context.close()
    engine.close()
    node.close()


def test_another_thread_aborts_a_prefill(abortable: tuple[LlamaBackend, AbortFlag, AbortFlag]) -> None:
    backend, engine, node = abortable
    backend.decode([Rows(1, 0, [5, 6], outputs=1)])
    backend.decode([Rows(1, 2, [7], outputs=1), Rows(0, 0, PROMPT[:500], outputs=1)])
    expected = backend.logits(0), backend.logits(1)
    backend.truncate(0, 0)
    backend.truncate(1, 2)

    thread = threading.Thread(target=poll, args=(lambda: node.abort_prompt(42), "the step begins"))
    thread.start()
    engine.begin(1, [42])
    with pytest.raises(DecodeAborted):
        backend.decode([Rows(1, 2, [7], outputs=1), Rows(0, 0, PROMPT[:500], outputs=1)])
    engine.end()
    thread.join()
    backend.truncate(0, 0)
    backend.truncate(1, 2)
    assert (backend.length(0), backend.length(1)) == (0, 2)
    engine.begin(2, [42])
    backend.decode([Rows(1, 2, [7], outputs=1), Rows(0, 0, PROMPT[:500], outputs=1)])
    engine.end()
    np.testing.assert_array_equal(backend.logits(0), expected[0])
    np.testing.assert_array_equal(backend.logits(1), expected[1])


def test_an_abort_keeps_earlier_chunks(abortable: tuple[LlamaBackend, AbortFlag, AbortFlag]) -> None:
    backend, engine, node = abortable
    backend.decode([Rows(0, 0, PROMPT[:128], outputs=0)])
    backend.decode([Rows(0, 128, PROMPT[128:256], outputs=1)])
    expected = backend.logits(0)
    backend.truncate(0, 128)
    engine.begin(1, [1])
    assert node.abort_prompt(1)
    with pytest.raises(DecodeAborted):
        backend.decode([Rows(0, 128, PROMPT[128:256], outputs=1)])
    engine.end()
    backend.truncate(0, 128)
    assert backend.length(0) == 128
    backend.decode([Rows(0, 128, PROMPT[128:256], outputs=1)])
    np.testing.assert_array_equal(backend.logits(0), expected)


def test_several_rows_of_a_sequence_can_be_outputs(tiny: Model, backend_on: BackendMaker) -> None:
    """One sampler draws once for each, in their order, as if the tokens had come one by one."""
    backend, prompt = backend_on(tiny), list(prompt_of(40))
    wanted = request(prompt, sampling=SamplingParams(temperature=1.0, seed=7))
    alone, together = backend.sampler(wanted), backend.sampler(wanted)
    try:
        drawn = []
        for end in (38, 39, 40):
            backend.truncate(0, 0)
            backend.decode([Rows(0, 0, prompt[:end], outputs=1)])
            drawn.append(backend.sample(alone, 0))
        backend.truncate(0, 0)
        backend.decode([Rows(0, 0, prompt, outputs=3)])
        assert [backend.sample(together, 0, output) for output in range(3)] == drawn
    finally:
        alone.close()
        together.close()
