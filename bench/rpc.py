"""llama.cpp over two boxes: llama-server, and `ggml-rpc-server` workers that hold the model's layers.

Box A has llama-server, and a worker of its own or the first half of the layers in llama-server itself; box B has a
worker. Each box has one core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from bench.load import Client
from bench.netns import Namespace
from bench.nodes import session_in
from bench.reference import Reference
from bench.servers import Launch, Running, llama_server, running
from bench.setting import Setup, commands
from swarmcpp.models.capacity import head_bytes, layer_bytes
from swarmcpp.models.inspect import inspect

RPC = "llama.cpp RPC"


@dataclass(frozen=True, slots=True)
class Box:
    """A machine: one core, and its network; without a `space` this machine's loopback."""

    core: int
    space: Namespace | None = None

    @property
    def address(self) -> str:
        """Where the other box finds it."""
        return self.space.address if self.space else "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Split:
    """How the layers are spread. With `two_workers` llama.cpp pipelines the pieces of a prompt, which it does not when
    llama-server computes a part itself. `options` are added to llama-server's."""

    name: str = RPC
    two_workers: bool = True
    options: tuple[str, ...] = ()

    def argv(self, n_layers: int, first: int, ports: tuple[int, ...], hosts: tuple[str, ...]) -> tuple[str, ...]:
        """llama-server's options for workers at `hosts` and `ports`, box B's last, with `first` layers at A. The output
        layer counts as one of `n_layers` + 1, and is box B's."""
        rpc = ("--rpc", ",".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)))
        last = n_layers + 1 - first
        layers = ("-ngl", str(n_layers + 1), "-ts", f"{first},{last}") if self.two_workers else ("-ngl", str(last))
        # What --fit would set is all said.
        return (*rpc, *layers, "-fit", "off", *self.options)


BEST = Split()
"""What the other scenarios take; scenario `rpc` holds it against the rest of CANDIDATES."""

HALF = f"{RPC}, half in llama-server"
CANDIDATES = (
    BEST,
    Split(HALF, two_workers=False),
    Split(f"{RPC} -ub 256", options=("-ub", "256")),
    Split(f"{HALF} -ub 256", two_workers=False, options=("-ub", "256")),
    # With pieces of the streams as ubatches it could pipeline decode.
    Split(f"{RPC} -ub 32", options=("-ub", "32")),
    Split(f"{RPC} -bs", options=("-bs",)),
    Split(f"{RPC}, one KV buffer", options=("--kv-unified",)),
)


def balanced(model: Path) -> int:
    """How many layers the first of two boxes gets so that both have as much to read: the output head is large."""
    file = inspect(model)
    layers, head = layer_bytes(file), head_bytes(file)
    return min(range(1, file.n_layers), key=lambda first: max(sum(layers[:first]), sum(layers[first:]) + head))


def halved(model: Path) -> int:
    """Half of the layers: both boxes compute as much of a prompt, of which only one row needs the output head."""
    return inspect(model).n_layers // 2


def worker(reference: Reference, box: Box) -> Launch:
    """A worker with one thread. In a namespace it listens at all addresses: there is nobody else."""
    host = "0.0.0.0" if box.space else "127.0.0.1"
    argv = (str(reference.rpc_server), "-H", host, "-p", "{port}", "-t", "1")
    return Launch(f"rpc worker {box.core}", argv, "", reference.environment(), (box.core,))


class Rpc:
    """llama-server over two boxes, with a client; stopped at the end. Loads the model when it starts.

    Raises ServerDied where a program does not start.
    """

    def __init__(
        self,
        setup: Setup,
        boxes: tuple[Box, Box],
        *,
        slots: int,
        ctx_size: int,
        split: Split = BEST,
        first: Callable[[Path], int] = balanced,
    ) -> None:
        self._setup, self._boxes, self._split = setup, boxes, split
        self._slots, self._ctx_size, self._first = slots, ctx_size, first
        self._servers, self._sessions = ExitStack(), AsyncExitStack()
        self._workers: list[Running] = []
        self.commands: dict[str, str] = {}

    async def __aenter__(self) -> Rpc:
        own, other = self._boxes
        try:
            for box in (own, other) if self._split.two_workers else (other,):
                self._workers.append(await self._start(worker(self._setup.reference, box), box.space))
            launch = self._server()
            server = await self._start(launch, own.space)
            session = await self._sessions.enter_async_context(session_in(own.space, []))
        except BaseException:
            await self._close()
            raise
        self.client = Client(session, server.base_url, self._setup.model.stem)
        self.commands = commands([*(each.launch for each in self._workers), launch])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    def _server(self) -> Launch:
        own, other = self._boxes
        setup = self._setup
        # A worker of the same box is asked over its loopback, not over the link.
        hosts = ("127.0.0.1", other.address) if self._split.two_workers else (other.address,)
        ports = tuple(each.port for each in self._workers)
        launch = llama_server(
            setup.reference,
            setup.model,
            slots=self._slots,
            ctx_size=self._ctx_size,
            threads=1,
            repack=setup.repack,
            cpus=(own.core,),
            extra=self._split.argv(inspect(setup.model).n_layers, self._first(setup.model), ports, hosts),
        )
        return replace(launch, name=self._split.name)

    async def _start(self, launch: Launch, space: Namespace | None) -> Running:
        def enter() -> Running:
            with space.inside() if space else nullcontext():
                return self._servers.enter_context(running(launch, self._setup.out / "logs"))

        return await finished(enter)

    async def _close(self) -> None:
        await self._sessions.aclose()
        await asyncio.to_thread(self._servers.close)


async def finished(start: Callable[[], Running]) -> Running:
    """What `start` gives in a thread; a task that is cancelled meanwhile waits for its end all the same."""
    starting = asyncio.create_task(asyncio.to_thread(start))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # The thread goes on: a server that started after the stack was closed would outlive the bench.
        await asyncio.gather(starting, return_exceptions=True)
        raise
