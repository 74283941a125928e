"""`swarmcpp join`: become a node of a swarm, and serve what it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from swarmcpp.commands import serve, share, terminal
from swarmcpp.commands.pull import download_async, progress_text, user_catalogue
from swarmcpp.commands.swarm import in_swarm
from swarmcpp.config import Config, LoadedConfig
from swarmcpp.errors import BadConfig, BadModel, DownloadFailed, SwarmUnreachable
from swarmcpp.footprint import share_heaps
from swarmcpp.models.download import PullProgress
from swarmcpp.models.inspect import inspect
from swarmcpp.models.manifest import Manifest, manifest_of
from swarmcpp.models.modelfiles import find_local
from swarmcpp.models.slicestore import SliceFiles, SliceStore
from swarmcpp.node.layerhost import Obtain, SharedModel
from swarmcpp.node.member import Swarm
from swarmcpp.node.preparing import fits_whole
from swarmcpp.node.serving import until_stopped
from swarmcpp.sharing.modelfetch import fetch_model, get_manifest
from swarmcpp.sharing.slicefetch import obtain_header, obtain_slice
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarm.store import SwarmState, SwarmStore

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
    share_heaps()
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
        if await until_stopped(prepared, stop):
            part = prepared.result()
            if isinstance(part, Whole):
                await serve.serve(config, part.path, part.name, console, swarm=swarm, stop=stop)
            else:
                await share.run(config, part.model, console, swarm=swarm, obtain=part.obtain, stop=stop)


@dataclass(frozen=True, slots=True)
class Target:
    """A model of the swarm, which `copies` nodes serve as a whole."""

    fingerprint: bytes
    name: str
    size_bytes: int
    copies: int


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a model is to be served here, from `path`, under `name`."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of a model are to be run here."""

    model: SharedModel
    obtain: Obtain


async def _prepare(config: Config, swarm: Swarm, console: Console) -> Whole | Layers:
    """What this node is to do. What one machine can hold is never split, unless that was asked for."""
    await _find_members(swarm)
    given = await asyncio.to_thread(_given, config) if config.model is not None else None
    target = await _pick(swarm, console, given)
    local, manifest = given or await _local(config, swarm, target)
    source = local or await _header(config, swarm, manifest, console)
    file = await asyncio.to_thread(inspect, source)
    if config.engine.layer_range is None and await asyncio.to_thread(fits_whole, config, file):
        path = local or await _obtain(config, swarm, target, manifest, console)
        return Whole(path, target.name)
    model = share.shared_model(config, swarm, manifest, file, target.name)
    return Layers(model, _obtainer(config, swarm, local, manifest, model, console))


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


async def _pick(swarm: Swarm, console: Console, given: tuple[Path, Manifest] | None) -> Target:
    """The model to serve: the one that the user has given a copy of, else the one that most nodes serve.

    Raises SwarmUnreachable when there is none, BadModel when nobody serves what was given.
    """
    said = False
    try:
        async with asyncio.timeout(MODEL_S):
            while not (targets := _targets(swarm)):
                if not said:
                    console.print("waiting for a member to serve a model")
                    said = True
                swarm.mesh.changed.clear()
                await swarm.mesh.changed.wait()
    except TimeoutError:
        raise SwarmUnreachable(
            f"no member of swarm {swarm.key.swarm_id} serves a model; start one with `swarmcpp serve MODEL --swarm`"
        ) from None
    if given is not None:
        path, manifest = given
        found = next((each for each in targets if each.fingerprint == manifest.fingerprint), None)
        if found is None:
            names = ", ".join(sorted({repr(each.name) for each in targets}))
            raise BadModel(f"{path}: is not the {names} that the swarm serves; leave out --model to fetch that")
        return found
    return max(targets, key=lambda each: (each.copies, each.size_bytes, each.name))


def _targets(swarm: Swarm) -> list[Target]:
    found: dict[bytes, Target] = {}
    for _, offer in swarm.models.offers():
        copies = found[offer.fingerprint].copies if offer.fingerprint in found else 0
        found[offer.fingerprint] = Target(offer.fingerprint, offer.id, offer.size_bytes, copies + 1)
    for stage in swarm.pipelines.seen():
        found.setdefault(stage.ref.fingerprint, Target(stage.ref.fingerprint, stage.offer.model, 0, 1))
    return list(found.values())


