"""Engines and nodes that are killed: answers go on where they stood, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import struct
import sys
from pathlib import Path

import aiohttp
import pytest
from environment import KILLS
from serve_client import Body, Heard, ask, complete, completion, health, http_session, listen, until, until_health
from serve_process import ServeProcess, alive, launched, serving, wait_until
from trained_models import BEGINNINGS

from swarmcpp.models.synthetic import Shape, write_model

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

TOKENS = 300

ONLY_ASCII = {str(token): -100 for token in range(512) if not 33 <= token <= 126}
"""Of the synthetic vocabulary: every token becomes one character."""


class Killer:
    """Kills the engine of a server while streams run, at moments drawn from `seed`."""

    def __init__(self, server: ServeProcess, http: aiohttp.ClientSession, seed: int) -> None:
        self._server = server
        self._http = http
        self._draw = random.Random(seed)
        self.kills = 0
        self.in_mid_stream = 0

    async def attend(self, heards: list[Heard], running: asyncio.Future[list[Heard]]) -> None:
        """Kill again and again, until the streams have ended or there were enough kills."""
        while not self.enough:
            if self._draw.random() < 0.2:
                # While it loads, or when it has just loaded.
                await asyncio.sleep(self._draw.random())
            else:
                await self._more_text(self._draw.randrange(1, 600), heards, running)
            if running.done():
                return
            streaming = all(heard.pieces and not heard.done for heard in heards)
            pid = self._server.kill_engine()
            self.kills += 1
            self.in_mid_stream += streaming
            await self._next_engine(pid)

    @property
    def enough(self) -> bool:
        """Whether there were KILLS kills, and half as many of streams that ran: others say little."""
        return self.kills >= KILLS and self.in_mid_stream >= KILLS // 2

    async def _more_text(self, chars: int, heards: list[Heard], running: asyncio.Future[list[Heard]]) -> None:
        enough = chars + sum(heard.chars for heard in heards)
        await until(
            lambda: sum(heard.chars for heard in heards) >= enough or running.done(), "more text", pause_s=0.001
        )

    async def _next_engine(self, killed: int) -> None:
        await until(lambda: self._server.engine_pid() not in (killed, None), "another engine", pause_s=0.02)


async def stream_under_fire(server: ServeProcess, bodies: list[Body], seed: int) -> tuple[Killer, list[list[Heard]]]:
    """Rounds of these streams until there were enough kills; what each round heard."""
    rounds: list[list[Heard]] = []
    async with http_session() as http, asyncio.timeout(30 + 10 * KILLS):
        killer = Killer(server, http, seed)
        while not killer.enough:
            heards = [Heard() for _ in bodies]
            streams = [listen(http, server.url, body, heard) for body, heard in zip(bodies, heards, strict=True)]
            running = asyncio.gather(*streams)
            await killer.attend(heards, running)
            rounds.append(await running)
    return killer, rounds


async def test_kills_change_no_text_of_a_trained_model(
    unquantised: Path, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    arguments = ("--slots", "4", "--ctx-size", "2048", "--data-dir", str(data_dir))
    with serving(unquantised, *arguments) as server:
        bodies = [completion(prompt, TOKENS) for prompt in BEGINNINGS[:4]]
        expected = await asyncio.gather(*(complete(http, server.url, body) for body in bodies))
        killer, rounds = await stream_under_fire(server, bodies, seed=7)
        for heards in rounds:
            for heard, text in zip(heards, expected, strict=True):
                assert (heard.finish, heard.done, heard.error) == ("length", True, None)
                assert heard.text == text
        await until_health(http, server.url, state="ready", slots_busy=0, queued=0)
        assert (await health(http, server.url))["restarts"] == killer.kills


async def test_kills_lose_and_repeat_no_token(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    arguments = ("--slots", "4", "--ctx-size", "2048", "--data-dir", str(data_dir))
    with serving(tiny, *arguments) as server:
        # Random weights are full of near ties, which a replayed prompt may decide otherwise: the count tells.
        bodies = [completion([60 + number] * 9, TOKENS, logit_bias=ONLY_ASCII) for number in range(4)]
        expected = await asyncio.gather(*(complete(http, server.url, body) for body in bodies))
        _killer, rounds = await stream_under_fire(server, bodies, seed=11)
        for heards in rounds:
            for heard, text in zip(heards, expected, strict=True):
                assert (heard.finish, heard.done, heard.error) == ("length", True, None)
                assert heard.chars == TOKENS
                assert heard.text[:9] == text[:9]


async def test_not_ready_while_the_engine_restarts(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, "--slots", "2", "--ctx-size", "512", "--data-dir", str(data_dir)) as server:
        pid = server.kill_engine()
        await until(lambda: server.get("/health/ready")[0] == 503, "it is not ready")
        found = await health(http, server.url)
        assert (found["state"], found["restarts"]) == ("restarting", 1)
        assert "SIGKILL" in found["detail"]
        # A request in between waits for the next engine.
        assert (await listen(http, server.url, completion("a", 3))).done
        assert server.engine_pid() not in (pid, None)
        assert server.get("/health/ready")[0] == 200
        assert "the engine died (SIGKILL" in server.stderr


async def test_a_request_at_the_moment_of_a_death(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, "--slots", "2", "--ctx-size", "512", "--data-dir", str(data_dir)) as server:
        expected = await complete(http, server.url, completion("a", 5))
        for number in range(4):
            server.kill_engine()
            assert await complete(http, server.url, completion("a", 5)) == expected
            assert (await health(http, server.url))["restarts"] == number + 1


# -- ends of the node --------------------------------------------------------------------------------------------


async def start_streams(http: aiohttp.ClientSession, server: ServeProcess) -> asyncio.Future[list[Heard]]:
    """Four endless streams, all with some text."""
    heards = [Heard() for _ in range(4)]
    running = asyncio.gather(*(listen(http, server.url, completion("a", 4000), heard) for heard in heards))
    await until(lambda: all(heard.pieces for heard in heards), "text")
    return running


async def test_sigterm_while_streams_run(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, "--slots", "4", "--ctx-size", "4096", "--data-dir", str(data_dir)) as server:
        running = await start_streams(http, server)
        engine = server.engine_pid()
        assert engine is not None
        await asyncio.to_thread(server.terminate)
        assert not alive(engine)
        for heard in await running:
            assert heard.error is not None
            assert "shutting down" in heard.error["message"]
        assert server.stderr == "loading tiny.gguf\n"


async def test_the_engine_ends_with_a_killed_node(tiny: Path, data_dir: Path, http: aiohttp.ClientSession) -> None:
    with serving(tiny, "--slots", "4", "--ctx-size", "4096", "--data-dir", str(data_dir)) as server:
        running = await start_streams(http, server)
        engine = server.engine_pid()
        assert engine is not None
        server.kill()
        await until(lambda: not alive(engine), "the engine is gone", deadline_s=5.0)
        with pytest.raises(aiohttp.ClientError):
            await running
        assert not server.home.processes()


# -- models that kill their engines ------------------------------------------------------------------------------


def test_a_model_that_kills_its_engine_at_the_start(tmp_path: Path, data_dir: Path) -> None:
    shape = Shape("fatal", "qwen2", 2, 64, 4, 2, 128, 512, 512)
    path = write_model(tmp_path / "fatal.gguf", shape, quant="Q8_0")
    # More rotated dimensions than a head has: ggml asserts when it builds the first graph.
    overwrite_u32(path, b"qwen2.rope.dimension_count", 64)
    with launched(path, "--slots", "2", "--ctx-size", "512", "--data-dir", str(data_dir)) as server:
        wait_until(lambda: not server.running, "it gives up")
        assert server.process.returncode == 2
        last = server.stderr.splitlines()[-1]
        assert last.startswith(f"error: {path}: this model killed its engine 3 times in a row (SIGABRT")
        assert "Traceback" not in server.stderr
        server.home.assert_clean()


def overwrite_u32(path: Path, key: bytes, value: int) -> None:
    """Change a 32-bit metadata value of a GGUF: key, type, value follow one another."""
    data = bytearray(path.read_bytes())
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(data)


ABORTS_IN_THE_FIRST_CALL = """
import os, sys
if "swarmcpp.worker" in sys.orig_argv:
    from swarmcpp.engine.loop import Engine
    Engine._run = lambda *arguments, **more: os.abort()
