"""What holds for every test."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from trained_models import write_unquantised

from swarmcpp.llama.probe import probe

DataDirMaker = Callable[[], Path]

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A parent that ignores Ctrl-C (a background job) hands that down to every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def new_data_dir(tmp_path_factory: pytest.TempPathFactory) -> DataDirMaker:
    """A data directory for one server, without caches but with the CPU's probe, which takes seconds."""
    probed = tmp_path_factory.mktemp("probed")
    probe(probed)

    def make() -> Path:
        directory = tmp_path_factory.mktemp("data")
        shutil.copytree(probed, directory, dirs_exist_ok=True)
        return directory

    return make


@pytest.fixture(scope="session")
def unquantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in F32, for answers that are computed a second time in other pieces than the first."""
    return write_unquantised(tmp_path_factory.mktemp("unquantised") / "unquantised.gguf")
