"""Nodes that die, freeze or lose their clients while they work for others."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from environment import KILLS
from serve_client import Body, Heard, ask, completion, listen, until, until_health
from swarm_process import ONLY_ASCII, SLOW, Seat, Swarm, answer, http_with_routes, ready, swarm
from trained_models import BEGINNINGS

from swarmcpp.models.synthetic import write_model

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

TOKENS = 300
PROMPTS = BEGINNINGS[:4]

PAUSE_S = 15.0
"""The silence after which a node is taken for lost is 2 s; the rest is for a machine that does other things."""

DataDirMaker = Callable[[], Path]


def story(text: str) -> Body:
    return completion(text, TOKENS, model="unquantised")


@pytest.fixture(scope="module")
def three(unquantised: Path, tmp_path_factory: pytest.TempPathFactory, new_data_dir: DataDirMaker) -> Iterator[Swarm]:
    """Ann and Cid serve the trained model; Bob, who serves another model, asks them for his clients."""
    slow = write_model(tmp_path_factory.mktemp("model") / "slow.gguf", SLOW, quant="F16")
    models = {"Ann": unquantised, "Bob": slow, "Cid": unquantised}
    seats = {name: Seat(name, new_data_dir()) for name in models}
    with swarm(models, seats, "--slots", "4", "--ctx-size", "2048") as whole:
        yield whole


@pytest.fixture(scope="module")
def texts(three: Swarm) -> dict[str, str]:
    """What the stories are."""

    async def tell() -> dict[str, str]:
        async with aiohttp.ClientSession() as http:
            return {text: (await answer(http, three["Ann"], story(text))).text for text in PROMPTS}

    return asyncio.run(tell())


@asynccontextmanager
async def told(three: Swarm, text: str, heard: Heard) -> AsyncIterator[tuple[asyncio.Task[Heard], list[str]]]:
    """Bob tells a story, which must come to its end; with the routes of it, of which there is one once it begins."""
    routes: list[str] = []
    usage = {"include_usage": True}
    async with http_with_routes(routes) as http:
        task = asyncio.create_task(listen(http, three["Bob"].url, {**story(text), "stream_options": usage}, heard))
        yield task, routes
        await task


def assert_whole(heard: Heard, text: str) -> None:
    """Nothing lost, nothing twice, one end."""
    assert (heard.finish, heard.done, heard.error) == ("length", True, None)
    assert heard.usage is not None
    assert heard.usage["completion_tokens"] == TOKENS
    assert heard.text == text


async def test_kills_of_nodes_that_generate_for_another(three: Swarm, texts: dict[str, str]) -> None:
    draw = random.Random(5)
    ids = {name: three["Bob"].row(name)["id"] for name in ("Ann", "Cid")}
    in_mid_stream = 0
    for _ in range(KILLS):
        text, heard = draw.choice(PROMPTS), Heard()
        async with told(three, text, heard) as (task, routes):
            if draw.random() < 0.2:
                await asyncio.sleep(draw.uniform(0, 0.02))
                name = draw.choice(("Ann", "Cid"))
            else:
                chars = draw.randrange(1, len(texts[text]) // 2)
                await until(lambda: heard.chars >= chars or task.done(), "some text", pause_s=0.001)  # noqa: B023
                name = routes[0].removeprefix("peer ")
            in_mid_stream += not task.done() and routes == [f"peer {name}"]
            three[name].kill()
        assert_whole(heard, texts[text])
        three.start(name)
        three.wait_together()
        assert {each: three["Bob"].row(each)["id"] for each in ids} == ids
    assert in_mid_stream >= KILLS // 2, "too few kills hit a running stream to tell anything"


async def test_a_node_that_freezes(three: Swarm, texts: dict[str, str], http: aiohttp.ClientSession) -> None:
    for text in PROMPTS * 3:
        heard = Heard()
        async with told(three, text, heard) as (task, routes):
            await until(lambda: heard.chars >= 20 or task.done(), "some text", pause_s=0.001)  # noqa: B023
            name = routes[0].removeprefix("peer ")
            three[name].freeze()
        assert_whole(heard, texts[text])
        assert heard.longest_gap_s < PAUSE_S
        if heard.longest_gap_s > 1:
            break
        three[name].thaw()
    else:
        pytest.fail("no stream was frozen before its end")
    async with asyncio.timeout(PAUSE_S):
        assert (await answer(http, three["Bob"], story(text))).text == texts[text]
    three[name].thaw()
    three.wait_together()
    for where in (three["Bob"], three[name]):
        assert (await answer(http, where, story(text))).text == texts[text]
    await until_health(http, three[name].url, state="ready", slots_busy=0, queued=0, restarts=0)


async def test_when_the_last_one_dies(three: Swarm, texts: dict[str, str], http: aiohttp.ClientSession) -> None:
    """What came is right, and the stream ends with an error; the model is there again when a node is."""
    heard, text = Heard(), PROMPTS[0]
    async with told(three, text, heard) as (task, _):
        await until(lambda: heard.chars >= 20 or task.done(), "some text", pause_s=0.001)
        for name in ("Ann", "Cid"):
            three[name].process.kill()
        await asyncio.wait_for(task, PAUSE_S)
    if heard.finish is None:
        assert heard.error is not None
        assert texts[text].startswith(heard.text)
    else:
        assert_whole(heard, texts[text])
    for name in ("Ann", "Cid"):
        three[name].kill()
    status, found = await ask(http, three["Bob"].url, story(text))
    assert status in (404, 502, 503), found
    three.start("Ann")
    three.start("Cid")
    three.wait_together()
    assert (await answer(http, three["Bob"], story(text))).text == texts[text]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves(three: Swarm, http: aiohttp.ClientSession, stream: bool) -> None:
    ann, bob = three["Ann"], three["Bob"]
    body = completion("a", 1800, model="slow", logit_bias=ONLY_ASCII)
    heard = Heard()
    task = asyncio.create_task(listen(http, ann.url, body, heard) if stream else ask(http, ann.url, body))
    await until_health(http, bob.url, slots_busy=1)
    assert [row["route"] for row in ann.swarm()["requests"]] == ["peer Bob"]
    if stream:
        await until(lambda: heard.chars >= 5, "some text")
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await until_health(http, bob.url, 1.5, slots_busy=0, queued=0)
    assert ann.swarm()["requests"] == bob.swarm()["requests"] == []
    assert bob.metric("swarmcpp_requests_running") == 0


def test_a_copied_identity(tiny: Path, new_data_dir: DataDirMaker, tmp_path: Path) -> None:
    flags = ("--slots", "2", "--ctx-size", "512")
    bob_seat, eve_seat = Seat("Bob", new_data_dir()), Seat("Eve", tmp_path / "copy")
    with (
        ready(Seat("Ann", new_data_dir()), "serve", str(tiny), *flags) as ann,
        ready(bob_seat, "join", ann.token, *flags) as bob,
    ):
        shutil.copytree(bob_seat.data, eve_seat.data)
        with ready(eve_seat, "join", *flags) as eve:
            ann.wait_sees("Bob", "Eve")
            bob.wait_sees("Ann", "Eve")
            eve.wait_sees("Ann", "Bob")
            assert ann.row("Bob")["id"] == bob.swarm()["node"] != eve.swarm()["node"] == ann.row("Eve")["id"]
            own = eve.swarm()["node"]
        with ready(eve_seat, "join", *flags) as eve:
            assert eve.swarm()["node"] == own, "it stays whom it has become"
            ann.wait_sees("Bob", "Eve")
