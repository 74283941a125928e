"""Machines that are too small for a model take layers of it by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from operator import ge
from pathlib import Path

import aiohttp
import psutil
import pytest
from pipeline_process import Pipeline, nodes
from serve_client import complete, completion, listen, until
from serve_process import serving
from swarm_process import ONLY_ASCII, SwarmNode

from swarmcpp.models.capacity import estimate_memory, stage_memory
from swarmcpp.models.inspect import inspect
from swarmcpp.models.synthetic import Shape, write_model

pytestmark = pytest.mark.e2e

SHAPE = Shape("split", "llama", 24, 768, 12, 4, 3072, 2048, 512)
CTX, SLOTS = 1024, 4
FLAGS = ("--ctx-size", str(CTX), "--slots", str(SLOTS))
TOKENS = 12

NODE_BYTES = 160 << 20
"""A node process beside its engines: interpreter, numpy, sockets, HTTP server, and the vocabulary."""

DataDirMaker = Callable[[], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "split.gguf", SHAPE, quant="F16")


@pytest.fixture(scope="module")
def need(model: Path) -> int:
    """Bytes of an engine that has the whole model."""
    return estimate_memory(inspect(model), CTX, SLOTS).total


@pytest.fixture
def small(model: Path, need: int, new_data_dir: DataDirMaker) -> Iterator[Pipeline]:
    """Ann with the model and most of the memory that it needs, Bob with neither and 40%."""
    with nodes(new_data_dir) as whole:
        memory = ("--memory", str(need * 82 // 100))
        ann = whole.start("Ann", "serve", str(model), "--swarm", *memory, *FLAGS)
        ann.wait_says("cannot answer yet")
        whole.start("Bob", "join", ann.token, "--memory", str(need * 4 // 10), *FLAGS)
        whole.wait_answers("Ann")
        yield whole


def layers_of(node: SwarmNode) -> list[tuple[int, int]]:
    """The ranges that a node has, by itself."""
    (row,) = [row for row in node.swarm()["nodes"] if row["is_self"]]
    return [(int(first), int(last)) for first, _, last in (each.partition("-") for each in row["ranges"])]


def bytes_on_disk(directory: Path) -> int:
    """What files really take: those of parts have holes."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("*") if path.is_file())


def assert_small(bob: SwarmNode, data: Path, model: Path, need: int) -> None:
    """It holds, has fetched and has in memory not much more than its layers."""
    file = inspect(model)
    n_layers = sum(last - first for first, last in layers_of(bob))
    share = n_layers / file.n_layers
    assert 0 < share < 0.5
    assert 0 < bytes_on_disk(data / "parts") < (share + 0.1) * file.size_bytes
    assert not list((data / "models").glob("*.gguf"))
    engine = bob.engine_pid()
    assert engine is not None
    engine_bytes, node_bytes = (psutil.Process(pid).memory_info().rss for pid in (engine, bob.pid))
    assert engine_bytes <= 1.1 * stage_memory(file, *layers_of(bob)[0], CTX, SLOTS).total
    assert engine_bytes < need * 4 // 10
    assert node_bytes < NODE_BYTES


async def test_machines_that_are_too_small(
    model: Path, need: int, small: Pipeline, new_data_dir: DataDirMaker, http: aiohttp.ClientSession
) -> None:
    """One with 40% of the memory helps one with 90%; a third one comes and goes under load."""
    bodies = [completion([60 + number] * 40, TOKENS, logit_bias=ONLY_ASCII) for number in range(3)]
    with serving(model, *FLAGS, "--data-dir", str(new_data_dir())) as server:
        expected = [await complete(http, server.url, body) for body in bodies]
    ann, bob = small["Ann"], small["Bob"]
    assert [await complete(http, ann.url, body) for body in bodies] == expected
    assert await complete(http, bob.url, bodies[0]) == expected[0]
    assert_small(bob, small.seats["Bob"].data, model, need)
    counts = [0, 0, 0]
    stop = asyncio.Event()

    async def keep_asking(number: int) -> None:
        while not stop.is_set():
            heard = await listen(http, ann.url, bodies[number])
            assert (heard.text, heard.finish, heard.error) == (expected[number], "length", None)
            counts[number] += 1

    async def three_more() -> None:
        enough = [count + 3 for count in counts]
        await until(lambda: all(map(ge, counts, enough)) or any(task.done() for task in tasks), "answers")

    tasks = [asyncio.create_task(keep_asking(number)) for number in range(3)]
    command = ("join", ann.token, "--memory", str(need * 82 // 100), *FLAGS)
    cid = await asyncio.to_thread(small.start, "Cid", *command)
    # Ann is full and cannot move for Cid, who takes over what makes the chain slow.
    assert layers_of(cid) == layers_of(ann)
    assert [await complete(http, cid.url, body) for body in bodies] == expected
    await three_more()
    await asyncio.to_thread(cid.terminate)
    await three_more()
    stop.set()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(small.wait_idle)
