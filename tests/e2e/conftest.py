"""Models and servers that the tests of this directory share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from serve_client import http_session
from serve_process import ServeProcess, serving
from trained_models import trained_model

from swarmcpp.models.synthetic import TINY, write_model

DataDirMaker = Callable[[], Path]


@pytest.fixture
def data_dir(new_data_dir: DataDirMaker) -> Path:
    """A data directory for the test's own server."""
    return new_data_dir()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of random weights."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture(scope="session")
def trained() -> Path:
    """A GGUF of trained weights."""
    return trained_model()


@pytest.fixture(scope="session")
def tiny_server(tiny: Path, new_data_dir: DataDirMaker) -> Iterator[ServeProcess]:
    """Random weights in 8 slots of 512 tokens; for tests that leave it as it was."""
    with serving(tiny, "--slots", "8", "--ctx-size", "512", "--data-dir", str(new_data_dir())) as server:
        yield server
        assert server.stderr == "loading tiny.gguf\n"


@pytest.fixture(scope="session")
def trained_server(trained: Path, new_data_dir: DataDirMaker) -> Iterator[ServeProcess]:
    """Trained weights in 8 slots of 2048 tokens; for tests that leave it as it was."""
    with serving(trained, "--slots", "8", "--ctx-size", "2048", "--data-dir", str(new_data_dir())) as server:
        yield server
        assert server.stderr == "loading swarmcpp-guide.gguf\n"


@pytest.fixture(scope="session")
def unquantised_server(unquantised: Path, new_data_dir: DataDirMaker) -> Iterator[ServeProcess]:
    """What one engine says that is never disturbed, in slots of 2048 tokens; for tests that leave it as it was."""
    with serving(unquantised, "--slots", "4", "--ctx-size", "2048", "--data-dir", str(new_data_dir())) as server:
        yield server
        assert server.stderr == "loading unquantised.gguf\n"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with http_session() as session:
        yield session
