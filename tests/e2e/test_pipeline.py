"""Nodes with layers of one model say what a node with all of them says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from pipeline_process import FLAGS, Pipeline, listen_all, pipeline
from serve_client import Body, complete, completion
from serve_process import ServeProcess, serving
from swarm_process import answer
from trained_models import BEGINNINGS

from swarmcpp.models.slicing import ARCHITECTURES
from swarmcpp.models.synthetic import Architecture, Shape, write_model

pytestmark = pytest.mark.e2e

ONLY_ASCII = {str(token): -100 for token in range(512) if not 33 <= token <= 126}
"""Of the synthetic vocabulary: every token becomes one character."""

TOKENS = 100
BLOCK_TOKENS = 64

DataDirMaker = Callable[[], Path]


STAGES = [pytest.param(("0-7", "7-12"), marks=pytest.mark.long), ("0-4", "4-10", "10-12")]


@pytest.fixture(scope="module", params=STAGES, ids=["two stages", "three stages"])
def stages(request: pytest.FixtureRequest, trained: Path, new_data_dir: DataDirMaker) -> Iterator[Pipeline]:
    with pipeline(trained, new_data_dir, request.param) as whole:
        yield whole


async def test_stages_say_what_one_engine_says(
    stages: Pipeline, trained_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    bodies = [completion(text, TOKENS) for text in BEGINNINGS]
    expected = [await complete(http, trained_server.url, body) for body in bodies]
    assert len(set(expected)) == len(bodies)
    assert [await complete(http, stages["Ann"].url, body) for body in bodies[:3]] == expected[:3]
    assert await listen_all(http, stages["Ann"].url, bodies) == expected
    stages.wait_idle()


def told(story: str) -> str:
    """A prompt of more than two blocks."""
    return f"{story} {' '.join(BEGINNINGS * 3)}"


async def test_what_stages_have_read_they_need_not_read_again(
    stages: Pipeline, trained_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    """Asked twice, beside others, and after the nodes with the later layers came back."""
    bodies = [completion(told(text), 100) for text in BEGINNINGS[:2]]
    expected = [await complete(http, trained_server.url, body) for body in bodies]
    for body, text in zip(bodies, expected, strict=True):
        cold, warm = [await answer(http, stages["Ann"], body) for _ in range(2)]
        assert (cold.text, warm.text) == (text, text)
        assert cold.prompt_tokens > 2 * BLOCK_TOKENS
        assert warm.cached == (cold.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert await listen_all(http, stages["Ann"].url, bodies) == expected
    for name in stages.nodes:
        if name != "Ann":
            stages[name].terminate()
            stages.start(name)
    stages.wait_answers("Ann")
    for body, text in zip(bodies, expected, strict=True):
        found = await answer(http, stages["Ann"], body)
        assert (found.text, found.cached >= 2 * BLOCK_TOKENS) == (text, True)


def random_bodies() -> list[Body]:
    draw = random.Random(3)
    lengths = (3, 40, 63, 70, 129, 150, 200, 257)
    return [completion([draw.randrange(256) for _ in range(n)], TOKENS, logit_bias=ONLY_ASCII) for n in lengths]


SHORT = ("llama", "qwen3moe")


@pytest.mark.parametrize(
    "architecture", [each if each in SHORT else pytest.param(each, marks=pytest.mark.long) for each in ARCHITECTURES]
)
async def test_every_architecture(
    architecture: Architecture, new_data_dir: DataDirMaker, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Stages with the first, the last and neither of the layers."""
    experts = 4 if architecture == "qwen3moe" else 0
    # Not named as the architecture: llama.cpp looks for tokens of Phi in a model that is called so.
    shape = Shape("random", architecture, 5, 64, 4, 2, 128, 512, 512, n_expert=experts)
    model = write_model(tmp_path / "random.gguf", shape, quant="Q8_0")
    flags = (*FLAGS[:2], "--ctx-size", "512")
    bodies = random_bodies()
    with serving(model, *flags, "--data-dir", str(new_data_dir())) as server:
        expected = [await complete(http, server.url, body) for body in bodies]
    assert len(set(expected)) == len(bodies)
    with pipeline(model, new_data_dir, ("0-2", "2-4", "4-5"), *flags) as stages:
        texts = await listen_all(http, stages["Ann"].url, bodies)
        assert (texts, stages.failovers("Ann")) == (expected, [])
        assert [await complete(http, stages["Ann"].url, body) for body in bodies[3:5]] == expected[3:5]
        stages.wait_idle()