"""


async def test_a_model_that_kills_its_engine_when_it_is_asked(
    tiny: Path, data_dir: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTS_IN_THE_FIRST_CALL)
    arguments = ("--slots", "2", "--ctx-size", "512", "--data-dir", str(data_dir))
    with serving(tiny, *arguments, env={"PYTHONPATH": str(tmp_path)}) as server:
        heard, (status, answer) = await asyncio.gather(
            listen_or_refused(http, server.url), ask(http, server.url, completion("b", 3))
        )
        assert (status, answer["error"]["code"]) == (500, "engine_failed")
        assert "3 times in a row" in answer["error"]["message"]
        assert heard == status
        found = await health(http, server.url)
        assert (found["state"], found["status"], found["slots_busy"], found["queued"]) == ("failed", "failed", 0, 0)
        assert "3 times in a row (SIGABRT" in found["detail"]
        assert server.get("/health/ready")[0] == 503
        status, answer = await ask(http, server.url, completion("c", 3))
        assert (status, answer["error"]["code"]) == (503, "not_ready")
        assert "3 times in a row" in answer["error"]["message"]
        # It stays, so that /health can tell, until it is told to end.
        assert server.running
        assert server.engine_pid() is None


async def listen_or_refused(http: aiohttp.ClientSession, url: str) -> int:
    """The status of a stream that fails before its first text."""
    async with http.post(f"{url}/v1/completions", json={**completion("a", 3), "stream": True}) as response:
        await response.read()
        return response.status
