"""Nodes of one swarm, each a real `swarmcpp` with a data directory and a swarm port of its own on loopback."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from cli_process import PROGRAM
from serve_client import DEADLINE_S, Body
from serve_process import STOP_DEADLINE_S, Home, ServeProcess, wait_until

from swarmcpp.models.synthetic import Shape
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarm.store import SwarmStore

HOST = "127.0.0.1"
SLOW = Shape("slow", "llama", 8, 512, 8, 1, 2048, 2048, 512)
"""Hundreds of tokens a second: blocks of it are worth a trip, and an answer takes long enough to be left."""

ONLY_ASCII = {str(token): -100 for token in range(SLOW.n_vocab) if not 33 <= token <= 126}
"""Of the synthetic vocabulary: every token becomes one character."""


def free_port() -> int:
    """A port that nobody uses, also not while a node that had it is down: systems give none below 32768 away."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


@dataclass(frozen=True, slots=True)
class Seat:
    """What a node keeps from one life to the next: its name, its directory and its swarm port."""

    name: str
    data: Path
    port: int = field(default_factory=free_port)

    def flags(self) -> tuple[str, ...]:
        return ("--name", self.name, "--data-dir", str(self.data), "--swarm-port", str(self.port))


class SwarmNode(ServeProcess):
    """A running node of a swarm."""

    def wait_ready(self) -> None:
        """Until it serves; sets `url`."""
        wait_until(lambda: "\n" in self.stdout or not self.running, "it is ready")
        assert self.running, f"it ended with {self.process.returncode}: {self.stderr}"
        found = re.match(r"ready: .* at (http://\S+)/v1\n", self.stdout)
        assert found, self.stdout
        self.url = found[1]

    @property
    def token(self) -> str:
        """What it says that others shall join with."""
        wait_until(lambda: "swarmcpp join" in self.stdout, "it shows a token", 5.0)
        return self.stdout.split("swarmcpp join ")[1].split()[0]

    @property
    def fetched(self) -> bool:
        """Whether it got its model from the swarm."""
        return "fetching " in self.stderr

    def swarm(self) -> dict[str, Any]:
        """GET /swarm/status."""
        status, document = self.get("/swarm/status")
        assert status == 200, document
        found: dict[str, Any] = document
        return found

    def row(self, name: str) -> dict[str, Any]:
        """What it knows of a node; empty: nothing."""
        found: dict[str, Any] = next((each for each in self.swarm()["nodes"] if each["name"] == name), {})
        return found

    def wait_sees(self, *names: str) -> None:
        """Until it has these as its peers, alive and serving a model, and no others."""
        want = sorted(names)

        def seen() -> bool:
            rows = [each for each in self.swarm()["nodes"] if not each["is_self"]]
            alive = [each["name"] for each in rows if each["status"] == "alive" and each["model"]]
            return sorted(alive) == want

        wait_until(seen, f"it sees {want}", 30.0)

    def metric(self, line: str) -> float:
        """The value of a sample such as 'name{label="x"}'; 0 while there is none."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=5) as response:
            for each in response.read().decode().splitlines():
                if each.startswith(line + " "):
                    return float(each.rpartition(" ")[2])
        return 0.0

    def _signal(self, number: signal.Signals) -> None:
        """To the node and its engine: what stops a machine stops both."""
        engine = self.engine_pid()
        for pid in (self.pid, engine):
            if pid is not None:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).send_signal(number)

    def freeze(self) -> None:
        """Nothing of it runs any more."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on as if no time had passed."""
        self._signal(signal.SIGCONT)


EXACT = {"SWARMCPP_INFERENCE_ACTIVATION_COMPRESSION": "off", "SWARMCPP_INFERENCE_KV_WIRE": "f16"}
"""How fast a link looks depends on what else the machine does, and with it whether rows and blocks are rounded on the
way."""


