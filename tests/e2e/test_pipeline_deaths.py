"""Stages that die, freeze or leave in the middle of answers: the answers go on where they stood."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest
from environment import KILLS
from pipeline_process import Pipeline, pipeline
from serve_client import Heard, complete, completion, listen, until
from serve_process import ServeProcess
from swarm_process import SwarmNode
from trained_models import BEGINNINGS

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

TOKENS = 300
PROMPTS = BEGINNINGS[:4]

PAUSE_S = 20.0
"""A stage that says nothing for 3 s is taken for lost; the rest is for a machine that does other things."""

DataDirMaker = Callable[[], Path]


@pytest.fixture(scope="module")
def trio(unquantised: Path, new_data_dir: DataDirMaker) -> Iterator[Pipeline]:
    """Ann is the head; Bob and Cid hold the same later layers. Cid has a copy of the model."""
    with pipeline(unquantised, new_data_dir, ("0-7", "7-12", "7-12"), copies=("Cid",)) as whole:
        yield whole


@pytest.fixture(scope="module")
def texts(unquantised_server: ServeProcess) -> list[str]:
    """What one engine says after the prompts."""

    async def tell() -> list[str]:
        async with aiohttp.ClientSession() as http:
            bodies = [completion(prompt, TOKENS) for prompt in PROMPTS]
            return [await complete(http, unquantised_server.url, body) for body in bodies]

    return asyncio.run(tell())


@dataclass(slots=True)
class Streams:
    """Four answers that run side by side."""

    heards: list[Heard] = field(default_factory=lambda: [Heard() for _ in PROMPTS])
    task: asyncio.Future[list[Heard]] | None = None

    def begin(self, http: aiohttp.ClientSession, url: str) -> None:
        bodies = [completion(prompt, TOKENS) for prompt in PROMPTS]
        running = zip(bodies, self.heards, strict=True)
        self.task = asyncio.gather(*(listen(http, url, body, heard) for body, heard in running))

    @property
    def over(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def all_run(self) -> bool:
        return all(heard.pieces and not heard.done for heard in self.heards)

    async def more_text(self, chars: int) -> None:
        enough = chars + sum(heard.chars for heard in self.heards)
        await until(lambda: sum(heard.chars for heard in self.heards) >= enough or self.over, "text", pause_s=0.001)

    async def assert_whole(self, texts: list[str]) -> None:
        """Nothing lost, nothing twice, nothing changed, one end each."""
        assert self.task is not None
        for heard, text in zip(await self.task, texts, strict=True):
            assert (heard.finish, heard.done, heard.error) == ("length", True, None)
            assert heard.text == text


class Killer:
    """Kills engines or nodes of a pipeline while streams run, at moments drawn from `seed`."""

    def __init__(self, trio: Pipeline, seed: int) -> None:
        self._trio = trio
        self._draw = random.Random(seed)
        self.kills = 0
        self.in_mid_stream = 0

    async def attend(self, streams: Streams, kill: Callable[[str], None], names: tuple[str, ...]) -> None:
        """Kill again and again, until the streams have ended or there were enough kills."""
        while not self.enough:
            await streams.more_text(self._draw.randrange(1, 1500))
            # By chance alone, six kills in a row can miss the stage that is in use.
            name = self._draw.choice((self.kills % 2 and self._trio.in_use(*names)) or names)
            await until(lambda at=name: self._is_back(at) or streams.over, f"{name} is back", pause_s=0.02)  # type: ignore[misc]
            if streams.over:
                return
            self.in_mid_stream += streams.all_run
            self.kills += 1
            kill(name)

    @property
    def enough(self) -> bool:
        """Whether there were KILLS kills, and half as many of streams that ran: others say little."""
        return self.kills >= KILLS and self.in_mid_stream >= KILLS // 2

    def _is_back(self, name: str) -> bool:
        """It has an engine, and the head sees all stages."""
        return self._trio[name].engine_pid() is not None and all_there(self._trio)


def all_there(trio: Pipeline) -> bool:
    rows = {row["name"]: row["ranges"] for row in trio["Ann"].swarm()["nodes"] if row["status"] == "alive"}
    return all(rows.get(name) for name in ("Ann", "Bob", "Cid"))


async def under_fire(
    trio: Pipeline, texts: list[str], kill: Callable[[str], None], names: tuple[str, ...], http: aiohttp.ClientSession
) -> None:
    """Rounds of four streams until there were enough kills."""
    killer, before = Killer(trio, 7), len(trio.failovers("Ann"))
    async with asyncio.timeout(30 + 10 * KILLS):
        while not killer.enough:
            streams = Streams()
            streams.begin(http, trio["Ann"].url)
            await killer.attend(streams, kill, names)
            await streams.assert_whole(texts)
    # Also before a failure is told: the next test begins with what this one left.
    await settled(trio)
    assert len(trio.failovers("Ann")) > before, "no kill hit a stage that was in use"


async def settled(trio: Pipeline) -> None:
    """All are back, and nothing runs."""
    for node in trio.nodes.values():
        # One that was started again has another port.
        await asyncio.to_thread(node.wait_ready)
    await until(lambda: all_there(trio), "all are back", 30.0)
    await asyncio.to_thread(trio.wait_idle)


async def test_kills_of_engines(trio: Pipeline, texts: list[str], http: aiohttp.ClientSession) -> None:
    await under_fire(trio, texts, lambda name: void(trio[name].kill_engine()), ("Ann", "Bob", "Cid"), http)


async def test_kills_of_nodes(trio: Pipeline, texts: list[str], http: aiohttp.ClientSession) -> None:
    def kill(name: str) -> None:
        trio[name].process.kill()
        trio[name].process.wait()
        trio.launch(name)

    await under_fire(trio, texts, kill, ("Bob", "Cid"), http)


def void(_: object) -> None:
    """What a value is for that nobody needs."""


def freeze_engine(node: SwarmNode) -> None:
    pid = node.engine_pid()
    assert pid is not None
    psutil.Process(pid).suspend()


@pytest.mark.parametrize("what", [freeze_engine, SwarmNode.freeze], ids=["engine", "node"])
async def test_a_stage_that_freezes(
    trio: Pipeline, texts: list[str], http: aiohttp.ClientSession, what: Callable[[SwarmNode], None]
) -> None:
    """One of the two that hold the same layers, whichever is in use."""
    before, streams = len(trio.failovers("Ann")), Streams()
    streams.begin(http, trio["Ann"].url)
    await streams.more_text(400)
    name = trio.in_use("Bob", "Cid")[0]
    what(trio[name])
    try:
        await streams.assert_whole(texts)
    finally:
        thaw(trio[name])
    assert max(heard.longest_gap_s for heard in streams.heards) < PAUSE_S
    await settled(trio)
    assert len(trio.failovers("Ann")) > before


def thaw(node: SwarmNode) -> None:
    """Also an engine that its node has given up meanwhile."""
    for process in node.home.processes():
        with suppress(psutil.NoSuchProcess):
            process.resume()


async def test_a_stage_that_leaves(trio: Pipeline, texts: list[str], http: aiohttp.ClientSession) -> None:
    """SIGTERM under load; another holds its layers."""
    for _ in range(2):
        streams = Streams()
        streams.begin(http, trio["Ann"].url)
        await streams.more_text(400)
        name = trio.in_use("Bob", "Cid")[0]
        await asyncio.to_thread(trio[name].terminate)
        await streams.assert_whole(texts)
        await asyncio.to_thread(trio.start, name)
        await settled(trio)


async def test_readers_that_leave(trio: Pipeline, http: aiohttp.ClientSession) -> None:
    """Their sequences are free on all stages."""
    for chars in (1, 300):
        streams = Streams()
        streams.begin(http, trio["Ann"].url)
        await streams.more_text(chars)
        assert streams.task is not None
        streams.task.cancel()
        with suppress(asyncio.CancelledError):
            await streams.task
        await asyncio.to_thread(trio.wait_idle)
