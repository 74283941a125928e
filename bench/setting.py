"""What the scenarios share: the fixed parts of a run, and servers started with a client for each."""

from __future__ import annotations

import asyncio
import random
import shlex
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.load import BadReply, Client, new_session
from bench.reference import Reference
from bench.servers import Launch, Running, llama_server, running, swarmcpp_server
from swarmcpp.models.synthetic import Quant, Shape, write_model

LLAMA = "llama-server"
SWARM = "swarmcpp"


def synthetic(out: Path, shape: Shape, name: str, quant: Quant) -> Path:
    """The model of random weights, or of those that a shape says, in the file `name`; written once. Blocking."""
    path = out / name
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_model(path, shape, quant=quant, seed=0, tokenizer="bytes")
    return path


@dataclass(frozen=True, slots=True)
class Setup:
    """One run's fixed parts. `repeats` is the number of rounds; each round measures every setting once."""

    reference: Reference
    model: Path
    stories: Path | None
    vocab: range
    """Token ids that prompts are drawn from."""
    threads: int
    repeats: int
    repack: bool
    out: Path
    sides: tuple[str, ...]
    """Which servers take part: LLAMA, SWARM or both."""
    quick: bool
    say: Callable[[str], None]
    seed: int = 0

    def rng(self, scenario: str, round_: int) -> random.Random:
        """The same prompts for every setting of one round, and other prompts in every other round."""
        return random.Random(f"{self.seed} {scenario} {round_}")

    def synthetic(self, shape: Shape, name: str, quant: Quant = "Q8_0") -> Path:
        """See `synthetic`; where this run writes."""
        return synthetic(self.out, shape, name, quant)

    def llama(
        self, slots: int, ctx_size: int, batch: tuple[int, int] | None = None, model: Path | None = None
    ) -> Launch:
        """llama-server as servers.llama_server starts it, on this run's model unless `model` is given."""
        return llama_server(
            self.reference,
            model or self.model,
            slots=slots,
            ctx_size=ctx_size,
            threads=self.threads,
            batch=batch,
            repack=self.repack,
        )

    def swarm(self, slots: int, ctx_size: int, budget_ms: int | None = None, model: Path | None = None) -> Launch:
        """swarmcpp as servers.swarmcpp_server starts it, on this run's model unless `model` is given."""
        return swarmcpp_server(
            model or self.model,
            slots=slots,
            ctx_size=ctx_size,
            threads=self.threads,
            prefill_budget_ms=budget_ms,
        )

    def both(self, slots: int, ctx_size: int, model: Path | None = None) -> list[Launch]:
        """The servers that take part, at their defaults, llama-server first."""
        made = [self.llama(slots, ctx_size, model=model), self.swarm(slots, ctx_size, model=model)]
        return [launch for launch in made if launch.name in self.sides]


class Bed:
    """Servers that run at the same time, with a client for each, by setting's name; stopped at the end."""

    def __init__(self, setup: Setup, launches: Sequence[Launch]) -> None:
        self._setup, self._launches = setup, launches
        self._servers, self._sessions = ExitStack(), AsyncExitStack()
        self.clients: dict[str, Client] = {}
        self.running: dict[str, Running] = {}

    async def __aenter__(self) -> Bed:
        try:
            for launch in self._launches:
                server = await self._start(launch)
                self.running[launch.name] = server
                session = await self._sessions.enter_async_context(new_session())
                async with session.get(f"{server.base_url}/v1/models") as response:
                    if response.status != 200:
                        raise BadReply(f"{launch.name} answered {response.status} to GET /v1/models")
                    model_id = (await response.json())["data"][0]["id"]
                self.clients[launch.name] = Client(session, server.base_url, model_id)
        except BaseException:
            await self._close()
            raise
        return self

    async def _start(self, launch: Launch) -> Running:
        # In a thread: waiting for one server to start must not stop the loop.
        entering = asyncio.to_thread(self._servers.enter_context, running(launch, self._setup.out / "logs"))
        starting = asyncio.create_task(entering)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on: a server that started after the stack was closed would outlive the bench.
            await asyncio.gather(starting, return_exceptions=True)
            raise

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        await self._sessions.aclose()
        await asyncio.to_thread(self._servers.close)


def commands(launches: Sequence[Launch]) -> dict[str, str]:
    """Each setting's command line, with the variables it adds to the environment but for library paths."""
    shown: dict[str, str] = {}
    for launch in launches:
        added = [f"{key}={value}" for key, value in launch.env.items() if key.startswith("SWARMCPP_")]
        shown[launch.name] = " ".join([*added, shlex.join(launch.argv)])
    return shown
