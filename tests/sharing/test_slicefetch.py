"""Slices from parts: only what the layers need, from peers that have some of it, from a URL, again after a kill."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from model_peers import Fault, Peer, Time
from split_models import write_split

from swarmcpp.core import Rows
from swarmcpp.errors import BadConfig, BadModel, BadRequest, DownloadFailed
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.llama.stage import EmbeddingTable, StageContext, StageRows
from swarmcpp.models import manifest as manifest_module
from swarmcpp.models.download import SPARE_BYTES, PullProgress
from swarmcpp.models.manifest import manifest_of
from swarmcpp.models.modelfiles import chunks_of
from swarmcpp.models.slicestore import SliceFiles, SliceStore
from swarmcpp.models.slicing import embedding_range, slice_ranges, write_slice
from swarmcpp.models.synthetic import Shape, write_model
from swarmcpp.sharing.modelfetch import fetch_parts
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.sharing.slicefetch import obtain_slice
from swarmcpp.sharing.transfer import PATIENCE_S
from swarmcpp.wire.peers import Caller, GetChunk

CHUNK = 4096
N_LAYERS = 6
SHAPE = Shape("random", "llama", N_LAYERS, 64, 4, 2, 128, 512, 512)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", CHUNK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("whole") / "m.gguf", SHAPE, quant="Q8_0")


class Node(Time):
    """A node without the model, in its own data directory."""

    def __init__(self, files: Sequence[Path], directory: Path) -> None:
        super().__init__()
        self.files = files
        self.manifest = manifest_of(files, directory / "cache")
        self.store = SliceStore(directory)
        self.server = ModelServer()
        self.reports: list[PullProgress] = []
        self.rejected: list[Caller] = []

    def whole_peer(self, fault: Fault = lambda _, data: data) -> Peer:
        server = ModelServer()
        server.offer(self.manifest, self.files)
        return Peer(server, fault)

    def chunks(self, first: int, last: int, *, embedding: bool) -> set[int]:
        """What a slice takes of the whole model."""
        ranges = slice_ranges(self.files[0], first, last)
        return chunks_of(self.manifest, (*ranges, *([embedding_range(self.files[0])] if embedding else [])))

    async def obtain(
        self,
        first: int,
        last: int,
        *peers: Peer,
        embedding: bool = False,
        url: str | None = None,
        free: int = 10**12,
    ) -> SliceFiles:
        self.begin()
        return await asyncio.wait_for(
            obtain_slice(
                self.manifest,
                first,
                last,
                embedding=embedding,
                callers=lambda: peers,
                store=self.store,
                progress=self.reports.append,
                rejected=self.rejected.append,
                url=url,
                clock=lambda: self.now,
                sleep=self.sleep,
                free_space=lambda _: free,
            ),
            30,
        )

    def check(self, found: SliceFiles, first: int, last: int, scratch: Path) -> None:
        """The slice is the one that is made from the whole file."""
        expected = write_slice(self.files[0], first, last, scratch, fingerprint=self.manifest.fingerprint)
        assert found.slice.read_bytes() == expected.read_bytes()
        assert found.slice == self.store.path_of(self.manifest, first, last)


@pytest.fixture
def node(model: Path, tmp_path: Path) -> Node:
    return Node([model], tmp_path)


# -- from peers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 4), (5, 6), (0, 6)])
async def test_only_what_the_layers_need_is_fetched(
    node: Node, tmp_path: Path, first: int, last: int, embedding: bool
) -> None:
    peers = [node.whole_peer(), node.whole_peer()]
    found = await node.obtain(first, last, *peers, embedding=embedding)
    node.check(found, first, last, tmp_path / "expected.gguf")
    asked = [index for peer in peers for index in peer.asked]
    assert sorted(asked) == sorted(node.chunks(first, last, embedding=embedding))
    assert last - first > 2 or len(asked) < 0.7 * node.manifest.n_chunks
    assert found.source.stat().st_size == node.manifest.size
    assert (node.reports[-1].done, node.reports[-1].total) == (node.reports[-1].total, node.reports[-1].done)
    assert list((tmp_path / "slices").iterdir()) == [found.slice]


async def test_what_is_there_is_not_fetched_again(node: Node, tmp_path: Path) -> None:
    first = await node.obtain(0, 2, node.whole_peer(), embedding=True)
    changed = first.slice.stat().st_mtime_ns
    assert await node.obtain(0, 2, embedding=True, free=0) == first
    assert first.slice.stat().st_mtime_ns == changed
    # A damaged slice is made again from its parts, without anybody.
    first.slice.write_bytes(first.slice.read_bytes()[:-CHUNK])
    node.check(await node.obtain(0, 2), 0, 2, tmp_path / "expected.gguf")
    # Another slice takes only what its own layers need.
    peer = node.whole_peer()
    await node.obtain(1, 3, peer)
    assert set(peer.asked) == node.chunks(1, 3, embedding=False) - node.chunks(0, 2, embedding=True)


async def test_a_damaged_chunk_is_fetched_again(node: Node, tmp_path: Path) -> None:
    found = await node.obtain(0, 2, node.whole_peer())
    found.slice.unlink()
    hurt = sorted(node.chunks(0, 2, embedding=False))[-1]
    data = bytearray(found.source.read_bytes())
    data[hurt * CHUNK + 3] ^= 0xFF
    found.source.write_bytes(data)
    peer = node.whole_peer()
    node.check(await node.obtain(0, 2, peer), 0, 2, tmp_path / "expected.gguf")
    assert peer.asked == [hurt]


async def test_files_of_a_split(model: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    node = Node(write_split(model, tmp_path / "source", 3), tmp_path)
    for first, last in [(1, 3), (4, 6)]:
        found = await node.obtain(first, last, node.whole_peer(), embedding=True)
        node.check(found, first, last, tmp_path / "expected.gguf")
    assert len(EmbeddingTable(found.source).rows([0, 511])) == 2


async def test_a_liar_is_asked_no_more(node: Node, tmp_path: Path) -> None:
    liar, honest = node.whole_peer(lambda _, data: bytes(len(data))), node.whole_peer()
    node.check(await node.obtain(2, 4, liar, honest), 2, 4, tmp_path / "expected.gguf")
    assert node.rejected == [liar]


async def test_space_is_needed_for_parts_and_slice(node: Node) -> None:
    needed = len(node.chunks(0, 3, embedding=False)) * CHUNK
    with pytest.raises(DownloadFailed, match=r"needed for m\.gguf, .* free"):
        await node.obtain(0, 3, node.whole_peer(), free=SPARE_BYTES + needed + CHUNK)
    await node.obtain(0, 3, node.whole_peer(), free=SPARE_BYTES + 2 * needed)


async def test_layers_that_the_model_has_not(node: Node) -> None:
    with pytest.raises(BadConfig, match="0 <= A < B <= 6"):
        await node.obtain(3, 7, node.whole_peer())


async def test_what_is_no_model_costs_no_more_than_its_header(node: Node, tmp_path: Path) -> None:
    """A swarm may offer anything under a fingerprint."""
    data = bytearray(node.files[0].read_bytes())
    at = data.index(b"blk.1.attn_norm.weight")
    data[at - 8 : at] = (1 << 40).to_bytes(8, "little")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    other = Node([bad], tmp_path)
    peer = other.whole_peer()
    with pytest.raises(BadModel, match=r"bad\.gguf: has \d+ bytes in the name of tensor"):
        await other.obtain(0, 2, peer)
    assert len(peer.asked) <= at // CHUNK + 3


# -- holders of parts ----------------------------------------------------------------------------------------------


async def holder(node: Node, chunks: set[int], directory: Path) -> Peer:
    """A peer that has only `chunks`."""
    parts = await fetch_parts(
        node.manifest,
        directory,
        lambda: [node.whole_peer()],
        chunks,
        progress=lambda _: None,
        rejected=node.rejected.append,
        free_space=lambda _: 10**12,
    )
    server = ModelServer()
    server.offer_parts(parts)
    return Peer(server)


async def test_holders_of_parts_give_what_they_have(node: Node, tmp_path: Path) -> None:
    chunks = set(range(node.manifest.n_chunks))
    halves = [{index for index in chunks if index % 2 == odd} for odd in (0, 1)]
    peers = [await holder(node, half, tmp_path / str(odd)) for odd, half in enumerate(halves)]
    node.check(await node.obtain(1, 4, *peers), 1, 4, tmp_path / "expected.gguf")
    assert node.rejected == []
    assert all(set(peer.asked) <= half and peer.refused for peer, half in zip(peers, halves, strict=True))


async def test_what_a_holder_lacks_is_not_its_fault(node: Node, tmp_path: Path) -> None:
    """Nor is it asked twice for one chunk, and it goes on giving what it has."""
    have = node.chunks(4, 6, embedding=False)
    some, whole = await holder(node, have, tmp_path / "some"), node.whole_peer()
    node.check(await node.obtain(0, 6, some, whole), 0, 6, tmp_path / "expected.gguf")
    assert node.rejected == []
    assert some.refused <= node.manifest.n_chunks - len(have)
    assert len(some.asked) > 10


async def test_what_nobody_has_is_a_failure(node: Node, tmp_path: Path) -> None:
    peer = await holder(node, node.chunks(0, 2, embedding=False), tmp_path / "some")
    with pytest.raises(DownloadFailed, match=r"no peer is left .*chunk \d+ of model .* is not held here"):
        await node.obtain(1, 3, peer)
    assert node.now > PATIENCE_S
    # What could be had is there.
    whole = node.whole_peer()
    await node.obtain(1, 3, whole)
    assert set(whole.asked) == node.chunks(1, 3, embedding=False) - node.chunks(0, 2, embedding=False)


@pytest.fixture
def first_chunk(model: Path) -> bytes:
    return model.read_bytes()[:CHUNK]


async def test_a_node_serves_what_it_has_so_far(node: Node, first_chunk: bytes) -> None:
    node.server.offer_parts(node.store.parts(node.manifest))
    fingerprint = node.manifest.fingerprint
    with pytest.raises(BadRequest, match="chunk 0 of model"):
        await node.server.answer(GetChunk(fingerprint, 0))
    found = await node.obtain(0, 1, node.whole_peer())
    _, (data,) = await node.server.answer(GetChunk(fingerprint, 0))
    assert data == first_chunk
    # Nothing damaged is given, and what is offered whole stays so.
    found.source.write_bytes(bytes(node.manifest.size))
    with pytest.raises(BadRequest, match="chunk 0 of model"):
        await node.server.answer(GetChunk(fingerprint, 0))
    node.server.offer(node.manifest, node.files)
    node.server.offer_parts(node.store.parts(node.manifest))
    assert (await node.server.answer(GetChunk(fingerprint, 0)))[1] == [data]


# -- from a URL ----------------------------------------------------------------------------------------------------


@dataclass
class FileHost:
    """A file server; one item of `statuses` is used up by each request."""

    content: bytes
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
        assert match is not None
        start, end = int(match[1]), int(match[2])
        self.asked.append(start // CHUNK)
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return web.Response(status=status)
        if not self.ranges:
            return web.Response(body=self.content)
        body = self.content[start : end + 1]
        if not body:
            return web.Response(status=416)
        found = f"bytes {start}-{start + len(body) - 1}/{len(self.content)}"
        return web.Response(status=206, body=body, headers={"Content-Range": found})


@pytest.fixture
def host(model: Path) -> FileHost:
    return FileHost(model.read_bytes())


@pytest.fixture
async def url(host: FileHost) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/m.gguf", host.handle)
    async with TestServer(app) as server:
        yield str(server.make_url("/m.gguf"))


async def test_without_peers_it_comes_by_http_range(node: Node, host: FileHost, url: str, tmp_path: Path) -> None:
    host.statuses = [200, 503, 200, 429]
    found = await node.obtain(2, 4, url=url, embedding=True)
    node.check(found, 2, 4, tmp_path / "expected.gguf")
    assert set(host.asked) == node.chunks(2, 4, embedding=True)


async def test_the_url_gives_only_what_no_peer_has(node: Node, host: FileHost, url: str, tmp_path: Path) -> None:
    have = node.chunks(0, 2, embedding=False)
    peer = await holder(node, have, tmp_path / "some")
    node.check(await node.obtain(0, 4, peer, url=url), 0, 4, tmp_path / "expected.gguf")
    assert set(host.asked) == node.chunks(0, 4, embedding=False) - have
    host.asked.clear()
    await node.obtain(4, 6, node.whole_peer(), url=url)
    assert host.asked == []


def _grown(host: FileHost) -> None:
    host.content += b"more"


def _another(host: FileHost) -> None:
    host.content = bytes(len(host.content))


def _without_ranges(host: FileHost) -> None:
    host.ranges = False


def _gone(host: FileHost) -> None:
    host.statuses = [404] * 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_grown, "has another file now"),
        (_another, "what its URL has now is another model"),
        (_without_ranges, "gives whole files only"),
        (_gone, "HTTP 404"),
    ],
)
async def test_a_url_that_cannot_be_used(
    node: Node, host: FileHost, url: str, change: Callable[[FileHost], None], reason: str
) -> None:
    change(host)
    with pytest.raises(DownloadFailed, match=f"no peer is left .*{reason}") as caught:
        await node.obtain(0, 1, url=url)
    assert "\n" not in str(caught.value)
    assert len(host.asked) <= 4
    assert node.rejected == []


# -- interrupted ---------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from pathlib import Path
from model_peers import Peer
from swarmcpp.models import manifest as manifest_module
from swarmcpp.models.slicestore import SliceStore
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.sharing.slicefetch import obtain_slice

model, directory, chunk, stop_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
manifest_module.CHUNK_BYTES = chunk
manifest = manifest_module.manifest_of([model], directory / "cache")
server = ModelServer()
server.offer(manifest, [model])
given = []

def until(message, data):
    if len(given) == stop_at:
        return None
    given.append(message.index)
    return data

def watch(report):
    if len(given) == stop_at and not report.verifying:
        print("stopped", flush=True)

peer = Peer(server, until)
asyncio.run(
    obtain_slice(
        manifest, 1, 3, embedding=False, callers=lambda: [peer], store=SliceStore(directory), progress=watch,
        rejected=print,
    )
)
"""


