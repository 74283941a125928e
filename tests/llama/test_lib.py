"""The pinned llama.cpp: whether it is this one, and whether its structs have what is set in them."""

from __future__ import annotations

import logging
import tomllib
from importlib.metadata import version
from pathlib import Path

import llama_cpp.llama_cpp as c
import pytest

from swarmcpp.errors import SwarmError
from swarmcpp.llama import lib


def test_the_pin_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={lib.PINNED}" in project["dependencies"]


def test_the_version_is_that_of_the_package() -> None:
    assert lib.version() == version("llama-cpp-python")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (lib.PINNED, []),
        ("0.3.99", [f"llama-cpp-python is 0.3.99, and swarmcpp was tried with {lib.PINNED} only"]),
        ("", [f"llama-cpp-python is unknown, and swarmcpp was tried with {lib.PINNED} only"]),
    ],
)
def test_another_version_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: str, said: list[str]
) -> None:
    monkeypatch.setattr(lib, "version", lambda: installed)
    monkeypatch.setattr(lib, "_started", False)
    lib.start()
    lib.start()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == said


def test_a_field_that_a_struct_lacks_is_not_set() -> None:
    params = lib.fill(c.llama_context_default_params(), n_ctx=64, swa_full=True)
    assert (params.n_ctx, params.swa_full) == (64, True)
    with pytest.raises(SwarmError, match=r"llama_context_params has no n_streams here; install llama-cpp-python 0\.3"):
        lib.fill(params, n_ctx=128, n_streams=2)
    assert not hasattr(params, "n_streams")
