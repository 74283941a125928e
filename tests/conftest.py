"""What holds for every test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings
from trained_models import write_unquantised

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A parent that ignores Ctrl-C (a background job) hands that down to every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def unquantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in F32, for answers that are computed a second time in other pieces than the first."""
    return write_unquantised(tmp_path_factory.mktemp("unquantised") / "unquantised.gguf")
