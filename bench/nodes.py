"""Nodes of one swarm as processes of this machine, each on a core of its own: started, asked, killed, stopped."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import psutil

from bench.load import BadReply, Client
from bench.netns import Namespace
from bench.servers import Launch, Running, running
from bench.setting import Setup
from swarmcpp.status import NodeRow, from_json
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarm.store import SwarmStore

SWARM_PORT = 17610
"""In a namespace, where every port is free."""

WAIT_S = 60.0
ENGINE_ENDS_S = 10.0
"""How long an engine may outlive its node."""


def cores(count: int) -> tuple[int, ...]:
    """The first `count` logical CPUs that this process may use. Raises RuntimeError when there are fewer."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(usable) < count:
        raise RuntimeError(f"{count} nodes need a core each, and this process may use {len(usable)}")
    return tuple(usable[:count])


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node. Without a `space` it is on this machine's loopback."""

    name: str
    core: int
    slots: int
    ctx_size: int
    space: Namespace | None = None
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    health: str = "/health/ready"
    """Path that answers 200 when its start is over. A node with some of the layers is ready only with the others'."""


class _Node:
    """A node that runs, with a session that reaches its API and the routes that it answered by."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.servers = ExitStack()
        self.sessions = AsyncExitStack()
        self.routes: list[str] = []
        self.running: Running | None = None
        self.session: aiohttp.ClientSession | None = None


class Nodes:
    """The nodes of one swarm, by name. The first that is started begins it; all are stopped at the end.

    A node that is started again under its name has its old data, so it is itself again.
    """

    def __init__(self, setup: Setup) -> None:
        self._logs = setup.out / "logs"
        self._nodes: dict[str, _Node] = {}
        self._ports: dict[str, int] = {}
        self._token: JoinToken | None = None
        self.commands: dict[str, str] = {}

    async def __aenter__(self) -> Nodes:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._data = Path(tempfile.mkdtemp(prefix="nodes-", dir=self._logs))
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._nodes):
            await self.stop(name)
        shutil.rmtree(self._data, ignore_errors=True)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def serve(self, spec: NodeSpec, model: Path) -> None:
        """Start a node with a model of its own, in the swarm of the others. Returns when it answers.

        Raises ServerDied.
        """
        if self._token is not None:
            store = SwarmStore(self.data(spec.name))
            store.save(self._token.key)
            store.remember(self._token.addresses)
        node = await self._start(spec, ("serve", str(model), "--swarm"))
        if self._token is None:
            self._token = JoinToken.parse(await _token_in(node))

    async def join(self, spec: NodeSpec, model: Path | None = None) -> None:
        """Start a node by `swarmcpp join`, with a copy of the model or without. Returns when it answers.

        Raises ServerDied.
        """
        if self._token is None:
            raise RuntimeError("there is no swarm to join yet: serve first")
        await self._start(spec, ("join", str(self._token), *(("--model", str(model)) if model else ())))

    async def stop(self, name: str) -> None:
        """End a node as its user would; its data stay."""
        node = self._nodes.pop(name)
        await node.sessions.aclose()
        await asyncio.to_thread(node.servers.close)

    async def kill(self, name: str) -> int:
        """kill -9 a node, its engine not. The number of its processes that did not end by themselves."""
        pid = self._running(name).pid
        children = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        left = await asyncio.to_thread(_survivors, children)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await self.stop(name)
        return len(left)

    def kill_engine(self, name: str) -> None:
        """kill -9 what node `name` started: its engine, which it starts again."""
        for child in psutil.Process(self._running(name).pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()

    async def _start(self, spec: NodeSpec, command: tuple[str, ...]) -> _Node:
        node = _Node(spec)
        launch = self._launch(spec, command)
        self._nodes[spec.name] = node
        try:
            node.running = await self._enter(node, launch)
            node.session = await node.sessions.enter_async_context(session_in(spec.space, node.routes))
        except BaseException:
            await self.stop(spec.name)
            raise
        self.commands[spec.name] = " ".join(launch.argv).replace(str(self._token), "TOKEN")
        return node

    async def _enter(self, node: _Node, launch: Launch) -> Running:
        def enter() -> Running:
            with node.spec.space.inside() if node.spec.space else nullcontext():
                return node.servers.enter_context(running(launch, self._logs))

        # In a thread: waiting for a node to start must not stop the loop.
        starting = asyncio.create_task(asyncio.to_thread(enter))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on: a node that started after the stack was closed would outlive the bench.
            await asyncio.gather(starting, return_exceptions=True)
            raise

    def _launch(self, spec: NodeSpec, command: tuple[str, ...]) -> Launch:
        host = spec.space.address if spec.space else "127.0.0.1"
        # The same port when it starts again, as on a machine of its own.
        port = SWARM_PORT if spec.space else self._ports.setdefault(spec.name, _free_port())
        argv = (
            *(sys.executable, "-m", "swarmcpp", *command, "--host", "127.0.0.1", "--port", "{port}"),
            *("--swarm-host", host, "--swarm-port", str(port), "--name", spec.name, "--threads", "1"),
            *("--slots", str(spec.slots), "--ctx-size", str(spec.ctx_size)),
            *("--data-dir", str(self.data(spec.name)), *spec.options),
        )
        env = {"SWARMCPP_SWARM_DISCOVERY": "false", **spec.env}
        return Launch(f"node {spec.name}", argv, spec.health, env, (spec.core,))

    # -- asking --------------------------------------------------------------------------------------------------------

    def data(self, name: str) -> Path:
        """A node's data directory."""
        return self._data / name

    def forget(self, name: str) -> None:
        """Remove what a stopped node knew and stored."""
        shutil.rmtree(self.data(name), ignore_errors=True)

    def url(self, name: str) -> str:
        """Of a node's API, as its own machine says it."""
        return self._running(name).base_url

    def client(self, name: str, model: Path) -> Client:
        """Asks node `name` for the model of that file, which may be served by another node. Warm answers are fine."""
        session = self._nodes[name].session
        if session is None:
            raise RuntimeError(f"node {name} has not started")
        return Client(session, self.url(name), model.stem, cached=True)

    def routes(self, name: str) -> list[str]:
        """`x-swarm-route` of each answer of a node so far, in the order in which they began."""
        return self._nodes[name].routes

    async def rows(self, name: str) -> dict[str, NodeRow]:
        """The swarm as node `name` sees it, by name. Raises BadReply."""
        session = self._nodes[name].session
        if session is None:
            raise RuntimeError(f"node {name} has not started")
        async with session.get(f"{self.url(name)}/swarm/status") as response:
            if response.status != 200:
                raise BadReply(f"node {name} answered {response.status} to GET /swarm/status")
            found = from_json(await response.json()).nodes
        # One that was started anew without its data is another node of the same name.
        return {row.name: row for row in sorted(found, key=lambda row: (row.status == "alive", row.is_self))}

    def log(self, name: str) -> Path:
        """What node `name` and its engine print."""
        return self._running(name).log

    def peak_rss(self, name: str) -> int:
        """See `Running.peak_rss`, now."""
        return self._running(name).sample_rss()

    async def answers(self, name: str) -> None:
        """Wait until node `name` can be asked for its model. Raises TimeoutError."""
        session = self._nodes[name].session
        if session is None:
            raise RuntimeError(f"node {name} has not started")

        async def ready() -> bool:
            async with session.get(f"{self.url(name)}/health/ready") as response:
                return response.status == 200

        await _until(ready, f"{name} to answer")

    async def sees_layers(self, name: str, other: str, layers: tuple[int, int]) -> None:
        """Wait until node `name` has heard that `other` runs the layers [first, last). Raises TimeoutError."""

        async def heard() -> bool:
            row = (await self.rows(name)).get(other)
            return row is not None and row.status == "alive" and (row.first_layer, row.last_layer) == layers

        await _until(heard, f"{name} to hear of layers {layers[0]}-{layers[1]} at {other}")

    async def settled(self) -> None:
        """Wait until every node sees every other one alive with its model. Raises TimeoutError."""

        async def all_seen() -> bool:
            for name in self._nodes:
                rows = await self.rows(name)
                if any(other not in rows or not _is_up(rows[other]) for other in self._nodes):
                    return False
            return True

        await _until(all_seen, f"{', '.join(self._nodes)} to see one another")

    async def sees_blocks(self, name: str, other: str, count: int) -> None:
        """Wait until node `name` has heard that `other` holds `count` blocks. Raises TimeoutError."""

        async def heard() -> bool:
            row = (await self.rows(name)).get(other)
            return row is not None and row.blocks >= count

        await _until(heard, f"{name} to hear of {count} blocks at {other}")

    def _running(self, name: str) -> Running:
        server = self._nodes[name].running
        if server is None:
            raise RuntimeError(f"node {name} has not started")
        return server


