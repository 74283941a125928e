"""pull() against a real HTTP server that drops connections, changes files and refuses."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from swarmcpp.errors import DownloadFailed
from swarmcpp.models.catalogue import CatalogueEntry
from swarmcpp.models.download import BACKOFF_S, PullProgress, pull, request_headers

CONTENT = b"GGUF" + bytes(i * 7 % 251 for i in range(1_000_000))
PLENTY = 10**12


@dataclass
class FileHost:
    """A file server with faults. One item of `drops` and `statuses` is used up by each request."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    drops: list[int | None] = field(default_factory=list)
    """Bytes of the body after which the connection is cut."""
    statuses: list[int] = field(default_factory=list)
    shift: int = 0
    """Bytes by which a range's answer is wrong."""
    sized: bool = True
    requests: list[dict[str, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.headers))
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return web.Response(status=status)
        start = self._start(request)
        if start is not None and start >= len(self.content):
            return web.Response(status=416)
        response = web.StreamResponse(status=200 if start is None else 206)
        if self.etag:
            response.headers["ETag"] = self.etag
        if self.modified:
            response.headers["Last-Modified"] = self.modified
        body = self.content[start or 0 :]
        if start is not None:
            response.headers["Content-Range"] = (
                f"bytes {start + self.shift}-{len(self.content) - 1}/{len(self.content)}"
            )
        if self.sized:
            response.content_length = len(body)
        await response.prepare(request)
        drop = self.drops.pop(0) if self.drops else None
        await response.write(body[:drop])
        if self.gate is not None:
            await self.gate.wait()
        if drop is not None:
            assert request.transport is not None
            request.transport.close()
        return response

    def _start(self, request: web.Request) -> int | None:
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        fresh = request.headers.get("If-Range") in (self.etag, self.modified)
        return int(match[1]) if match and self.ranges and fresh else None


@pytest.fixture
def host() -> FileHost:
    return FileHost()


@pytest.fixture
async def entry(host: FileHost) -> AsyncIterator[CatalogueEntry]:
    app = web.Application()
    app.router.add_get("/m.gguf", host.handle)
    server = TestServer(app)
    await server.start_server()
    yield entry_at(str(server.make_url("/m.gguf")))
    if host.gate is not None:
        host.gate.set()
    await server.close()


def entry_at(url: str) -> CatalogueEntry:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return CatalogueEntry("m", "M", url, "m.gguf", "Q8_0", len(CONTENT), 2048, "1B", "MIT", sha256=digest)


class Run:
    """One pull with its progress and its waits."""

    def __init__(self, directory: Path, free: int = PLENTY) -> None:
        self.directory = directory
        self.progress: list[PullProgress] = []
        self.slept: list[float] = []
        self._free = free
        self._now = 0.0

    async def __call__(self, entry: CatalogueEntry) -> Path:
        return await pull(
            entry,
            self.directory,
            progress=self.progress.append,
            clock=self._clock,
            sleep=self._sleep,
            free_space=lambda _: self._free,
        )

    def _clock(self) -> float:
        self._now += 0.5
        return self._now

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir() if path.name != "m.gguf")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "models")


