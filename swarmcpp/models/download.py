"""Downloads a catalogue entry over HTTP: resumes, checks, and gives the file its name only when it is whole."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import aiohttp

from swarmcpp.core import Clock
from swarmcpp.errors import BadModel, DownloadFailed
from swarmcpp.models.capacity import gigabytes
from swarmcpp.models.catalogue import Catalogue, CatalogueEntry
from swarmcpp.models.embedded import NAMES, embedded_file
from swarmcpp.models.gguf_header import MAGIC
from swarmcpp.models.partial import PartialFile, Source, locked

CHUNK = 1 << 18
"""Bytes per write: large enough for a fast disk, small enough for a smooth progress bar."""
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits before another try. After as many failures in a row that brought the file no further, the next one is final."""
CONNECT_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 60.0
"""A connection that delivers nothing for this long is dropped and resumed."""
SPARE_BYTES = 256 << 20
"""Left free on the disk beside the file."""
RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

Sleep = Callable[[float], Awaitable[None]]
FreeSpace = Callable[[Path], int]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class PullProgress:
    """One moment of a download, in bytes. `total` is None while unknown; `bytes_per_s` is over this run."""

    name: str
    done: int
    total: int | None
    bytes_per_s: float
    verifying: bool = False


def disk_free(directory: Path) -> int:
    """Bytes that may still be written in a directory that exists."""
    return shutil.disk_usage(directory).free


def no_space(directory: Path, needed: int, name: str, free: int) -> DownloadFailed:
    """The error of a disk that `name` does not fit on."""
    return DownloadFailed(
        f"{directory}: {gigabytes(needed)} needed for {name}, {gigabytes(free)} free; "
        "free disk space, or choose another directory with --data-dir"
    )


class _Interrupted(Exception):
    """The transfer stopped and may be continued; the message is for the error if it never is."""


def resolve_model(arg: str, models_dir: Path, catalogue: Catalogue) -> Path | CatalogueEntry:
    """What `serve ARG` means: a file that exists, a downloaded model, an entry that must be pulled first, or a model
    that comes with the package.

    A path is returned as it is, even a directory, so that reading it gives the exact error. Raises BadModel
    with suggestions when it is none of these.
    """
    entry = catalogue.get(arg)
    try:
        path = Path(arg).expanduser()
        if path.is_file() or (entry is None and path.exists()):
            return path
    except (OSError, RuntimeError) as error:
        # RuntimeError: "~name" of a user that does not exist.
        raise BadModel(f"{arg[:200]!r} cannot be looked up ({error}); check the path") from None
    if entry is None and arg in NAMES:
        return embedded_file(arg)
    if entry is None:
        if arg.lower().endswith(".gguf") or len(path.parts) > 1:
            raise BadModel(f"{path}: no such file; check the path, or see the known names with `swarmcpp models`")
        raise BadModel(f"{arg[:80]!r} is neither a file nor a known model; {catalogue.suggest(arg)}")
    downloaded = models_dir / entry.file
    return downloaded if downloaded.is_file() else entry


async def pull(
    entry: CatalogueEntry,
    directory: Path,
    *,
    progress: Callable[[PullProgress], None],
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
    free_space: FreeSpace = disk_free,
) -> Path:
    """Download `entry` into `directory` and return the file; at once when it is there already.

    An interrupted download is continued, also by a later call, unless the file on the server has changed.
    Raises DownloadFailed: names the URL or path, what went wrong and what to do. A part that is worth
    continuing stays in NAME.part; one that failed its check is removed.
    """
    final = directory / entry.file
    if final.is_file():
        return final
    try:
        with locked(final):
            async with http_session() as session:
                transfer = _Transfer(entry, final, session, progress, clock, free_space)
                await transfer.run(sleep)
                return await transfer.finish()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DownloadFailed(f"{final}: cannot be written ({reason}); check the directory and the disk") from None