def _survivors(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still live after ENGINE_ENDS_S."""
    deadline = time.monotonic() + ENGINE_ENDS_S
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _lives(process: psutil.Process) -> bool:
    try:
        # What nobody waits for stays as a zombie.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_up(row: NodeRow) -> bool:
    return row.status == "alive" and bool(row.model)


async def _until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:.0f} s in vain for {what}")
        await asyncio.sleep(0.05)


async def _token_in(node: _Node) -> str:
    """The join token that a node printed; it does so just after it answers."""
    log = node.running.log if node.running else Path()

    def found() -> re.Match[str] | None:
        return re.search(r"swarmcpp join (\S+)\s", log.read_text(errors="replace"))

    async def printed() -> bool:
        return found() is not None

    await _until(printed, f"a join token in {log}")
    match = found()
    return match[1] if match else ""


def session_in(space: Namespace | None, routes: list[str]) -> aiohttp.ClientSession:
    """A session without limits of its own, one connection a request, made in `space`; it adds to `routes`."""

    def make_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = info
        return space.socket(family, kind, protocol) if space else socket.socket(family, kind, protocol)

    async def answered(
        _session: aiohttp.ClientSession, _context: SimpleNamespace, params: aiohttp.TraceRequestEndParams
    ) -> None:
        if (route := params.response.headers.get("x-swarm-route")) is not None:
            routes.append(route)

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(answered)
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=make_socket)
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, trace_configs=[trace])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
