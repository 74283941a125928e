"""swarmcpp without a model of one's own: serve, chat, and a swarm of three that tells the same story."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from cli_process import DEADLINE_S, PROGRAM, swarmcpp
from entries import killed
from pipeline_process import pipeline
from serve_client import complete
from serve_process import Home, serving
from swarm_process import answer

from swarmcpp.models.embedded import ABOUT, embedded_file

pytestmark = pytest.mark.e2e

DataDirMaker = Callable[[], Path]
STORY = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0}
DREAM = {**STORY, "temperature": 0.8, "seed": 11}
FLAGS = ("--slots", "2", "--ctx-size", "1024")


async def test_three_nodes_tell_the_story_of_one(new_data_dir: DataDirMaker, http: aiohttp.ClientSession) -> None:
    with serving(embedded_file(), *FLAGS, "--data-dir", str(new_data_dir())) as one:
        told = [await complete(http, one.url, body) for body in (STORY, DREAM)]
    assert len(set(told)) == 2 and all(len(text) > 200 for text in told)
    with pipeline(embedded_file(), new_data_dir, ("0-4", "4-8", "8-12"), *FLAGS) as stages:
        assert [await complete(http, stages["Ann"].url, body) for body in (STORY, DREAM)] == told
        assert (await answer(http, stages["Ann"], STORY)).text == told[0]
        stages.wait_idle()


def test_serve_without_a_model(new_data_dir: DataDirMaker) -> None:
    home = Home()
    command = [*PROGRAM, "serve", "--port", "0", "--threads", "1", "--data-dir", str(new_data_dir())]
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=home.environment(), cwd=home.path
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            try:
                assert process.stderr.readline() == ABOUT + "\n"
                assert "ready: swarmcpp-guide at http://127.0.0.1:" in process.stdout.readline()
            finally:
                process.terminate()
                process.communicate(timeout=DEADLINE_S)
    finally:
        home.remove()


def test_a_model_that_was_named_is_never_replaced(data_dir: Path) -> None:
    done = swarmcpp("serve", "no-such-model", "--data-dir", str(data_dir))
    assert done.returncode == 2 and "neither a file nor a known model" in done.stderr and ABOUT not in done.stderr
    port = free_port()
    os.environ["SWARMCPP_PORT"] = str(port)
    try:
        done = swarmcpp("chat", "--model", "x", "--data-dir", str(data_dir), stdin="Hello\n")
    finally:
        del os.environ["SWARMCPP_PORT"]
    assert done.returncode == 2 and f"no server at http://127.0.0.1:{port}" in done.stderr and ABOUT not in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_chat_without_a_server(data_dir: Path) -> None:
    """It starts one, which ends with the conversation, also where a node was killed."""
    home = Home()
    killed(data_dir, "http://127.0.0.1:1")
    env = home.environment({"SWARMCPP_PORT": str(free_port())})
    try:
        done = subprocess.run(
            [*PROGRAM, "chat", "--data-dir", str(data_dir), "--temperature", "0"],
            input="Hello\nWhat is 4 plus 5?\n",
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env=env,
            cwd=home.path,
        )
        assert (done.returncode, done.stdout.count("\n")) == (0, 2), done.stderr
        assert done.stdout.splitlines()[1] == "4 plus 5 is 9."
        assert "ran at http://127.0.0.1:1 is gone" in done.stderr and ABOUT in done.stderr
        home.assert_clean()
    finally:
        home.remove()
