"""Two models in one node, each with an engine and an arena of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from swarm_support import HOST

from swarmcpp.commands.swarm import in_swarm
from swarmcpp.config import Config, EngineConfig, ServerConfig, StorageConfig, SwarmConfig
from swarmcpp.core import GenerateRequest, SamplingParams
from swarmcpp.models.synthetic import TINY, Shape, write_model
from swarmcpp.node.member import Swarm
from swarmcpp.node.preparing import prepare
from swarmcpp.node.serving import run
from swarmcpp.node.whole import WholeModel
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.store import SwarmStore

pytestmark = pytest.mark.e2e

DEADLINE_S = 60.0
PROMPT = tuple(range(33, 120)) * 2
"""Two full blocks and more."""
OTHER = Shape("other", "qwen2", 2, 64, 4, 2, 128, 512, 320)


@dataclass
class Running:
    """A node that serves both, through its API."""

    http: aiohttp.ClientSession
    swarm: Swarm
    models: list[WholeModel]

    async def names(self) -> list[str]:
        async with self.http.get("/v1/models") as response:
            return [each["id"] for each in (await response.json())["data"]]

    async def ask(self, model: str | None, answer: int = 8) -> tuple[str, int]:
        """The text, and how many tokens of the prompt had been computed before."""
        n_vocab = (OTHER if model == "other" else TINY).n_vocab
        bias = {str(token): -100 for token in range(n_vocab) if not 33 <= token <= 126}
        body = {"prompt": list(PROMPT), "max_tokens": answer, "temperature": 0, "logit_bias": bias}
        async with self.http.post("/v1/completions", json={**body, "model": model} if model else body) as response:
            document = await response.json()
            assert response.status == 200, document
            cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
            return document["choices"][0]["text"], cached

    async def engine(self, model: WholeModel, answer: int = 8) -> str:
        """What the engine of a model answers itself."""
        bias = tuple((token, -100.0) for token in range(model.info.n_vocab) if not 33 <= token <= 126)
        greedy = SamplingParams(temperature=0.0, logit_bias=bias)
        wanted = GenerateRequest("r", "", PROMPT, answer, greedy, cache_salt="apart")
        return "".join([chr(token) async for part in model.supervisor.submit(wanted) for token in part.ids])


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    config = Config(
        server=ServerConfig(port=0),
        engine=EngineConfig(threads=1, ctx_size=256, slots=2),
        storage=StorageConfig(data_dir=tmp_path, cache_size="8M"),
        swarm=SwarmConfig(enabled=True, host=HOST, port=0, discovery=False),
    )
    paths = [write_model(tmp_path / f"{each.name}.gguf", each, quant="Q8_0") for each in (TINY, OTHER)]
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    async with in_swarm(config, SwarmStore(tmp_path), SwarmKey.new(), (), lan=False) as swarm:
        models = [WholeModel(config, await asyncio.to_thread(prepare, config, path), swarm) for path in paths]
        serving = asyncio.create_task(run(config, models, swarm=swarm, on_ready=ready.set_result, stop=stop))
        try:
            await asyncio.wait({serving, ready}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            assert ready.done(), serving
            async with aiohttp.ClientSession(ready.result()) as http, asyncio.timeout(DEADLINE_S):
                yield Running(http, swarm, models)
        finally:
            stop.set()
            await serving
    assert all(model.supervisor.status.state == "stopped" and model.codec is None for model in models)


async def test_both_answer_side_by_side_each_from_its_own_engine(running: Running) -> None:
    assert await running.names() == ["tiny", "other"]
    tiny, other, default = await asyncio.gather(*(running.ask(each) for each in ("tiny", "other", None)))
    assert tiny[0] == default[0] == await running.engine(running.models[0])
    assert other[0] == await running.engine(running.models[1])
    assert tiny[0] != other[0] and len(tiny[0]) == len(other[0]) == 8


async def test_each_has_its_blocks_in_an_arena_of_its_own(running: Running) -> None:
    for name in ("tiny", "other"):
        assert (await running.ask(name))[1] == 0
    for name in ("tiny", "other"):
        assert (await running.ask(name))[1] >= 128
    caches = [model.supervisor.cache for model in running.models]
    assert caches[0] and caches[1] and caches[0].path != caches[1].path
    told = running.swarm.capability()
    assert [each.root for each in told.models] == [each.root for each in caches if each]
    assert told.blocks == sum(each.stats().blocks for each in caches if each) >= 4
    for model, cache in zip(running.models, caches, strict=True):
        assert cache and running.swarm.blocks.server(cache.root)
        assert running.swarm.blocks.warm(GenerateRequest("r", model.info.id, PROMPT, 1))[0] == 128
