"""A model's own draft, without a band of its layers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from swarmcpp.errors import BadConfig
from swarmcpp.llama.context import Model
from swarmcpp.llama.selfdraft import OUTER, bands, self_draft
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.inspect import inspect
from swarmcpp.models.slicing import slice_of, write_thinned
from swarmcpp.models.synthetic import Shape, write_model

SHAPE = Shape("deep", "llama", 10, 64, 4, 2, 128, 512, 512)


def test_bands_leave_the_outer_layers() -> None:
    for n_layers in range(8, 80):
        for band in bands(n_layers, 0.45):
            assert len(band) == round(0.45 * n_layers)
            assert band.start >= OUTER and band.stop <= n_layers - OUTER
    assert len(bands(24, 0.45)) == 4


@pytest.mark.parametrize(("n_layers", "ratio"), [(4, 0.45), (24, 0.01), (24, 0.9)])
def test_too_many_or_too_few_layers_are_refused(n_layers: int, ratio: float) -> None:
    with pytest.raises(BadConfig, match="swift_skip_ratio"):
        bands(n_layers, ratio)


def test_a_thinned_model_has_its_layers_in_their_order(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf", SHAPE, quant="F16")
    thin = write_thinned(whole, range(3, 7), tmp_path / "thin.gguf")
    assert inspect(thin).n_layers == 6
    assert slice_of(read_header(thin)) is None
    old, new = (
        {tensor.name: path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes] for tensor in header.tensors}
        for path, header in ((whole, read_header(whole)), (thin, read_header(thin)))
    )
    for at, layer in enumerate((0, 1, 2, 7, 8, 9)):
        assert new[f"blk.{at}.ffn_up.weight"] == old[f"blk.{layer}.ffn_up.weight"]
    assert new["token_embd.weight"] == old["token_embd.weight"]
    assert new["output.weight"] == old["output.weight"]
    for bad in (range(3), range(8, 10), range(5, 5)):
        with pytest.raises(BadConfig, match="between the first and the last"):
            write_thinned(whole, bad, tmp_path / "bad.gguf")


def test_the_band_that_says_the_most_of_the_same_is_taken_once(tmp_path: Path) -> None:
    # What it says depends on none of its layers, so every band agrees, and the last one that was compared is kept.
    path = write_model(tmp_path / "whole.gguf", replace(SHAPE, counts=True), quant="Q8_0")
    model = Model(path, use_extra_bufts=False)
    try:
        made = self_draft(path, model, 0.45, tmp_path / "skips", 1, use_extra_bufts=False)
        assert [each.name for each in (tmp_path / "skips").iterdir()] == [made.name]
        assert inspect(made).n_layers == 10 - math.floor(4.5)
        before = made.stat().st_mtime_ns
        assert self_draft(path, model, 0.45, tmp_path / "skips", 1, use_extra_bufts=False) == made
        assert made.stat().st_mtime_ns == before
    finally:
        model.close()
