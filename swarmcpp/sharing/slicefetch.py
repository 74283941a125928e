"""Slices of models that this node has not: it fetches what their layers need, and no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from swarmcpp.core import Clock
from swarmcpp.errors import DownloadFailed
from swarmcpp.models.download import FreeSpace, PullProgress, Sleep, disk_free, http_session
from swarmcpp.models.manifest import FileChunk, Manifest
from swarmcpp.models.modelfiles import ByteRange, SparseModel, chunks_of
from swarmcpp.models.partial import locked
from swarmcpp.models.ranges import read_range
from swarmcpp.models.slicestore import SliceFiles, SliceStore, header_bytes
from swarmcpp.models.slicing import embedding_range, slice_ranges, write_slice
from swarmcpp.sharing.modelfetch import fetch_parts
from swarmcpp.sharing.transfer import Fallback
from swarmcpp.wire.peers import Caller


async def obtain_slice(
    manifest: Manifest,
    first: int,
    last: int,
    *,
    embedding: bool,
    callers: Callable[[], Sequence[Caller]],
    store: SliceStore,
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    url: str | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
    free_space: FreeSpace = disk_free,
) -> SliceFiles:
    """The slice of layers [first, last), made from chunks that are fetched; at once when it is there already.

    Fetches the headers, what the layers need, and with `embedding` the token embedding: from peers as `fetch_model`
    does, and from `url`, where the model's one file is published, what no peer has. What arrived stays in the store's
    parts, so a later call goes on from there, and so do other slices of the model. Raises DownloadFailed, BadConfig
    for layers that the model has not, BadModel for one that cannot be cut, StartupError when the disk is full.
    """
    target, parts = store.path_of(manifest, first, last), store.parts(manifest)
    try:
        with locked(target):
            async with _fetching(parts, callers, progress, rejected, url, clock, sleep, free_space) as fetch:
                await _fetch_headers(parts, fetch)
                made = await asyncio.to_thread(store.is_sound, manifest, first, last)
                await _fetch_tensors(parts, None if made else (first, last), embedding, fetch)
            if not made:
                await asyncio.to_thread(
                    write_slice, parts.files[0], first, last, target, fingerprint=manifest.fingerprint
                )
    except OSError as error:
        raise DownloadFailed(
            f"{target}: cannot be written ({error.strerror}); check the directory and the disk"
        ) from None
    return SliceFiles(target, parts.files[0], embedding, parts)


async def obtain_header(
    manifest: Manifest,
    *,
    callers: Callable[[], Sequence[Caller]],
    store: SliceStore,
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    url: str | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> Path:
    """The first file of a model with at least the headers of all, fetched as `obtain_slice` does: it can be inspected.

    Raises DownloadFailed, BadModel, StartupError when the disk is full.
    """
    parts = store.parts(manifest)
    async with _fetching(parts, callers, progress, rejected, url, clock, sleep) as fetch:
        await _fetch_headers(parts, fetch)
    return parts.files[0]


@asynccontextmanager
async def _fetching(
    parts: SparseModel,
    callers: Callable[[], Sequence[Caller]],
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    url: str | None,
    clock: Clock,
    sleep: Sleep,
    free_space: FreeSpace = disk_free,
) -> AsyncIterator[_Fetch]:
    """Fetches chunks into `parts`, one transfer after another."""
    liars: list[Caller] = []

    def honest() -> list[Caller]:
        return [caller for caller in callers() if not any(caller is liar for liar in liars)]

    def reject(caller: Caller) -> None:
        # Each fetch of a header's next chunk is a transfer of its own, which knows nothing of the last one's liars.
        liars.append(caller)
        rejected(caller)

    async with _from_url(url, parts.manifest) as fallback:
        yield partial(
            fetch_parts,
            parts.manifest,
            parts.directory,
            honest,
            progress=progress,
            rejected=reject,
            fallback=fallback,
            clock=clock,
            sleep=sleep,
            free_space=free_space,
        )


class _Fetch(Protocol):
    async def __call__(self, wanted: set[int], *, reserve: int = 0) -> SparseModel: ...


async def _fetch_tensors(parts: SparseModel, layers: tuple[int, int] | None, embedding: bool, fetch: _Fetch) -> None:
    """What the slice of `layers` is made of, and the token embedding. The headers are there."""
    source = parts.files[0]
    ranges = await asyncio.to_thread(slice_ranges, source, *layers) if layers is not None else ()
    # The slice is written beside its parts.
    reserve = sum(each.end - each.start for each in ranges)
    if embedding:
        ranges += (await asyncio.to_thread(embedding_range, source),)
    if ranges:
        await fetch(chunks_of(parts.manifest, ranges), reserve=reserve)


async def _fetch_headers(parts: SparseModel, fetch: _Fetch) -> None:
    """Until the header of every file is there. Raises BadModel when one is damaged."""
    # A chunk is far more than the header of a small model, and of every file of a split but the first.
    ends = [1] * len(parts.files)
    while True:
        ranges = [ByteRange(file, 0, end) for file, end in enumerate(ends)]
        await fetch(chunks_of(parts.manifest, ranges))
        more = await asyncio.to_thread(_header_ends, parts, ends)
        if more == ends:
            return
        ends = more


def _header_ends(parts: SparseModel, ends: Sequence[int]) -> list[int]:
    """For each file, of which the chunks up to `ends` are there, where its header ends; `ends` when within."""
    found: list[int] = []
    for file, (path, end) in enumerate(zip(parts.files, ends, strict=True)):
        last = parts.manifest.chunk(max(chunks_of(parts.manifest, [ByteRange(file, 0, end)])))
        ready = last.offset + last.size
        needed = header_bytes(path, ready)
        found.append(end if needed <= ready else needed)
    return found


@asynccontextmanager
async def _from_url(url: str | None, manifest: Manifest) -> AsyncIterator[Fallback | None]:
    """Chunks by HTTP; none of a split model, whose files have a URL each."""
    if url is None or len(manifest.files) > 1:
        yield None
        return
    async with http_session() as session:

        async def read(chunk: FileChunk) -> bytes:
            return await read_range(session, url, chunk.offset, chunk.size, manifest.size)

        yield read
