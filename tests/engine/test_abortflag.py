"""The words that a node and its engine share."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcpp import _native
from swarmcpp.engine.abortflag import MAX_PROMPTS, AbortFlag


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[AbortFlag, AbortFlag]]:
    """The node's mapping and the engine's."""
    node = AbortFlag(tmp_path / "abort", create=True)
    engine = AbortFlag(tmp_path / "abort", create=False)
    yield node, engine
    node.close()
    engine.close()


def requested(flag: AbortFlag) -> bool:
    """What llama.cpp's compute threads see."""
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(_native.abort_callback_address())
    return bool(callback(flag.address))


def test_only_a_step_with_that_prompt_is_aborted(ends: tuple[AbortFlag, AbortFlag]) -> None:
    node, engine = ends
    assert not node.abort_prompt(7), "no step runs"
    engine.begin(1, [5, 7])
    assert not node.abort_prompt(6)
    assert not requested(engine)
    assert node.abort_prompt(7)
    assert requested(engine)


def test_an_abort_never_hits_the_next_step(ends: tuple[AbortFlag, AbortFlag]) -> None:
    node, engine = ends
    engine.begin(1, [7])
    node.abort_prompt(7)
    engine.end()
    assert not requested(engine)
    engine.begin(2, [7])
    assert not requested(engine)


def test_a_step_that_only_decodes_is_left_alone(ends: tuple[AbortFlag, AbortFlag]) -> None:
    node, engine = ends
    engine.begin(1, [7])
    engine.begin(2, [])
    assert not node.abort_prompt(7)
    assert not requested(engine)


def test_more_prompts_than_words_are_cut(ends: tuple[AbortFlag, AbortFlag]) -> None:
    node, engine = ends
    engine.begin(1, list(range(1, 1000)))
    assert node.abort_prompt(MAX_PROMPTS)
    assert not node.abort_prompt(MAX_PROMPTS + 1)