async def _local(config: Config, swarm: Swarm, target: Target) -> tuple[Path | None, Manifest]:
    """A copy of the model that is here, and what the model's files are."""
    data_dir = config.storage.data_dir
    holders = swarm.models.holders(target.fingerprint)
    manifest = await get_manifest(holders, target.fingerprint, MANIFEST_S)
    found = await asyncio.to_thread(find_local, manifest, [config.storage.models_dir, Path()], data_dir)
    return (found[0] if found else None), manifest


async def _obtain(config: Config, swarm: Swarm, target: Target, manifest: Manifest, console: Console) -> Path:
    """All of the model, from peers or from its URL."""
    data_dir, models_dir = config.storage.data_dir, config.storage.models_dir
    try:
        return await _fetch(swarm, target, manifest, models_dir, console)
    except DownloadFailed:
        entry = user_catalogue(config.storage).get(target.name)
        if entry is None:
            raise
        console.print("no peer sends the model any more; it is downloaded from where it was published")
        path = await download_async(entry, models_dir, console)
        if (await asyncio.to_thread(manifest_of, [path], data_dir)).fingerprint != target.fingerprint:
            raise BadModel(f"{path}: what {entry.url} has now is not the model that the swarm serves") from None
        return path


async def _header(config: Config, swarm: Swarm, manifest: Manifest, console: Console) -> Path:
    """A file with at least the header of the model, fetched if need be."""
    with _progress(console) as show:
        return await obtain_header(
            manifest,
            callers=lambda: swarm.models.holders(manifest.fingerprint),
            store=SliceStore(config.storage.data_dir),
            progress=show,
            rejected=lambda caller: swarm.distrust(caller, "sent wrong bytes of a model"),
        )


def _obtainer(
    config: Config, swarm: Swarm, local: Path | None, manifest: Manifest, model: SharedModel, console: Console
) -> Obtain:
    """How slices come here: cut from a local copy, or fetched. A node with the first layer is to be a head."""
    store = SliceStore(config.storage.data_dir)
    entry = user_catalogue(config.storage).get(model.id)

    async def obtain(first: int, last: int) -> SliceFiles:
        if local is not None:
            return await asyncio.to_thread(store.from_file, local, first, last)
        console.print(f"fetching layers {first}-{last} of {model.id}")
        with _progress(console) as show:
            return await obtain_slice(
                manifest,
                first,
                last,
                embedding=first == 0,
                callers=lambda: swarm.models.holders(manifest.fingerprint),
                store=store,
                progress=show,
                rejected=lambda caller: swarm.distrust(caller, "sent wrong bytes of a model"),
                url=entry.url if entry else None,
            )

    return obtain


def _given(config: Config) -> tuple[Path, Manifest]:
    """The copy that the user named, and what its files are. Blocking. Raises BadModel when it is none."""
    path = Path(config.model or "").expanduser()
    if not path.is_file():
        raise BadModel(f"{path}: no such file; leave out --model to fetch the swarm's")
    return path, manifest_of(inspect(path).files, config.storage.data_dir)


async def _fetch(swarm: Swarm, target: Target, manifest: Manifest, directory: Path, console: Console) -> Path:
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    size = terminal.size_text(manifest.size)
    console.print(f"fetching {target.name}, {size}, from {len(swarm.models.holders(target.fingerprint))} of the swarm")
    with _progress(console) as show:
        files = await fetch_model(
            manifest,
            directory,
            lambda: swarm.models.holders(target.fingerprint),
            progress=show,
            rejected=lambda caller: swarm.distrust(caller, "sent wrong bytes of a model"),
        )
    return files[0]


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[PullProgress], None]]:
    """A bar for a transfer, on a terminal."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("connecting", total=None)

        def show(now: PullProgress) -> None:
            progress.update(task, completed=now.done, total=now.total, description=progress_text(now))

        yield show
