"""What follows from the settings before an engine starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from swarmcpp.config import Config
from swarmcpp.models.synthetic import TINY, write_model
from swarmcpp.node import preparing


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("preparing") / "tiny.gguf", TINY, quant="Q8_0")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: kernels are tried in it once."""
    return tmp_path_factory.mktemp("data")


def config_with(data_dir: Path, **inference: object) -> Config:
    base = Config()
    return replace(
        base, inference=replace(base.inference, **inference), storage=replace(base.storage, data_dir=data_dir)
    )


@pytest.mark.parametrize("across_stages", [True, False])
def test_a_draft_is_beside_a_stage_where_stages_verify_guesses(tiny: Path, data_dir: Path, across_stages: bool) -> None:
    config = config_with(data_dir, draft_model_path=str(tiny), speculative_distributed=across_stages)
    assert bool(preparing.engine_options(config, tiny, 512, 2, stage=True).draft_path) is across_stages
    assert (preparing.draft_bytes(config) > 0) is across_stages
    # On a machine that runs all of the model it is there in any case.
    assert preparing.engine_options(config, tiny, 512, 2).draft_path == str(tiny)


@pytest.mark.parametrize("off", [{"draft_model_path": ""}, {"speculative_gamma": 0}], ids=["none", "gamma 0"])
def test_without_guesses_there_is_no_draft(tiny: Path, data_dir: Path, off: dict[str, object]) -> None:
    config = config_with(data_dir, **{"draft_model_path": str(tiny), **off})
    assert preparing.draft_bytes(config) == 0
    for stage in (True, False):
        assert preparing.engine_options(config, tiny, 512, 2, stage=stage).draft_path == ""
