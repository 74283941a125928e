"""`swarmcpp join`: become a node of a swarm, and serve what it serves."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from swarmcpp.commands import serve, terminal
from swarmcpp.commands.pull import download_async, progress_text, user_catalogue
from swarmcpp.commands.swarm import in_swarm
from swarmcpp.config import Config, LoadedConfig
from swarmcpp.errors import BadConfig, BadModel, DownloadFailed, SwarmUnreachable
from swarmcpp.models.download import PullProgress
from swarmcpp.models.manifest import Manifest, manifest_of
from swarmcpp.models.modelfiles import find_local
from swarmcpp.peers import ModelOffer
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarm.modelfetch import fetch_model, get_manifest
from swarmcpp.swarm.store import SwarmState, SwarmStore
from swarmcpp.swarming.swarm import Swarm

FIND_S: Final = 15.0
"""How long a member is looked for."""

SETTLE_S: Final = 0.3
"""How long others are waited for once one is found: several holders make a transfer faster."""

MODEL_S: Final = 120.0
"""How long a swarm that serves nothing yet is waited for."""

MANIFEST_S: Final = 10.0


def run(loaded: LoadedConfig, token: str | None) -> None:
    """Join and serve until SIGINT or SIGTERM. Raises StartupError when that cannot be."""
    store = SwarmStore(loaded.config.storage.data_dir)
    state = _remember(store, token)
    asyncio.run(_join(loaded.config, store, state, terminal.stderr()))


def _remember(store: SwarmStore, token: str | None) -> SwarmState:
    """The swarm to join, which this machine belongs to from now on. Raises BadToken, BadConfig."""
    if token is not None:
        parsed = JoinToken.parse(token)
        store.save(parsed.key)
        store.remember(parsed.addresses)
    state = store.load()
    if state is None:
        raise BadConfig("this machine is in no swarm yet: `swarmcpp join TOKEN`; `swarmcpp token` on a member shows it")
    return state


async def _join(config: Config, store: SwarmStore, state: SwarmState, console: Console) -> None:
    stop = serve.stop_on_signals()
    async with in_swarm(config, store, state.key, state.peers, lan=True) as swarm:
        prepared = asyncio.create_task(_prepare(config, swarm, console))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({prepared, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not prepared.done():
            prepared.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await prepared
            return
        path, name = await prepared
        await serve.serve(config, path, name, console, swarm=swarm, stop=stop)


async def _prepare(config: Config, swarm: Swarm, console: Console) -> tuple[Path, str]:
    """The file to serve, and its name in the swarm."""
    await _find_members(swarm)
    offer = await _pick(config, swarm, console)
    return await _obtain(config, swarm, offer, console), offer.id


async def _find_members(swarm: Swarm) -> None:
    """Wait for a first member. Raises SwarmUnreachable."""
    try:
        async with asyncio.timeout(FIND_S):
            while not swarm.mesh.callers():
                swarm.mesh.changed.clear()
                await swarm.mesh.changed.wait()
    except TimeoutError:
        tried = "; ".join(f"{address}: {why}" for address, why in swarm.mesh.refusals().items())
        raise SwarmUnreachable(
            f"no member of swarm {swarm.key.swarm_id} answers within {FIND_S:g} s ({tried or 'no address is known'}); "
            "check that one runs with --swarm, that both machines are in one network, and that the token is its newest"
        ) from None
    await asyncio.sleep(SETTLE_S)


async def _pick(config: Config, swarm: Swarm, console: Console) -> ModelOffer:
    """The model to serve: the one that most nodes serve. Raises SwarmUnreachable when there is none."""
    said = False
    try:
        async with asyncio.timeout(MODEL_S):
            while not (offers := [offer for _, offer in swarm.models.offers()]):
                if not said:
                    console.print("waiting for a member to serve a model")
                    said = True
                swarm.mesh.changed.clear()
                await swarm.mesh.changed.wait()
    except TimeoutError:
        raise SwarmUnreachable(
            f"no member of swarm {swarm.key.swarm_id} serves a model; start one with `swarmcpp serve MODEL --swarm`"
        ) from None
    counts: dict[bytes, int] = {}
    for offer in offers:
        counts[offer.fingerprint] = counts.get(offer.fingerprint, 0) + 1
    return max(offers, key=lambda each: (counts[each.fingerprint], each.size_bytes, each.id))


async def _obtain(config: Config, swarm: Swarm, offer: ModelOffer, console: Console) -> Path:
    """A local copy of the model: the one named, one that is here, from peers, or from its URL."""
    data_dir, models_dir = config.storage.data_dir, config.storage.models_dir
    if config.model is not None:
        return await asyncio.to_thread(_given, Path(config.model), offer, data_dir)
    manifest = await get_manifest(swarm.models.holders(offer.fingerprint), offer.fingerprint, MANIFEST_S)
    found = await asyncio.to_thread(find_local, manifest, [models_dir, Path()], data_dir)
    if found:
        return found[0]
    try:
        return await _fetch(swarm, offer, manifest, models_dir, console)
    except DownloadFailed:
        entry = user_catalogue(config.storage).get(offer.id)
        if entry is None:
            raise
        console.print("no peer sends the model any more; it is downloaded from where it was published")
        path = await download_async(entry, models_dir, console)
        if (await asyncio.to_thread(manifest_of, [path], data_dir)).fingerprint != offer.fingerprint:
            raise BadModel(f"{path}: what {entry.url} has now is not the model that the swarm serves") from None
        return path


def _given(path: Path, offer: ModelOffer, data_dir: Path) -> Path:
    """The copy that the user named. Raises BadModel when it is another model."""
    path = path.expanduser()
    if not path.is_file():
        raise BadModel(f"{path}: no such file; leave out --model to fetch {offer.id!r} from the swarm")
    if manifest_of([path], data_dir).fingerprint != offer.fingerprint:
        raise BadModel(f"{path}: is not the {offer.id!r} that the swarm serves; leave out --model to fetch that")
    return path


async def _fetch(swarm: Swarm, offer: ModelOffer, manifest: Manifest, directory: Path, console: Console) -> Path:
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    size = terminal.size_text(manifest.size)
    console.print(f"fetching {offer.id}, {size}, from {len(swarm.models.holders(offer.fingerprint))} of the swarm")
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("connecting", total=None)

        def show(now: PullProgress) -> None:
            progress.update(task, completed=now.done, total=now.total, description=progress_text(now))

        files = await fetch_model(
            manifest,
            directory,
            lambda: swarm.models.holders(offer.fingerprint),
            progress=show,
            rejected=lambda caller: swarm.distrust(caller, "sent wrong bytes of a model"),
        )
    return files[0]
