"""KV of running requests is copied to the node that has the same layers, which then computes little again."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from pipeline_process import FLAGS, Pipeline, nodes
from serve_client import Heard, complete, completion, listen, until
from serve_process import ServeProcess

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

TOKENS = 500


PROMPT = "Tom went to the park. " * 12 + "One day, Tom saw"
"""About 150 tokens."""


def copied(trio: Pipeline) -> int:
    """Blocks that were copied to Bob or Cid so far."""
    lines = [line for name in ("Bob", "Cid") for line in trio[name].stderr.splitlines() if "DIAG: KV copied" in line]
    return sum(int(found[1]) for line in lines if (found := re.search(r"blocks=(\d+)", line)))


def resumed_at(trio: Pipeline) -> list[int]:
    """Tokens that were there when answers went on."""
    return [int(re.findall(r"resumed_at=(\d+)", line)[0]) for line in trio.failovers("Ann")]


@pytest.mark.parametrize("setting", ["on", pytest.param("off", marks=pytest.mark.long)])
async def test_a_double_goes_on_from_copies(
    unquantised: Path, new_data_dir: Callable[[], Path], unquantised_server: ServeProcess, setting: str
) -> None:
    env = {"SWARMCPP_INFERENCE_REPLICATE_KV": setting}
    with nodes(new_data_dir) as trio:
        ann = trio.start("Ann", "serve", str(unquantised), "--layers", "0-7", "-vv", *FLAGS, env=env)
        for name in ("Bob", "Cid"):
            trio.launch(
                name, "join", ann.token, "--layers", "7-12", "--model", str(unquantised), "-vv", *FLAGS, env=env
            )
        for name in ("Bob", "Cid"):
            trio[name].wait_ready()
        for name in ("Ann", "Bob", "Cid"):
            trio.wait_ranges(name, Ann="0-7", Bob="7-12", Cid="7-12")
        trio.wait_answers("Ann")
        async with aiohttp.ClientSession() as http:
            body, heard = completion(PROMPT, TOKENS), Heard()
            task = asyncio.create_task(listen(http, ann.url, body, heard))
            await until(lambda: heard.chars > 300 or heard.done, "text", pause_s=0.001)
            (name,) = trio.in_use("Bob", "Cid")
            if setting == "on":
                # Two blocks of the prompt, and one of the answer.
                await until(lambda: copied(trio) >= 3, "copies")
            assert not heard.done, "it is still told"
            trio[name].process.kill()
            trio[name].process.wait()
            await task
            assert heard.text == await complete(http, unquantised_server.url, body)
        (at,) = resumed_at(trio)
        if setting == "on":
            assert at >= 192
        else:
            assert (at, copied(trio)) == (0, 0), "the other one has never seen the prompt"