def http_session() -> aiohttp.ClientSession:
    """A session for files of any size, to be closed by the caller. Needs a running event loop."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
    return aiohttp.ClientSession(timeout=timeout, trust_env=True)


def request_headers(url: str, token: str | None) -> dict[str, str]:
    """Headers for `url`; a Hugging Face token goes to Hugging Face only, and only over TLS.

    aiohttp drops the Authorization header itself when a redirect leaves the host.
    """
    # Bytes must arrive as they are on the server: offsets and sizes count those.
    headers = {"Accept-Encoding": "identity"}
    parts = urlsplit(url)
    host = parts.hostname or ""
    trusted = host == "huggingface.co" or host.endswith(".huggingface.co")
    if token and parts.scheme == "https" and trusted:
        headers["Authorization"] = f"Bearer {token}"
    return headers


class _Transfer:
    """One pull: repeated requests until the part is whole."""

    def __init__(
        self,
        entry: CatalogueEntry,
        final: Path,
        session: aiohttp.ClientSession,
        progress: Callable[[PullProgress], None],
        clock: Clock,
        free_space: FreeSpace,
    ) -> None:
        self._entry = entry
        self._part = PartialFile(final)
        self._session = session
        self._progress = progress
        self._clock = clock
        self._free_space = free_space
        self._started = clock()
        self._received = 0

    async def run(self, sleep: Sleep) -> None:
        """Fetch until whole. Failures are counted anew whenever the part has grown beyond what it ever was."""
        failures, furthest = 0, self._part.size
        while True:
            try:
                return await self._request()
            except (_Interrupted, aiohttp.ClientError, TimeoutError) as error:
                # Not "received anything": a server without ranges that always drops would be asked for ever.
                if self._part.size > furthest:
                    failures, furthest = 0, self._part.size
                if failures == len(BACKOFF_S):
                    raise self._failed(_reason(error), "check the network and run the same command again") from None
                await sleep(BACKOFF_S[failures])
                failures += 1

    async def finish(self) -> Path:
        """Check the whole part and give it its name."""
        part, entry = self._part, self._entry
        if part.start(len(MAGIC)) != MAGIC:
            part.discard()
            raise self._failed("what came is not a GGUF file", "open the URL in a browser: it may want a login")
        if entry.sha256 is not None:
            self._progress(PullProgress(entry.name, part.size, part.size, self._rate(), verifying=True))
            digest = await asyncio.to_thread(part.sha256)
            if digest != entry.sha256:
                part.discard()
                raise self._failed(
                    f"SHA-256 is {digest}, expected {entry.sha256}", "the partial file was removed: pull again"
                )
        return await asyncio.to_thread(part.commit)

    async def _request(self) -> None:
        known = self._part.resumable(self._entry.url)
        if known is not None and known.size == self._part.size:
            return
        headers = request_headers(self._entry.url, os.environ.get("HF_TOKEN"))
        if known is not None:
            headers |= {"Range": f"bytes={self._part.size}-", "If-Range": known.validator}
        async with self._session.get(self._entry.url, headers=headers) as response:
            self._check_status(response, ranged=known is not None)
            append = response.status == 206
            source = self._source(response, known if append else None)
            self._check_space(source, self._part.size if append else 0)
            with self._part.open(source, append=append) as file:
                await self._receive(response, source, file)
        self._check_whole(source)

    def _check_status(self, response: aiohttp.ClientResponse, *, ranged: bool) -> None:
        status = response.status
        if status == 200 or (status == 206 and ranged):
            return
        if status == 416:
            # The part is longer than what is there now, or its sidecar lied: start again.
            self._part.discard()
            raise _Interrupted("the server has no such range of the file")
        if status in RETRY_STATUSES:
            raise _Interrupted(f"the server answers {status} {response.reason}")
        raise self._failed(f"HTTP {status} {response.reason}", _remedy(status))

    def _source(self, response: aiohttp.ClientResponse, known: Source | None) -> Source:
        """What the response's bytes belong to; checks that a continuation starts where the part ends."""
        if known is None:
            return Source(self._entry.url, _validator(response), response.content_length)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        size = int(match[2]) if match is not None and match[2] != "*" else known.size
        if match is None or int(match[1]) != self._part.size or size != known.size:
            self._part.discard()
            raise _Interrupted("the server sent another range than was asked for")
        return known

    def _check_space(self, source: Source, have: int) -> None:
        directory = self._part.final.parent
        # A part that is about to be replaced gives its bytes back.
        free = self._free_space(directory) + (0 if have else self._part.size)
        needed = (source.size or self._entry.size_hint) - have + SPARE_BYTES
        if needed > free:
            raise no_space(directory, needed, self._entry.file, free)

    async def _receive(self, response: aiohttp.ClientResponse, source: Source, file: BinaryIO) -> None:
        done = file.tell()
        self._report(done, source)
        async for chunk in response.content.iter_chunked(CHUNK):
            file.write(chunk)
            done += len(chunk)
            self._received += len(chunk)
            self._report(done, source)

    def _check_whole(self, source: Source) -> None:
        size = self._part.size
        if source.size is not None and size < source.size:
            raise _Interrupted(f"the connection ended at {size} of {source.size} bytes")
        if source.size is not None and size > source.size:
            self._part.discard()
            raise _Interrupted(f"the server sent {size} bytes instead of {source.size}")

    def _report(self, done: int, source: Source) -> None:
        self._progress(PullProgress(self._entry.name, done, source.size, self._rate()))

    def _rate(self) -> float:
        elapsed = self._clock() - self._started
        return self._received / elapsed if elapsed > 0 else 0.0

    def _failed(self, what: str, remedy: str) -> DownloadFailed:
        return DownloadFailed(f"{self._entry.url}: {what}; {remedy}")


def _validator(response: aiohttp.ClientResponse) -> str:
    """What If-Range may carry (RFC 9110, 13.1.5): a strong ETag, else the date of the file, else nothing."""
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified", "")


def _remedy(status: int) -> str:
    if status in (401, 403):
        return (
            "the repository is gated, private or gone: accept its licence on the model's page and set HF_TOKEN to an "
            "access token of your account"
        )
    if status in (404, 410):
        return "the file is gone: update swarmcpp, or correct the url in models.toml"
    return "check the url in models.toml, or try again later"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
