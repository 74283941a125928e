"""`status`, `peers`, `token` and `leave` against a real API server and a real store."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from cli_process import DEADLINE_S, PROGRAM, swarmcpp, wait_for
from fake_node import KEY, FakeNode, three_nodes
from rich.console import Console
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.commands import status as command
from swarmcpp.commands.server import Server
from swarmcpp.commands.status import StatusClient, watch
from swarmcpp.errors import StartupError, Unauthorized, WireError
from swarmcpp.peers import Address
from swarmcpp.status import EventRow, SwarmStatus, from_json
from swarmcpp.swarm.identity import MAX_TOKEN_ADDRESSES, JoinToken, SwarmKey
from swarmcpp.swarm.store import SwarmStore

BOX = Address("192.168.1.20", 17610, KEY)


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with FakeNode(three_nodes()) as running:
        yield running


@pytest.fixture
def store(home: Path) -> SwarmStore:
    """That of `home`, in a swarm with one remembered peer."""
    store = SwarmStore(home / "data" / "swarmcpp")
    store.save(SwarmKey.new())
    store.remember([BOX])
    return store


def key_of(store: SwarmStore) -> SwarmKey:
    state = store.load()
    assert state is not None
    return state.key


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout, result.stderr


# ---- status


def test_status_once(node: FakeNode) -> None:
    for arguments in (["--once"], []):
        out, _ = run("status", "--url", node.url, *arguments)
        assert out.startswith("swarm 1f3a5b7c9d0e1f2a: 2 nodes") and "laptop" in out and "peer desk is gone" in out
    assert node.asked == 2


def test_status_as_json(node: FakeNode) -> None:
    assert from_json(json.loads(run("status", "--json", "--url", node.url)[0])) == three_nodes()


def test_status_without_a_node() -> None:
    with pytest.raises(StartupError, match=r"no server at http://127.0.0.1:1 .*swarmcpp serve MODEL.*--url"):
        run("status", "--url", "http://127.0.0.1:1")


def test_status_sends_the_key() -> None:
    with FakeNode(three_nodes(), api_key="sesame") as node:
        with pytest.raises(Unauthorized):
            run("status", "--url", node.url)
        assert "laptop" in run("status", "--url", node.url, "--api-key", "sesame")[0]


async def refuse(body: bytes, says: str) -> None:
    """A server that answers with `body` is refused."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    other = web.Application()
    other.router.add_get("/swarm/status", answer)
    runner = web.AppRunner(other)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with StatusClient(f"127.0.0.1:{runner.addresses[0][1]}", None) as client:
            with pytest.raises(WireError, match=says):
                await client.status()
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("body", [b"", b"hello", b"[1]", b"[" * 100_000, b"\xff", b'{"at": ' + b"9" * 5000 + b"}"])
async def test_what_is_no_status_is_refused(body: bytes) -> None:
    await refuse(body, "does not tell of a swarm")


async def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_ANSWER_BYTES", 1000)
    await refuse(b" " * 2000, "more than 1000 bytes")


async def test_a_node_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ANSWER_TIMEOUT_S", 0.05)
    writers: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    async with silent, StatusClient(f"http://{host}:{port}", None) as client:
        with pytest.raises(WireError, match="no answer from"):
            await client.status()
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class Watched:
    """`watch` on a screen of 100 columns; `text` is everything that it wrote so far."""

    def __init__(self, node: FakeNode) -> None:
        self.file = io.StringIO()
        console = Console(
            file=self.file, width=100, height=40, force_terminal=True, color_system=None, legacy_windows=False
        )
        self.task = asyncio.create_task(watch(Server(node.url, None), console, refresh_s=0.005))

    @property
    def text(self) -> str:
        return self.file.getvalue()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def test_live_draws_only_what_changed(node: FakeNode) -> None:
    screen = Watched(node)
    await screen.until(lambda: "laptop" in screen.text)
    drawn, asked = screen.text, node.asked
    await screen.until(lambda: node.asked > asked + 20)
    assert screen.text == drawn
    node.status = replace(node.status, at=2.0, events=(EventRow(401.0, "peer desk joined"), node.status.events[1]))
    asked = node.asked
    await screen.until(lambda: node.asked > asked + 5)
    assert screen.text == drawn, "what is not shown, or looks the same, needs no drawing"
    node.status = replace(node.status, swarm="another")
    await screen.until(lambda: "swarm another" in screen.text)
    await screen.close()
    # The alternate screen is left.
    assert screen.text.rstrip().endswith(("\x1b[?25h", "\x1b[?1049l"))


async def test_live_goes_on_when_the_node_goes_away_and_comes_back(node: FakeNode) -> None:
    screen = Watched(node)
    await screen.until(lambda: "laptop" in screen.text)
    port = int(node.url.rpartition(":")[2])
    await asyncio.to_thread(node.stop)
    await screen.until(lambda: "still trying: no server at" in screen.text)
    node.status = SwarmStatus(swarm="another")
    await asyncio.to_thread(node.start, port)
    await screen.until(lambda: "swarm another" in screen.text)
    assert "still trying" not in screen.text[screen.text.rindex("swarm another") :]
    await screen.close()


async def test_live_without_a_node_ends_at_once(node: FakeNode) -> None:
    await asyncio.to_thread(node.stop)
    with pytest.raises(StartupError, match="no server at"):
        await asyncio.wait_for(Watched(node).task, DEADLINE_S)


