"""Nothing damaged reaches llama.cpp."""

from __future__ import annotations

import pytest
from kv.fuzz_blocks import fuzz

from swarmcpp.kv import arena
from swarmcpp.llama import backend


def test_no_damaged_block_is_accepted() -> None:
    assert fuzz(20_000, seed=3) == 0


def test_the_fuzzer_notices_a_check_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "all_finite_f16", lambda payload: True)
    assert fuzz(1000, seed=3) > 0
    monkeypatch.undo()
    monkeypatch.setattr(arena, "_check", lambda *parts: bytes(16))
    with pytest.raises(AssertionError):
        assert fuzz(1000, seed=3) == 0
