"""Nodes that run layers of one model together, each a real `swarmcpp` with a swarm port of its own on loopback."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
from serve_client import Body, Heard, listen
from serve_process import STOP_DEADLINE_S, wait_until
from swarm_process import Seat, SwarmNode, node

FLAGS = ("--slots", "8", "--ctx-size", "2048")
CHAIN_S = 180.0
"""To see peers and have a chain through them."""


class Pipeline:
    """Nodes of one swarm by name; each can end and come back in its seat, as what it was."""

    def __init__(self, stack: ExitStack, new_data_dir: Callable[[], Path]) -> None:
        self._stack = stack
        self._new_data_dir = new_data_dir
        self._commands: dict[str, tuple[str, ...]] = {}
        self._env: dict[str, Mapping[str, str]] = {}
        self.seats: dict[str, Seat] = {}
        self.nodes: dict[str, SwarmNode] = {}

    def __getitem__(self, name: str) -> SwarmNode:
        return self.nodes[name]

    def seat(self, seat: Seat) -> None:
        """Let a node have this seat when it starts."""
        self.seats[seat.name] = seat

    def launch(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> SwarmNode:
        """Start a node and do not wait for it; without a command, again after its end."""
        if command:
            if name not in self.seats:
                self.seats[name] = Seat(name, self._new_data_dir())
            self._commands[name], self._env[name] = command, env or {}
        started = node(self.seats[name], *self._commands[name], env=self._env[name])
        self.nodes[name] = self._stack.enter_context(started)
        return self.nodes[name]

    def start(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> SwarmNode:
        """Start a node, and wait until it has its layers."""
        started = self.launch(name, *command, env=env)
        started.wait_ready()
        return started

    def wait_answers(self, *names: str) -> None:
        """Until nodes are heads with a whole chain."""
        for name in names:
            wait_until(lambda at=name: self[at].get("/health/ready")[0] == 200, f"{name} answers", CHAIN_S)  # type: ignore[misc]

    def wait_ranges(self, at: str, **ranges: str) -> None:
        """Until a node sees just these layers on its peers and itself, such as Ann="0-3"."""

        def held() -> dict[str, str]:
            rows = [row for row in self[at].swarm()["nodes"] if row["status"] == "alive"]
            return {row["name"]: ",".join(row["ranges"]) for row in rows}

        wait_until(lambda: held() == ranges, f"{at} sees {ranges}", CHAIN_S)

    def failovers(self, name: str) -> list[str]:
        """What a head has logged of requests that lost a stage and went on."""
        return [line for line in self[name].stderr.splitlines() if "DIAG: pipeline failover" in line]

    def in_use(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that requests of Ann go through now. Of two with the same layers chance decides."""
        routes = " ".join(row["route"] for row in self["Ann"].swarm()["requests"])
        return tuple(name for name in names if name in routes)

    def wait_idle(self) -> None:
        """Until no node has a sequence, and none answers a request."""

        def busy() -> list[str]:
            rows = {name: each.swarm() for name, each in self.nodes.items() if each.running}
            own = {name: next(row for row in found["nodes"] if row["is_self"]) for name, found in rows.items()}
            return [name for name, row in own.items() if row["slots_busy"] or row["waiting"] or rows[name]["requests"]]

        wait_until(lambda: not busy(), "no sequence is left on any stage", 10.0)

    def end(self) -> None:
        """SIGTERM for all; each must end cleanly."""
        running = [each for each in self.nodes.values() if each.running]
        for each in running:
            each.thaw()
            each.process.send_signal(signal.SIGTERM)
        for each in running:
            assert each.process.wait(STOP_DEADLINE_S) == 0, each.stderr
            assert "Traceback" not in each.stderr, each.stderr
            each.home.assert_clean()


@contextmanager
def pipeline(
    model: Path, new_data_dir: Callable[[], Path], ranges: Sequence[str], *flags: str, copies: Sequence[str] = ()
) -> Iterator[Pipeline]:
    """Nodes Ann, Bob, Cid, Dan with these layers, such as "0-3"; Ann has the model, the others fetch what they need.

    Those in `copies` have the model, too. All are there, and Ann answers; at the end all must end cleanly.
    """
    with nodes(new_data_dir) as whole:
        names = ("Ann", "Bob", "Cid", "Dan")[: len(ranges)]
        flags = flags or FLAGS
        ann = whole.start("Ann", "serve", str(model), "--layers", ranges[0], "-vv", *flags)
        for name, layers in zip(names[1:], ranges[1:], strict=True):
            copy = ("--model", str(model)) if name in copies else ()
            whole.launch(name, "join", ann.token, "--layers", layers, *copy, *flags)
        for name in names[1:]:
            whole[name].wait_ready()
        for name in names:
            # Stages send on to one another: that the head sees them is not enough.
            whole.wait_ranges(name, **dict(zip(names, ranges, strict=True)))
        whole.wait_answers("Ann")
        yield whole


@contextmanager
def nodes(new_data_dir: Callable[[], Path]) -> Iterator[Pipeline]:
    """A swarm without nodes; what a test starts must end cleanly."""
    with ExitStack() as stack:
        whole = Pipeline(stack, new_data_dir)
        yield whole
        whole.end()


async def listen_all(http: aiohttp.ClientSession, url: str, bodies: Sequence[Body]) -> list[str]:
    """Texts of streams that run side by side, each of which must end well."""
    heards: list[Heard] = await asyncio.gather(*(listen(http, url, body) for body in bodies))
    assert [(each.finish, each.done, each.error) for each in heards] == [("length", True, None)] * len(bodies)
    return [each.text for each in heards]