@contextmanager
def node(seat: Seat, *command: str, env: Mapping[str, str] | None = None) -> Iterator[SwarmNode]:
    """`swarmcpp COMMAND` in a seat, just started; gone afterwards. `command` begins with serve MODEL or join."""
    home = Home()
    flags = ("--port", "0", "--threads", "1", "--cache-size", "16M", "--swarm-host", HOST, *seat.flags())
    environment = home.environment({"SWARMCPP_SWARM_DISCOVERY": "false", **EXACT, **(env or {})})
    try:
        with (home.path / "stdout").open("wb") as out, (home.path / "stderr").open("wb") as notes:
            process = subprocess.Popen(
                [*PROGRAM, *command, *flags], stdout=out, stderr=notes, cwd=home.path, env=environment
            )
        try:
            yield SwarmNode(home, process)
        finally:
            process.kill()
            process.wait(STOP_DEADLINE_S)
    finally:
        home.remove()


@contextmanager
def ready(seat: Seat, *command: str, env: Mapping[str, str] | None = None) -> Iterator[SwarmNode]:
    """A node that serves. Unless the test has ended it, SIGTERM ends it afterwards, and must do so cleanly."""
    with node(seat, *command, env=env) as started:
        started.wait_ready()
        yield started
        if started.running:
            started.thaw()
            started.terminate()
            assert "Traceback" not in started.stderr, started.stderr


def refused(seat: Seat, *command: str, env: Mapping[str, str] | None = None) -> str:
    """What a node says that cannot start: one line, and exit code 2."""
    with node(seat, *command, env=env) as started:
        return refusal(started)


def refusal(started: SwarmNode) -> str:
    """The one line with which a node ends that cannot start."""
    assert started.process.wait(DEADLINE_S) == 2, started.stderr
    assert started.stdout == ""
    assert len(started.stderr.splitlines()) == 1, started.stderr
    return started.stderr.strip()


def belong(data: Path, token: str) -> None:
    """Let a directory belong to a swarm, as after a `swarmcpp join`: for nodes that serve another model."""
    parsed = JoinToken.parse(token)
    store = SwarmStore(data)
    store.save(parsed.key)
    store.remember(parsed.addresses)


class Swarm:
    """Nodes that know one another, by name; each can end and come back in its seat."""

    def __init__(self, stack: ExitStack, flags: Sequence[str], seats: dict[str, Seat], models: dict[str, Path]) -> None:
        self._stack = stack
        self._flags = flags
        self._models = models
        self.seats = seats
        self.nodes: dict[str, SwarmNode] = {}

    def __getitem__(self, name: str) -> SwarmNode:
        return self.nodes[name]

    def start(self, name: str) -> SwarmNode:
        """Start a node, again after an end."""
        command = ("serve", str(self._models[name]), *self._flags)
        self.nodes[name] = self._stack.enter_context(ready(self.seats[name], *command))
        return self.nodes[name]

    def wait_together(self) -> None:
        """Until all see all."""
        for name, each in self.nodes.items():
            each.wait_sees(*(self.nodes.keys() - {name}))


@contextmanager
def swarm(models: dict[str, Path], seats: dict[str, Seat], *flags: str) -> Iterator[Swarm]:
    """A swarm of nodes that serve these models; all run at the end, too."""
    with ExitStack() as stack:
        whole = Swarm(stack, flags, seats, models)
        for name in models:
            if whole.nodes:
                belong(seats[name].data, next(iter(whole.nodes.values())).token)
            whole.start(name)
        whole.wait_together()
        yield whole


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was not streamed, and where it came from."""

    text: str
    route: str
    cached: int
    prompt_tokens: int


async def answer(http: aiohttp.ClientSession, where: SwarmNode, body: Body) -> Answer:
    """POST /v1/completions."""
    async with http.post(f"{where.url}/v1/completions", json=body) as response:
        found = await response.json()
        assert response.status == 200, found
        usage = found["usage"]
        return Answer(
            found["choices"][0]["text"],
            response.headers["x-swarm-route"],
            usage["prompt_tokens_details"]["cached_tokens"],
            usage["prompt_tokens"],
        )


def http_with_routes(routes: list[str]) -> aiohttp.ClientSession:
    """A session that notes every `x-swarm-route` when the headers come, which is before the answer."""

    async def note(_session: aiohttp.ClientSession, _context: object, end: aiohttp.TraceRequestEndParams) -> None:
        routes.append(end.response.headers.get("x-swarm-route", ""))

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(note)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S), trace_configs=[trace])
