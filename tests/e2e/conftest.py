"""Models and servers that the tests of this directory share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from engine_support import stories_model
from serve_client import http_session
from serve_process import ServeProcess, serving

from swarmcpp.models.synthetic import TINY, write_model


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every server of the session, so that the CPU is probed once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of random weights."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A GGUF of trained weights."""
    return stories_model()


@pytest.fixture(scope="session")
def tiny_server(tiny: Path, data_dir: Path) -> Iterator[ServeProcess]:
    """Random weights in 8 slots of 512 tokens; for tests that leave it as it was."""
    with serving(tiny, "--slots", "8", "--ctx-size", "512", "--data-dir", str(data_dir)) as server:
        yield server
        assert server.stderr == "loading tiny.gguf\n"


@pytest.fixture(scope="session")
def stories_server(stories: Path, data_dir: Path) -> Iterator[ServeProcess]:
    """Trained weights in 8 slots of 2048 tokens; for tests that leave it as it was."""
    with serving(stories, "--slots", "8", "--ctx-size", "2048", "--data-dir", str(data_dir)) as server:
        yield server
        assert server.stderr == "loading stories260K.gguf\n"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with http_session() as session:
        yield session
