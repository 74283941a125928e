"""Each test of the command line runs in a home of its own, without the variables and the log of this session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is the current one, and where the user's files would be."""
    for name in [each for each in os.environ if each.startswith("SWARMCPP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    root, ours = logging.getLogger(), logging.getLogger("swarmcpp")
    before = (list(root.handlers), root.level, ours.level)
    yield tmp_path
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