async def refusal(run: Run, entry: CatalogueEntry) -> str:
    with pytest.raises(DownloadFailed) as caught:
        await run(entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_downloads(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    path = await run(entry)
    assert path == run.directory / "m.gguf"
    assert path.read_bytes() == CONTENT
    assert run.leftovers() == []
    done = [step.done for step in run.progress]
    assert done[0] == 0
    assert done == sorted(done)
    last = run.progress[-1]
    assert (last.done, last.total, last.verifying) == (len(CONTENT), len(CONTENT), True)
    assert last.bytes_per_s > 0
    assert await run(entry) == path
    assert len(host.requests) == 1


async def test_continues_after_a_drop(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.drops = [300_000, 200_000]
    path = await run(entry)
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in host.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert host.requests[1]["If-Range"] == '"v1"'
    assert run.slept == [BACKOFF_S[0]] * 2


async def test_a_later_call_continues(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.drops, host.statuses = [300_000], [200] + [500] * 10
    message = await refusal(run, entry)
    assert entry.url in message
    assert "500" in message
    assert run.slept == list(BACKOFF_S)
    assert run.leftovers() == ["m.gguf.part", "m.gguf.part.json"]
    host.statuses.clear()
    host.requests.clear()
    assert (await run(entry)).read_bytes() == CONTENT
    assert [request.get("Range") for request in host.requests] == ["bytes=300000-"]
    assert run.leftovers() == []


async def test_a_changed_file_starts_again(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.drops, host.statuses = [300_000], [200, 404]
    await refusal(run, entry)
    host.etag, host.content = '"v2"', b"GGUF" + bytes(500_000)
    changed = replace(entry, sha256=hashlib.sha256(host.content).hexdigest())
    assert (await run(changed)).read_bytes() == host.content


async def test_another_url_starts_again(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.drops, host.statuses = [300_000], [200, 404]
    await refusal(run, entry)
    assert (await run(replace(entry, url=entry.url + "?v=2"))).read_bytes() == CONTENT
    assert "Range" not in host.requests[-1]


@pytest.mark.parametrize(("etag", "modified"), [('W/"weak"', None), (None, None)])
async def test_without_validator_starts_again(
    host: FileHost, entry: CatalogueEntry, run: Run, etag: str | None, modified: str | None
) -> None:
    host.etag, host.modified, host.drops = etag, modified, [300_000]
    assert (await run(entry)).read_bytes() == CONTENT
    assert all("Range" not in request for request in host.requests)


async def test_continues_by_date(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.etag, host.modified, host.drops = None, "Wed, 21 Oct 2015 07:28:00 GMT", [300_000]
    assert (await run(entry)).read_bytes() == CONTENT
    assert host.requests[1]["If-Range"] == host.modified


async def test_server_without_ranges(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.ranges, host.drops = False, [300_000]
    assert (await run(entry)).read_bytes() == CONTENT


async def test_gives_up_on_a_server_that_always_drops(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.ranges, host.drops = False, [300_000] * 100
    assert "check the network" in await refusal(run, entry)
    assert len(host.requests) == len(BACKOFF_S) + 1


async def test_wrong_range_starts_again(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.drops, host.shift = [300_000], 5
    assert (await run(entry)).read_bytes() == CONTENT
    assert [request.get("Range") for request in host.requests] == [None, "bytes=300000-", None]


async def test_size_unknown(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.sized = False
    assert (await run(entry)).read_bytes() == CONTENT
    assert run.progress[0].total is None


async def test_wrong_hash(entry: CatalogueEntry, run: Run) -> None:
    message = await refusal(run, replace(entry, sha256="0" * 64))
    assert "SHA-256 is" in message
    assert f"expected {'0' * 64}" in message
    assert run.leftovers() == []
    assert not (run.directory / "m.gguf").exists()


async def test_not_a_gguf(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.content = b"<!doctype html><title>Log in</title>"
    assert "not a GGUF file" in await refusal(run, replace(entry, sha256=None))
    assert run.leftovers() == []


async def test_disk_full(host: FileHost, entry: CatalogueEntry, tmp_path: Path) -> None:
    run = Run(tmp_path / "models", free=5_000_000)
    message = await refusal(run, entry)
    assert re.search(r"models: 27\d MB needed for m.gguf, 5 MB free; free disk space", message)
    assert run.leftovers() == []


async def test_directory_that_cannot_be_made(entry: CatalogueEntry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in await refusal(Run(tmp_path / "file" / "models"), entry)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "the file is gone"), (400, "check the url")]
)
async def test_refusals(host: FileHost, entry: CatalogueEntry, run: Run, status: int, remedy: str) -> None:
    host.statuses = [status]
    message = await refusal(run, entry)
    assert message.startswith(f"{entry.url}: HTTP {status}")
    assert remedy in message
    assert len(host.requests) == 1
    assert run.leftovers() == []


async def test_busy_server_is_asked_again(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.statuses = [503, 429]
    assert (await run(entry)).read_bytes() == CONTENT
    assert run.slept == list(BACKOFF_S[:2])


async def test_nobody_listens(run: Run) -> None:
    message = await refusal(run, entry_at(f"http://127.0.0.1:{unused_port()}/m.gguf"))
    assert "check the network" in message
    assert run.slept == list(BACKOFF_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in a server
            await asyncio.sleep(0.005)


async def test_two_at_once_and_cancel(host: FileHost, entry: CatalogueEntry, run: Run) -> None:
    host.gate, host.drops = asyncio.Event(), [300_000]
    first = asyncio.create_task(run(entry))
    await until(lambda: bool(run.progress) and run.progress[-1].done == 300_000)
    assert "another swarmcpp is downloading it" in await refusal(Run(run.directory), entry)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert run.leftovers() == ["m.gguf.part", "m.gguf.part.json"]
    host.gate.set()
    assert (await run(entry)).read_bytes() == CONTENT
    assert host.requests[-1]["Range"] == "bytes=300000-"


async def test_a_damaged_sidecar_starts_again(entry: CatalogueEntry, run: Run) -> None:
    run.directory.mkdir()
    (run.directory / "m.gguf.part").write_bytes(b"old")
    for sidecar in ("", "[]", "{}", '{"url": "x", "validator": "y", "size": "z"}', "\udcff"):
        (run.directory / "m.gguf").unlink(missing_ok=True)
        (run.directory / "m.gguf.part.json").write_bytes(sidecar.encode("utf-8", "surrogateescape"))
        assert (await run(entry)).read_bytes() == CONTENT


async def test_token_stays_at_home(
    host: FileHost, entry: CatalogueEntry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await run(entry)
    assert "Authorization" not in host.requests[0]


def test_token_goes_to_hugging_face_only() -> None:
    def sent(url: str) -> bool:
        return request_headers(url, "hf_secret").get("Authorization") == "Bearer hf_secret"

    assert sent("https://huggingface.co/a/b/resolve/main/c.gguf")
    assert sent("https://cdn.huggingface.co/x")
    assert not sent("http://huggingface.co/x")
    assert not sent("https://huggingface.co.example.org/x")
    assert not sent("https://nothuggingface.co/x")
    assert "Authorization" not in request_headers("https://huggingface.co/x", None)