@pytest.mark.e2e
@pytest.mark.parametrize("stop_at", [1, 9, 20])
async def test_a_killed_transfer_goes_on_where_it_was(node: Node, model: Path, tmp_path: Path, stop_at: int) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(model), str(tmp_path), str(CHUNK), str(stop_at)),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"stopped\n"
    child.kill()
    await child.wait()
    peer = node.whole_peer()
    node.check(await node.obtain(1, 3, peer), 1, 3, tmp_path / "expected.gguf")
    wanted = node.chunks(1, 3, embedding=False)
    # The newest may have been given, but not yet written.
    assert len(wanted) - stop_at <= len(peer.asked) <= len(wanted) - stop_at + 4
    assert set(peer.asked) <= wanted


# -- what the slices compute -----------------------------------------------------------------------------------------


async def test_stages_from_parts_compute_what_the_model_does(node: Node, model: Path) -> None:
    options = ContextOptions(n_ctx=256, n_seqs=1, n_threads=1)
    tokens = [index * 7 % 512 for index in range(70)]
    whole = Model(model, use_extra_bufts=False)
    context = Context(whole, options)
    backend = LlamaBackend(whole, context)
    backend.decode([Rows(0, 0, tokens, outputs=1)])
    cuts = [0, 2, 5, 6]
    found = [await node.obtain(a, b, node.whole_peer(), embedding=a == 0) for a, b in pairwise(cuts)]
    assert [each.embedding for each in found] == [True, False, False]
    rows = EmbeddingTable(found[0].source).rows(tokens)
    for files, last in zip(found, cuts[1:], strict=True):
        part = Model(files.slice, use_extra_bufts=False)
        stage = StageContext(part, options, is_tail=last == N_LAYERS)
        rows = stage.decode([StageRows(0, 0, rows, outputs=1)])
        if last == N_LAYERS:
            np.testing.assert_array_equal(stage.logits(0), backend.logits(0))
        stage.close()
        part.close()
    context.close()
    whole.close()
