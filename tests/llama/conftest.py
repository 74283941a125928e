"""Real llama.cpp: a tiny random model and the trained one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_support import BackendMaker
from trained_models import trained_model

from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.models.synthetic import TINY, write_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Model]:
    # The plain kernels are safe on every CPU.
    model = Model(tiny_path, use_extra_bufts=False)
    yield model
    model.close()


@pytest.fixture(scope="session")
def trained() -> Iterator[Model]:
    model = Model(trained_model(), use_extra_bufts=False)
    yield model
    model.close()


@pytest.fixture
def backend_on() -> Iterator[BackendMaker]:
    """Makes backends on a model; their contexts are closed after the test."""
    contexts: list[Context] = []

    def make(model: Model, n_seqs: int = 4, n_ctx: int = 256) -> LlamaBackend:
        contexts.append(Context(model, ContextOptions(n_ctx=n_ctx, n_seqs=n_seqs, n_threads=1)))
        return LlamaBackend(model, contexts[-1])

    yield make
    for context in contexts:
        context.close()
