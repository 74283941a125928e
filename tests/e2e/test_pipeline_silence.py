"""A stage whose engine hangs while its node gives news as ever: the stage is named, and its double takes its place."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil
import pytest
from pipeline_process import Pipeline, pipeline
from serve_client import Heard, complete, completion, listen, until
from serve_process import ServeProcess
from trained_models import BEGINNINGS

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

DataDirMaker = Callable[[], Path]

TOKENS = 30
TOLD_S = 3.0
"""How busy a stage is, is told every 2 s."""

PAUSE_S = 12.0
"""A stage that says nothing for 3 s is taken for lost; the rest is for a machine that does other things."""


@pytest.fixture
def trio(unquantised: Path, new_data_dir: DataDirMaker) -> Iterator[Pipeline]:
    """Ann is the head; Bob and Cid hold the same later layers."""
    with pipeline(unquantised, new_data_dir, ("0-7", "7-12", "7-12"), copies=("Cid",)) as whole:
        yield whole


async def test_the_first_pass_of_a_size_that_is_not_answered(
    trio: Pipeline, unquantised_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    """Nothing is known of how long such a pass takes, at the head and at the hop, which must not give up in the wrong
    order: the head, which is next to its own stage, would name that."""
    other = Heard()
    running = asyncio.create_task(listen(http, trio["Ann"].url, completion(BEGINNINGS[0], 1000), other))
    await until(lambda: bool(other.pieces), "text")
    # The one that has nothing to do is taken for the next request, as soon as that is told.
    name = "Cid" if trio.in_use("Bob", "Cid") == ("Bob",) else "Bob"
    await asyncio.sleep(TOLD_S)
    names = {row["id"]: row["name"] for row in trio["Ann"].swarm()["nodes"]}
    pid = trio[name].engine_pid()
    assert pid is not None
    hung = psutil.Process(pid)
    hung.suspend()
    try:
        for count in range(1, 6):
            body = completion(" ".join(BEGINNINGS[1 : 1 + count]), TOKENS)
            heard = await listen(http, trio["Ann"].url, body, Heard())
            assert (heard.finish, heard.done, heard.error) == ("length", True, None)
            assert heard.text == await complete(http, unquantised_server.url, body)
            assert heard.longest_gap_s < PAUSE_S
            if failovers := trio.failovers("Ann"):
                break
        else:
            pytest.fail("five requests went round the stage that hangs")
    finally:
        with suppress(psutil.NoSuchProcess):
            hung.resume()
    told = [(names[found[1]], found[2]) for line in failovers if (found := re.search(r"node=(\w+) reason=(\w+)", line))]
    assert told == [(name, "peer_timeout")], failovers
    assert (await running).finish in ("length", "stop"), "who runs on the other stage has noticed nothing"
