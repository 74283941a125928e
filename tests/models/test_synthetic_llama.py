"""Synthetic models in stock llama.cpp: they load, tokenize any text, and decode to finite, varied logits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as lc

from swarmcpp.models.inspect import inspect
from swarmcpp.models.synthetic import TINY, Architecture, Quant, write_model
from swarmcpp.models.synthetic_vocab import CONTROL_TOKENS, ENDOFTEXT, IM_END

TEXTS = (
    "Hello, world! and the other thing is in there.",
    " leading space\n\n\ttabs\r\n",
    "naïve café — 日本語テキスト 🦙👩‍🚀 עברית",
    "1234567890 x=y+z; it's we'll DON'T",
    "\u0300 combining \u200b zero width \ufffd \x00 nul \x7f",
    "",
)


@lc.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    lc.llama_log_set(_silent, ctypes.c_void_p(0))
    lc.llama_backend_init()
    yield


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    params = lc.llama_model_default_params()
    # The repacked kernels are what crashes on some CPUs; which are safe is not this test's question.
    params.use_extra_bufts = False
    model = lc.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refuses {path}"
    try:
        yield model
    finally:
        lc.llama_model_free(model)


def tokenize(vocab: Any, text: bytes, special: bool = False) -> list[int]:
    buffer = (ctypes.c_int32 * (len(text) + 8))()
    count = lc.llama_tokenize(vocab, text, len(text), buffer, len(buffer), False, special)
    assert count >= 0
    return list(buffer[:count])


def detokenize(vocab: Any, tokens: list[int]) -> bytes:
    out = b""
    for token in tokens:
        piece = ctypes.create_string_buffer(64)
        length = lc.llama_token_to_piece(vocab, token, piece, 64, 0, False)
        out += piece.raw[:length]
    return out


def logits_after(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits of the last of `tokens`, decoded as one batch."""
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, 64, 64
    params.n_threads = params.n_threads_batch = 1
    context = lc.llama_init_from_model(model, params)
    assert context
    try:
        batch = lc.llama_batch_get_one((ctypes.c_int32 * len(tokens))(*tokens), len(tokens))
        assert lc.llama_decode(context, batch) == 0
        n_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
    finally:
        lc.llama_free(context)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "F16", "F32"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_loads_and_decodes(tmp_path: Path, architecture: Architecture, quant: Quant) -> None:
    shape = replace(TINY, architecture=architecture, tied=architecture == "qwen2")
    path = write_model(tmp_path / "model.gguf", shape, quant=quant)
    with loaded(path) as model:
        assert lc.llama_model_n_params(model) == inspect(path).n_params
        first, second = logits_after(model, [1, 2, 3]), logits_after(model, [1, 2, 4])
    for logits in (first, second):
        assert logits.shape == (512,)
        assert np.isfinite(logits).all()
        assert 1.0 < logits.std() < 10.0
    assert np.abs(first - second).max() > 0.1, "logits do not depend on the input"


def test_tokenizer_round_trips_and_merges(tmp_path: Path) -> None:
    with loaded(write_model(tmp_path / "model.gguf", TINY, quant="Q8_0")) as model:
        vocab = lc.llama_model_get_vocab(model)
        for text in TEXTS:
            assert detokenize(vocab, tokenize(vocab, text.encode())) == text.encode()
        assert len(tokenize(vocab, b" the thing")) < len(b" the thing") - 3
        chat = "".join(CONTROL_TOKENS.values()).encode()
        assert tokenize(vocab, chat, special=True) == sorted(CONTROL_TOKENS)
        assert len(tokenize(vocab, chat)) > 20
        assert lc.llama_vocab_eos(vocab) == IM_END
        assert lc.llama_vocab_is_eog(vocab, IM_END)
        assert not lc.llama_vocab_get_add_bos(vocab)
        assert lc.llama_vocab_bos(vocab) == ENDOFTEXT


def test_model_without_vocabulary(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", TINY, quant="Q8_0", tokenizer="none")
    with loaded(path) as model:
        assert lc.llama_vocab_type(lc.llama_model_get_vocab(model)) == lc.LLAMA_VOCAB_TYPE_NONE
        assert np.isfinite(logits_after(model, [7, 500])).all()
