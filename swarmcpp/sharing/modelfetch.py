"""Model files from peers: several holders at once, every chunk checked before it is written, resumable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from swarmcpp.core import Clock
from swarmcpp.errors import DownloadFailed, SwarmError
from swarmcpp.models.capacity import gigabytes
from swarmcpp.models.download import SPARE_BYTES, FreeSpace, PullProgress, Sleep, disk_free, no_space
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.modelfiles import ModelParts, SparseModel, stored_paths
from swarmcpp.models.partial import locked
from swarmcpp.sharing.transfer import Fallback, Transfer, shown
from swarmcpp.wire.peers import Caller, GetManifest, ManifestReply


async def get_manifest(callers: Sequence[Caller], fingerprint: bytes, timeout_s: float) -> Manifest:
    """The manifest of a model from the first of its holders that gives the right one, each within `timeout_s`.

    Raises DownloadFailed when none does.
    """
    reason = "nobody has it"
    for caller in callers:
        try:
            reply, payload = await caller.ask(GetManifest(fingerprint), timeout_s=timeout_s)
            if isinstance(reply, ManifestReply) and len(payload) == 1:
                manifest = Manifest.from_bytes(payload[0])
                if manifest.fingerprint == fingerprint:
                    return manifest
            reason = "a peer answered with something else"
        except SwarmError as error:
            reason = shown(error)
    raise DownloadFailed(
        f"model {fingerprint.hex()[:8]}: no peer told what its files are ({reason}); "
        "start a node that has the model, and run the same command again"
    )


async def fetch_model(
    manifest: Manifest,
    directory: Path,
    holders: Callable[[], Sequence[Caller]],
    *,
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
    free_space: FreeSpace = disk_free,
) -> tuple[Path, ...]:
    """Fetch a model's files into `directory` and return them; at once when they are there already.

    `holders` is called again and again: peers may come and go. One that sends wrong bytes is given to `rejected` and
    not asked any more. What arrived before an interruption stays in NAME.part, and a later call goes on from there.
    Where another model has the name, the beginning of the fingerprint is added to it. Raises DownloadFailed: which
    path, what is wrong, what to do.
    """
    tag = ""
    while True:
        finals = stored_paths(manifest, directory, tag)
        try:
            with locked(finals[0]):
                progress(PullProgress(finals[0].name, 0, manifest.size, 0.0, verifying=True))
                parts = await asyncio.to_thread(ModelParts.look, manifest, finals)
                if parts.clash and not tag:
                    tag = f"-{manifest.fingerprint.hex()[:8]}"
                    continue
                missing = await asyncio.to_thread(parts.prepare)
                _check_space(manifest, missing, directory, free_space)
                transfer = Transfer(parts, missing, manifest.size, finals[0], holders, progress, rejected, clock)
                await transfer.run(sleep)
                await asyncio.to_thread(parts.commit)
                return finals
        except OSError as error:
            raise _cannot_write(manifest.size, finals[0], free_space, error) from None


async def fetch_parts(
    manifest: Manifest,
    directory: Path,
    holders: Callable[[], Sequence[Caller]],
    wanted: Collection[int],
    *,
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    fallback: Fallback | None = None,
    reserve: int = 0,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
    free_space: FreeSpace = disk_free,
) -> SparseModel:
    """Fetch the chunks `wanted` of a model into the SparseModel in `directory`; at once when they are there already.

    All else is as with `fetch_model`. `fallback` gives chunks that no peer has; it is no peer, and never `rejected`.
    `reserve`: bytes that must stay free on the disk beside what is fetched. Raises DownloadFailed.
    """
    parts = SparseModel(manifest, directory)
    name = parts.files[0]
    total = sum(manifest.chunk(index).size for index in wanted)
    try:
        with locked(name):
            progress(PullProgress(name.name, 0, total, 0.0, verifying=True))
            await asyncio.to_thread(parts.prepare)
            missing = await asyncio.to_thread(parts.missing, wanted)
            _check_space(manifest, missing, directory, free_space, reserve)
            await Transfer(parts, missing, total, name, holders, progress, rejected, clock, fallback).run(sleep)
    except OSError as error:
        raise _cannot_write(total + reserve, name, free_space, error) from None
    return parts


def _cannot_write(needed: int, final: Path, free_space: FreeSpace, error: OSError) -> DownloadFailed:
    free = f"{gigabytes(free_space(final.parent))} free" if final.parent.is_dir() else "no such directory"
    return DownloadFailed(
        f"{final}: cannot be written ({error.strerror or type(error).__name__}); "
        f"{gigabytes(needed)} needed in all, {free}; check the directory and the disk"
    )


def _check_space(
    manifest: Manifest, missing: set[int], directory: Path, free_space: FreeSpace, reserve: int = 0
) -> None:
    needed = sum(manifest.chunk(index).size for index in missing) + reserve + SPARE_BYTES
    if missing and needed > (free := free_space(directory)):
        raise no_space(directory, needed, manifest.files[0].name, free)
