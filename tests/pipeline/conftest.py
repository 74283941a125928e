"""Models that are cut into stages, and the tokens that they generate as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from engine_support import make_rig
from pipeline_support import N_CTX, N_VOCAB, Swarm

from swarmcpp.core import GenerateRequest
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.models.synthetic import Shape, write_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape("random", "llama", 5, 64, 4, 2, 128, N_VOCAB, N_VOCAB, False)
    return write_model(tmp_path_factory.mktemp("pipeline") / "random.gguf", shape, quant="Q8_0")


@pytest.fixture(scope="session")
def whole(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[list[int]]]]:
    """The tokens of requests that run on one engine with the whole model."""
    model = Model(model_path, use_extra_bufts=False)
    directory = tmp_path_factory.mktemp("whole")

    def tokens(requests: Sequence[GenerateRequest], path: Path | None = None) -> list[list[int]]:
        own = Model(path, use_extra_bufts=False) if path else model
        context = Context(own, ContextOptions(N_CTX, 8, 1))
        rig = make_rig(LlamaBackend(own, context), directory / "abort")
        try:
            for serial, request in enumerate(requests, 1):
                rig.submit(serial, request)
            rig.run()
            return [rig.tokens(serial) for serial in range(1, len(requests) + 1)]
        finally:
            rig.abort.close()
            context.close()
            if path:
                own.close()

    yield tokens
    model.close()


@pytest.fixture
def swarm_of(model_path: Path, tmp_path: Path) -> Iterator[Callable[..., Swarm]]:
    """Makes swarms; their stages end with the test."""
    swarms: list[Swarm] = []

    def make(cuts: Sequence[int] = (0, 2, 5), slots: int = 8, path: Path | None = None) -> Swarm:
        swarms.append(Swarm(path or model_path, cuts, tmp_path, slots))
        return swarms[-1]

    yield make
    for swarm in swarms:
        swarm.close()
