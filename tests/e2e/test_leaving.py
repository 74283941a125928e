"""Clients that leave, and requests that take too long: their slots become free."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from serve_client import Heard, ask, completion, health, http_session, listen, until, until_health
from serve_process import ServeProcess, serving

from swarmcpp.models.synthetic import Shape, write_model

pytestmark = pytest.mark.e2e

SLOW = Shape("slow", "llama", 10, 512, 8, 2, 1408, 8192, 512)
"""Some thousand tokens of prompt take seconds."""

LONG_PROMPT = [(7 * at) % 250 for at in range(6000)]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("slow") / "slow.gguf", SLOW, quant="F16")


@pytest.fixture(scope="module")
def slow_server(slow: Path, new_data_dir: Callable[[], Path]) -> Iterator[ServeProcess]:
    """One slot, so that a request that stays is one that everybody waits for."""
    with serving(slow, "--slots", "1", "--ctx-size", "8192", "-vv", "--data-dir", str(new_data_dir())) as server:
        yield server


def prompt_rows(server: ServeProcess) -> int:
    """Rows of prompts that its engine has computed, in all."""
    return sum(int(found) for found in re.findall(r"DIAG: chunk fused.* rows=(\d+)", server.stderr))


async def leave(task: asyncio.Task[Heard]) -> None:
    """Close the connection of a stream."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_leaving_in_mid_prefill(slow_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    url = slow_server.url
    async with http_session() as leaver:
        heard = Heard()
        task = asyncio.create_task(listen(leaver, url, completion(LONG_PROMPT, 10), heard))
        await until_health(http, url, slots_busy=1)
        waiting = asyncio.create_task(listen(http, url, completion("a", 3)))
        await until_health(http, url, queued=1)
        assert not heard.pieces
        await leave(task)
        assert (await waiting).done
        assert 0 < prompt_rows(slow_server) < len(LONG_PROMPT) // 2
    await until_health(http, url, slots_busy=0, queued=0)


async def test_leaving_in_mid_stream(slow_server: ServeProcess, http: aiohttp.ClientSession) -> None:
    url = slow_server.url
    async with http_session() as leaver:
        heard = Heard()
        task = asyncio.create_task(listen(leaver, url, completion("a", 8000), heard))
        await until(lambda: len(heard.pieces) > 3, "some text")
        assert (await health(http, url))["slots_busy"] == 1
        await leave(task)
    await until_health(http, url, slots_busy=0, queued=0)
    assert (await listen(http, url, completion("a", 3))).done


async def test_leaving_without_a_stream_and_while_waiting(
    slow_server: ServeProcess, http: aiohttp.ClientSession
) -> None:
    url = slow_server.url
    async with http_session() as leaver:
        tasks = [asyncio.create_task(ask(leaver, url, completion("a", 8000))) for _ in range(3)]
        await until_health(http, url, slots_busy=1, queued=2)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await until_health(http, url, slots_busy=0, queued=0)
    assert (await ask(http, url, completion("a", 3)))[0] == 200


async def test_a_request_that_takes_too_long(slow: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    arguments = ("--slots", "1", "--ctx-size", "8192", "-vv", "--data-dir", str(data_dir))
    with serving(slow, *arguments, env={"SWARMCPP_SERVER_REQUEST_TIMEOUT_S": "0.7"}) as server:
        heard = await listen(http, server.url, completion("a", 8000))
        assert (heard.done, heard.finish) == (False, None)
        assert heard.pieces
        assert heard.error is not None
        assert "0.7 s" in heard.error["message"]
        await until_health(http, server.url, slots_busy=0, queued=0)
        # In mid-prefill, before any text: the status tells it.
        status, answer = await ask(http, server.url, completion(LONG_PROMPT, 10))
        assert status >= 400
        assert "0.7 s" in answer["error"]["message"]
        assert 0 < prompt_rows(server) < len(LONG_PROMPT) // 2
        await until_health(http, server.url, slots_busy=0, queued=0)
        assert (await ask(http, server.url, completion("a", 3)))[0] == 200
