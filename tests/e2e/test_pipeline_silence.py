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
    ann, names = trio["Ann"], {row["id"]: row["name"] for row in trio["Ann"].swarm()["nodes"]}
    # As long as Cid cannot be seen, requests go through Bob.
    trio["Cid"].freeze()
    await until(lambda: ann.row("Cid")["status"] != "alive", "Cid is missed")
    await complete(http, ann.url, completion(BEGINNINGS[0], 8))
    pid = trio["Bob"].engine_pid()
    assert pid is not None
    hung = psutil.Process(pid)
    hung.suspend()
    try:
        body = completion(" ".join(BEGINNINGS[:4]), TOKENS)
        answering = asyncio.create_task(listen(http, ann.url, body, Heard()))
        await until(lambda: trio.in_use("Bob") == ("Bob",), "the request is at Bob's stage")
        trio["Cid"].thaw()
        heard = await answering
    finally:
        trio["Cid"].thaw()
        with suppress(psutil.NoSuchProcess):
            hung.resume()
    assert (heard.finish, heard.done, heard.error) == ("length", True, None)
    assert heard.text == await complete(http, unquantised_server.url, body)
    failovers = trio.failovers("Ann")
    told = [(names[found[1]], found[2]) for line in failovers if (found := re.search(r"node=(\w+) reason=(\w+)", line))]
    assert told and set(told) == {("Bob", "peer_timeout")}, failovers
