"""The engine's two backends: the strict fake, and llama.cpp on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import Rig, RigMaker, make_rig
from fake_backend import FakeBackend

from swarmcpp.engine.scheduler import Policy
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.models.synthetic import TINY, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = write_model(tmp_path_factory.mktemp("engine") / "tiny.gguf", TINY, quant="Q8_0")
    # The plain kernels are safe on every CPU.
    model = Model(path, use_extra_bufts=False)
    yield model
    model.close()


@pytest.fixture
def fake_rig(tmp_path: Path) -> Iterator[RigMaker]:
    """Makes rigs on a FakeBackend; keyword arguments are its fields, `policy` and `clock`."""
    rigs: list[Rig] = []

    def make(*, policy: Policy | None = None, **fields: Any) -> Rig:
        reuse = fields.get("block_tokens", 0)
        rig = make_rig(FakeBackend(**fields), tmp_path / f"abort{len(rigs)}", policy, fields.get("clock"), reuse)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.abort.close()


@pytest.fixture(params=["fake", "llama"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigMaker]:
    """Makes rigs on either backend, with 256 tokens per slot."""
    rigs: list[Rig] = []
    contexts: list[Context] = []

    def make(n_slots: int = 4, policy: Policy | None = None) -> Rig:
        if request.param == "fake":
            backend: Any = FakeBackend(n_slots=n_slots)
        else:
            model = request.getfixturevalue("tiny_model")
            contexts.append(Context(model, ContextOptions(n_ctx=256, n_seqs=n_slots, n_threads=1)))
            backend = LlamaBackend(model, contexts[-1])
        rigs.append(make_rig(backend, tmp_path / f"abort{len(rigs)}", policy))
        return rigs[-1]

    yield make
    for one in rigs:
        one.abort.close()
    for context in contexts:
        context.close()
