"""`swarmcpp serve`: find the model, run the node, stop it on a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path
from types import FrameType

from rich.console import Console

from swarmcpp.commands import share, terminal
from swarmcpp.commands.pull import download, user_catalogue
from swarmcpp.commands.swarm import in_swarm
from swarmcpp.commands.terminal import LoadingView, ask_text, join_text
from swarmcpp.config import Config, LoadedConfig, is_loopback
from swarmcpp.errors import BadConfig
from swarmcpp.footprint import settle, share_heaps
from swarmcpp.models import embedded
from swarmcpp.models.download import resolve_model
from swarmcpp.models.inspect import inspect
from swarmcpp.node import preparing, serving
from swarmcpp.node.member import Swarm
from swarmcpp.node.whole import WholeModel
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarm.store import SwarmStore

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises StartupError when it cannot start, SwarmError when it cannot go on."""
    console = terminal.stderr()
    path, name = find_model(loaded.config, console)
    share_heaps()
    asyncio.run(_run(loaded.config, path, name, console))


async def _run(config: Config, path: Path, name: str | None, console: Console) -> None:
    stop = stop_on_signals()
    async with AsyncExitStack() as stack:
        swarm: Swarm | None = None
        try:
            swarm = await stack.enter_async_context(await _own_swarm(config))
        except BadConfig as error:
            if config.swarm.enabled:
                raise
            # One machine needs no swarm.
            logger.warning("no other node can join: %s", error)
        if config.engine.layer_range is not None or (config.swarm.enabled and not await _fits(config, path)):
            if swarm is None:
                raise BadConfig("--layers needs a swarm: connect this machine to a network, or say --swarm-host")
            await share.from_file(config, path, name, console, swarm=swarm, stop=stop)
            return
        await serve(config, path, name, console, swarm=swarm, stop=stop)


async def _fits(config: Config, path: Path) -> bool:
    return await asyncio.to_thread(lambda: preparing.fits_whole(config, inspect(path)))


async def _own_swarm(config: Config) -> AbstractAsyncContextManager[Swarm]:
    """The swarm of this machine, which is a new one the first time. Raises BadConfig."""
    store = SwarmStore(config.storage.data_dir)
    state = await asyncio.to_thread(store.load)
    key = state.key if state else await asyncio.to_thread(store.rotate)
    peers = state.peers if state else ()
    # Who has peers on other machines has said before that they may come in.
    lan = config.swarm.enabled or any(not is_loopback(peer.host) for peer in peers)
    return in_swarm(config, store, key, peers, lan=lan)


def find_model(config: Config, console: Console) -> tuple[Path, str | None]:
    """The model's file, downloaded if need be, and its name in the catalogue; the one that comes with the package, and
    a line that says so, when none is named. Raises StartupError."""
    if config.model is None:
        console.print(embedded.ABOUT, soft_wrap=True, highlight=False)
        return embedded.embedded_file(), None
    storage = config.storage
    catalogue = user_catalogue(storage)
    found = resolve_model(config.model, storage.models_dir, catalogue)
    if isinstance(found, Path):
        entry = catalogue.get(config.model)
        return found, entry.name if entry and found == storage.models_dir / entry.file else None
    return download(found, storage.models_dir, console), found.name


async def serve(
    config: Config, path: Path, name: str | None, console: Console, *, swarm: Swarm | None, stop: asyncio.Event
) -> None:
    """Serve `path`, as a node of `swarm` if there is one, until `stop`, telling the terminal how it goes."""
    with closing(LoadingView(console, name or path.name)) as view:
        prepared = await asyncio.to_thread(preparing.prepare, config, path, name)
        model = WholeModel(config, prepared, swarm, view.update)

        def ready(url: str) -> None:
            token = swarm.token if swarm else None
            view.ready(ready_text(model, url, token, with_key=config.server.api_key is not None))
            settle()

        await serving.run(config, [model], swarm=swarm, on_ready=ready, stop=stop)


def stop_on_signals() -> asyncio.Event:
    """Set at the first SIGINT or SIGTERM."""
    stop = asyncio.Event()
    _on_signals(stop.set)
    return stop


def _on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on the event loop at the first SIGINT or SIGTERM; the next one ends the process at once."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    for number in numbers:
        # Not the loop's add_signal_handler, which Windows does not have.
        signal.signal(number, first)


def ready_text(model: WholeModel, url: str, token: JoinToken | None, *, with_key: bool) -> str:
    """What a node says when it can be asked: where, what, how much, and a command to try it."""
    status, threads = model.supervisor.status, model.prepared.options.threads
    slots = f"{status.slots} slot{'' if status.slots == 1 else 's'} of {status.ctx_size} tokens"
    memory = terminal.size_text(status.resident_bytes)
    cache = f"{terminal.size_text(model.cache_bytes)} of cache on disk" if model.cache_bytes else "no cache on disk"
    return (
        f"ready: {model.info.id} at {url}/v1\n"
        f"  {slots}, {memory} of memory, {threads} thread{'' if threads == 1 else 's'}, {cache}\n"
        f"{ask_text(url, model.info.id, with_key=with_key)}{join_text(token)}"
    )