@pytest.mark.e2e
def test_ctrl_c_ends_the_live_view_quietly(node: FakeNode) -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    process = subprocess.Popen(
        [*PROGRAM, "status", "--url", node.url],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    seen = b""

    def read() -> bytes:
        nonlocal seen
        with contextlib.suppress(OSError):
            while chunk := os.read(master, 65536):
                seen += chunk
        return seen

    try:
        wait_for(lambda: b"laptop" in read(), "the view")
        process.send_signal(signal.SIGINT)
        wait_for(lambda: bool(read()) and process.poll() is not None, "the end")
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(master)
    assert process.returncode == 0
    assert b"\x1b[?1049l" in seen and b"Traceback" not in seen and b"error" not in seen


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["status", "peers", "token", "leave"])
def test_nothing_here_is_one_line_and_exit_code_2(name: str) -> None:
    done = swarmcpp(name, *(["--url", "http://127.0.0.1:1"] if name == "status" else []))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ---- peers


def test_peers_of_a_running_node(node: FakeNode) -> None:
    head, *rows = [line.split() for line in run("peers", "--url", node.url)[0].splitlines()]
    assert head == ["name", "id", "address", "status", "RTT", "rate", "trust", "model"]
    assert [row[0] for row in rows] == ["box", "desk"]
    assert rows[0][1:] == [
        *("b" * 16, "192.168.1.20:17610", "alive", "0.4", "ms", "112", "MB/s", "0.83", "qwen2.5-0.5b-instruct-q8_0")
    ]


def test_peers_as_json(node: FakeNode) -> None:
    box = json.loads(run("peers", "--json", "--url", node.url)[0])[0]
    assert (box["name"], box["rtt_s"], box["bytes_per_s"], box["trust"]) == ("box", 0.0004, 112e6, 0.83)


def test_a_node_without_peers(node: FakeNode) -> None:
    node.status = replace(node.status, nodes=node.status.nodes[:1])
    assert run("peers", "--url", node.url)[0] == "no peers\n"


def test_peers_that_are_remembered(store: SwarmStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCPP_PORT", "1")
    out, notes = run("peers")
    assert "192.168.1.20:17610" in out and "remembered" in out
    assert "no server at" in notes and key_of(store).swarm_id in notes
    with pytest.raises(StartupError, match="no server at"):
        run("peers", "--url", "http://127.0.0.1:1")


def test_no_node_and_no_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCPP_PORT", "1")
    with pytest.raises(StartupError, match="no server at"):
        run("peers")


# ---- token and leave


def test_token_with_the_addresses_of_the_running_node(store: SwarmStore, node: FakeNode) -> None:
    node.status = three_nodes(key_of(store).swarm_id)
    out, notes = run("token", "--url", node.url)
    assert out.startswith("swarmcpp join swarm1-") and out.count("\n") == 1 and notes == ""
    token = JoinToken.parse(out)
    assert token.key == key_of(store)
    assert [str(each) for each in token.addresses] == [
        "192.168.1.10:17610",
        "[fd00::10]:17610",
        "192.168.1.20:17610",
        "192.168.1.30:17610",
    ]


def test_token_of_a_large_swarm_and_of_nonsense(store: SwarmStore, node: FakeNode) -> None:
    here, box, _ = three_nodes().nodes
    broken = replace(box, addresses=("no port", "h:99999999", "a;b:1", "h:²", ""))
    many = tuple(replace(box, addresses=(f"10.0.0.{at}:1",)) for at in range(20))
    node.status = SwarmStatus(swarm=key_of(store).swarm_id, nodes=(broken, *many, here))
    token = JoinToken.parse(run("token", "--url", node.url)[0])
    assert len(token.addresses) == MAX_TOKEN_ADDRESSES
    assert [each.host for each in token.addresses[:3]] == ["192.168.1.10", "fd00::10", "10.0.0.0"]


def test_token_when_no_node_runs(store: SwarmStore) -> None:
    out, notes = run("token", "--url", "http://127.0.0.1:1")
    assert JoinToken.parse(out) == JoinToken(key_of(store), (BOX,))
    assert "remembered" in notes


def test_token_when_the_node_is_in_another_swarm(store: SwarmStore, node: FakeNode) -> None:
    out, notes = run("token", "--url", node.url)
    assert JoinToken.parse(out).addresses == (BOX,)
    assert "is not in swarm" in notes


def test_token_without_addresses(store: SwarmStore) -> None:
    store.rotate()
    assert "no addresses are known" in run("token", "--url", "http://127.0.0.1:1")[1]


def test_rotate(store: SwarmStore, node: FakeNode) -> None:
    old = key_of(store)
    node.status = three_nodes(old.swarm_id)
    out, notes = run("token", "--rotate", "--url", node.url)
    token = JoinToken.parse(out)
    assert token.key == key_of(store) != old
    assert len(token.addresses) == 4
    assert "every machine has to join again" in notes


def test_leave(store: SwarmStore) -> None:
    swarm = key_of(store).swarm_id
    out, _ = run("leave")
    assert swarm in out and "1 remembered" in out and "until it is stopped" in out
    assert store.load() is None
    for again in (["leave"], ["token"], ["token", "--rotate"]):
        with pytest.raises(StartupError, match="in no swarm"):
            run(*again)
    assert store.load() is None
