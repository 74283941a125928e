"""Models from peers: liars, slow and dying holders, interruptions, names and full disks."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from model_peers import Peer, Time

from swarmcpp.errors import BadRequest, DownloadFailed, NotReady, PeerLost, PeerTimeout, SwarmError
from swarmcpp.models import manifest as manifest_module
from swarmcpp.models.download import SPARE_BYTES, PullProgress
from swarmcpp.models.manifest import Manifest, ManifestFile, manifest_of
from swarmcpp.models.modelfiles import find_local
from swarmcpp.models.partial import locked
from swarmcpp.sharing.modelfetch import fetch_model, get_manifest
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.sharing.transfer import FIRST_WINDOW, PATIENCE_S, WINDOW
from swarmcpp.wire.peers import Ask, Caller, ChunkReply, GetChunk, GetManifest, ManifestReply, Pong, Reply

CHUNK = 1000
N_CHUNKS = 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", CHUNK)


class Swarm(Time):
    """A model, its server, and a directory to fetch it into."""

    def __init__(self, directory: Path, sizes: Sequence[int] = (N_CHUNKS * CHUNK - 7,)) -> None:
        super().__init__()
        self.source, self.target, self.cache = directory / "source", directory / "target", directory / "cache"
        self.source.mkdir()
        names = (
            ["m.gguf"] if len(sizes) == 1 else [f"m-{n:05d}-of-{len(sizes):05d}.gguf" for n in range(1, 1 + len(sizes))]
        )
        self.files = [self.source / name for name in names]
        for path, size in zip(self.files, sizes, strict=True):
            path.write_bytes(random.Random(size).randbytes(size))
        self.manifest = manifest_of(self.files, self.cache)
        self.server = ModelServer()
        self.server.offer(self.manifest, self.files)
        self.reports: list[PullProgress] = []
        self.rejected: list[Caller] = []

    async def fetch(
        self,
        *peers: Peer,
        free: int = 10**12,
        holders: Callable[[], Sequence[Caller]] | None = None,
        progress: Callable[[PullProgress], None] | None = None,
    ) -> tuple[Path, ...]:
        self.begin()
        return await asyncio.wait_for(
            fetch_model(
                self.manifest,
                self.target,
                holders or (lambda: peers),
                progress=progress or self.reports.append,
                rejected=self.rejected.append,
                clock=lambda: self.now,
                sleep=self.sleep,
                free_space=lambda _: free,
            ),
            30,
        )

    def check(self, files: Sequence[Path]) -> None:
        """All files are there, the same, and nothing else is."""
        assert [path.read_bytes() for path in files] == [path.read_bytes() for path in self.files]
        left = {path.name for path in self.target.iterdir() if not path.name.endswith(".lock")}
        assert left == {path.name for path in files}


@pytest.fixture
def swarm(tmp_path: Path) -> Swarm:
    return Swarm(tmp_path)


async def test_several_holders_share_the_work(swarm: Swarm) -> None:
    """Nobody answers before all have been asked for two chunks, nor after that before all owe four."""
    peers = [Peer(swarm.server) for _ in range(3)]
    gates = {FIRST_WINDOW: asyncio.Event(), WINDOW: asyncio.Event()}

    async def all_are_asked(peer: Peer, message: GetChunk) -> None:
        window = FIRST_WINDOW if message.index in peer.asked[:FIRST_WINDOW] else WINDOW
        if all(each.busy == window for each in peers):
            gates[window].set()
        await gates[window].wait()

    for peer in peers:
        peer.ready = partial(all_are_asked, peer)
    swarm.check(await swarm.fetch(*peers))
    assert sorted(index for peer in peers for index in peer.asked) == list(range(N_CHUNKS))
    assert [peer.most for peer in peers] == [WINDOW] * 3
    assert swarm.rejected == []
    assert (swarm.reports[0].verifying, swarm.reports[-1].done) == (True, swarm.manifest.size)
    assert [one.done for one in swarm.reports] == sorted(one.done for one in swarm.reports)


async def test_what_is_there_is_not_fetched_again(swarm: Swarm) -> None:
    await swarm.fetch(Peer(swarm.server))
    swarm.check(await swarm.fetch(free=0))


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: bytes(len(data)),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
async def test_a_liar_is_asked_no_more(swarm: Swarm, lie: Callable[[bytes], bytes]) -> None:
    liar, honest = Peer(swarm.server, lambda _, data: lie(data)), Peer(swarm.server)
    swarm.check(await swarm.fetch(liar, honest))
    assert swarm.rejected == [liar]
    assert len(liar.asked) <= 4


async def test_a_wrong_kind_of_reply_is_a_lie(swarm: Swarm) -> None:
    class Confused(Peer):
        async def ask(
            self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
        ) -> tuple[Reply, list[memoryview]]:
            return Pong(), []

    confused = Confused(swarm.server)
    swarm.check(await swarm.fetch(confused, Peer(swarm.server)))
    assert swarm.rejected == [confused]


async def test_only_liars_is_a_failure_and_the_part_stays(swarm: Swarm) -> None:
    all_true = asyncio.Event()

    async def after_what_is_true(message: GetChunk) -> None:
        if message.index >= 10:
            await all_true.wait()

    def watch(report: PullProgress) -> None:
        if report.done == 10 * CHUNK:
            all_true.set()

    liar = Peer(swarm.server, lambda message, data: data if message.index < 10 else bytes(len(data)))
    liar.ready = after_what_is_true
    with pytest.raises(DownloadFailed, match=r"m\.gguf: .* no peer is left .*wrong bytes") as caught:
        await swarm.fetch(liar, progress=watch)
    assert "\n" not in str(caught.value)
    assert swarm.now > PATIENCE_S
    other = Peer(swarm.server)
    swarm.check(await swarm.fetch(other))
    assert sorted(other.asked) == list(range(10, N_CHUNKS))


async def test_a_peer_that_never_answers_does_not_hold_up_the_end(swarm: Swarm) -> None:
    stuck, good = Peer(swarm.server, lambda *_: None), Peer(swarm.server)
    swarm.check(await swarm.fetch(stuck, good))
    assert stuck.busy == 0
    assert swarm.now < 10
    assert swarm.rejected == []


@pytest.mark.parametrize("error", [PeerTimeout("late"), PeerLost("gone"), NotReady("changed"), BadRequest("what?")])
async def test_a_dying_peers_chunks_go_elsewhere(swarm: Swarm, error: SwarmError) -> None:
    left = [6]

    def dying(_: GetChunk, data: bytes) -> bytes | SwarmError:
        left[0] -= 1
        return data if left[0] > 0 else error

    swarm.check(await swarm.fetch(Peer(swarm.server, dying), Peer(swarm.server)))
    assert swarm.rejected == []


async def test_a_link_that_heals_is_used_again(swarm: Swarm) -> None:
    """The one holder fails for five seconds, twice."""
    cuts = [(0.5, 5.5), (7.0, 12.0)]

    def flaky(_: GetChunk, data: bytes) -> bytes | SwarmError:
        swarm.now += 0.05
        return PeerLost("gone") if any(start <= swarm.now < end for start, end in cuts) else data

    swarm.check(await swarm.fetch(Peer(swarm.server, flaky)))


async def test_all_that_breaks_together_is_one_failure(swarm: Swarm) -> None:
    """Seven failures of single requests would be the end of a holder; four of these happen at once."""

    class Broken(Peer):
        count = 0
        all_wait = asyncio.Event()

        async def ask(
            self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
        ) -> tuple[Reply, list[memoryview]]:
            self.count += 1
            if not 12 < self.count <= 19:
                return await super().ask(message, payload, timeout_s=timeout_s)
            if self.count == 16:
                self.all_wait.set()
            await self.all_wait.wait()
            raise PeerLost("gone")

    swarm.check(await swarm.fetch(Broken(swarm.server)))


async def test_a_holder_that_always_fails_is_given_up(swarm: Swarm) -> None:
    peer = Peer(swarm.server, lambda *_: PeerLost("the link\nbroke"))
    with pytest.raises(DownloadFailed, match=r"no peer is left .*the link broke"):
        await swarm.fetch(peer)
    assert len(peer.asked) < 20


async def test_holders_may_come_later(swarm: Swarm) -> None:
    late = Peer(swarm.server)
    swarm.check(await swarm.fetch(holders=lambda: [late] if swarm.now > PATIENCE_S / 2 else []))


async def test_a_fast_holder_that_comes_late_takes_over(swarm: Swarm) -> None:
    stuck, fast = Peer(swarm.server, lambda *_: None), Peer(swarm.server)
    swarm.check(await swarm.fetch(holders=lambda: [stuck, fast] if swarm.now > 3 else [stuck]))
    assert sorted(set(fast.asked)) == list(range(N_CHUNKS))


async def test_no_holder_at_all(swarm: Swarm) -> None:
    with pytest.raises(DownloadFailed, match=r"no peer is left .*none was found"):
        await swarm.fetch()


@pytest.mark.parametrize("seed", range(8))
async def test_a_cancelled_transfer_goes_on_where_it_was(swarm: Swarm, seed: int) -> None:
    chance = random.Random(seed)
    stop_at = chance.randrange(1, N_CHUNKS)
    given: set[int] = set()
    all_written = asyncio.Event()

    def until(message: GetChunk, data: bytes) -> bytes | None:
        if len(given) == stop_at:
            return None
        given.add(message.index)
        return data

    def watch(report: PullProgress) -> None:
        # The last chunk is shorter than the others.
        if report.done > (stop_at - 1) * CHUNK:
            all_written.set()

    task = asyncio.ensure_future(swarm.fetch(Peer(swarm.server, until), progress=watch))
    await asyncio.wait_for(all_written.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Damage to a chunk that is there, and nonsense after the end, are noticed.
    part = swarm.target / "m.gguf.part"
    data = bytearray(part.read_bytes())
    hurt = chance.choice(sorted(given))
    data[hurt * CHUNK + 3] ^= 0xFF
    part.write_bytes(bytes(data).ljust(swarm.manifest.size + 5, b"\0") if seed % 2 else bytes(data))
    again = Peer(swarm.server)
    swarm.check(await swarm.fetch(again))
    assert sorted(again.asked) == sorted({*range(N_CHUNKS)} - given | {hurt})


async def test_files_of_a_split_are_fetched_together(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, (3 * CHUNK, 1, 2 * CHUNK + 1))
    files = await swarm.fetch(Peer(swarm.server), Peer(swarm.server))
    swarm.check(files)
    assert [path.name for path in files] == [path.name for path in swarm.files]


async def test_a_name_that_is_taken_is_not_overwritten(swarm: Swarm) -> None:
    swarm.target.mkdir()
    other = swarm.target / "m.gguf"
    other.write_bytes(bytes(swarm.manifest.size))
    for _ in range(2):
        (file,) = await swarm.fetch(Peer(swarm.server))
        assert file.name == f"m-{swarm.manifest.fingerprint.hex()[:8]}.gguf"
        assert file.read_bytes() == swarm.files[0].read_bytes()
    assert other.read_bytes() == bytes(swarm.manifest.size)
    # Damage to a file with the fingerprint in its name is repaired.
    file.write_bytes(b"damaged")
    assert (await swarm.fetch(Peer(swarm.server)))[0].read_bytes() == swarm.files[0].read_bytes()


async def test_a_split_keeps_llama_cpps_names(tmp_path: Path) -> None:
    """Where a name is taken, and where a peer invented names."""
    swarm = Swarm(tmp_path, (CHUNK, CHUNK + 1))
    swarm.target.mkdir()
    (swarm.target / "m-00002-of-00002.gguf").write_bytes(b"another")
    files = await swarm.fetch(Peer(swarm.server))
    tag = swarm.manifest.fingerprint.hex()[:8]
    assert [path.name for path in files] == [f"m-{tag}-0000{n}-of-00002.gguf" for n in (1, 2)]
    swarm.manifest = Manifest(
        tuple(ManifestFile(f"x{n}.gguf", f.size, f.digests) for n, f in enumerate(swarm.manifest.files))
    )
    files = await swarm.fetch(Peer(swarm.server))
    assert [path.name for path in files] == [f"x0-0000{n}-of-00002.gguf" for n in (1, 2)]


async def test_a_part_of_a_download_is_taken_over(swarm: Swarm) -> None:
    swarm.target.mkdir()
    (swarm.target / "m.gguf.part").write_bytes(swarm.files[0].read_bytes()[: 10 * CHUNK])
    (swarm.target / "m.gguf.part.json").write_text("{}")
    peer = Peer(swarm.server)
    swarm.check(await swarm.fetch(peer))
    assert sorted(peer.asked) == list(range(10, N_CHUNKS))


async def test_two_transfers_do_not_write_one_file(swarm: Swarm) -> None:
    with locked(swarm.target / "m.gguf"), pytest.raises(DownloadFailed, match="another swarmcpp"):
        await swarm.fetch(Peer(swarm.server))
    swarm.check(await swarm.fetch(Peer(swarm.server)))


async def test_space_is_checked_before_anything_is_asked(swarm: Swarm) -> None:
    peer = Peer(swarm.server)
    with pytest.raises(DownloadFailed, match=r"needed for m\.gguf, .* free; free disk space"):
        await swarm.fetch(peer, free=SPARE_BYTES + swarm.manifest.size - 1)
    assert peer.asked == []
    swarm.check(await swarm.fetch(peer, free=SPARE_BYTES + swarm.manifest.size))


async def test_a_disk_that_cannot_be_written_is_named(swarm: Swarm) -> None:
    """The part disappears under the transfer: what any error of the disk looks like to it."""

    def remove(_: GetChunk, data: bytes) -> bytes:
        (swarm.target / "m.gguf.part").unlink(missing_ok=True)
        return data

    with pytest.raises(DownloadFailed, match=r"m\.gguf: cannot be written .* needed .* free") as caught:
        await swarm.fetch(Peer(swarm.server, remove))
    assert "\n" not in str(caught.value)


async def test_a_directory_that_cannot_be_made_is_named(swarm: Swarm) -> None:
    swarm.target.write_bytes(b"a file")
    with pytest.raises(DownloadFailed, match=r"cannot be written .*no such directory"):
        await swarm.fetch(Peer(swarm.server))


async def test_the_manifest_of_the_first_that_tells_the_truth(swarm: Swarm) -> None:
    class Other(Peer):
        def __init__(self, answer: tuple[Reply, list[memoryview]] | SwarmError) -> None:
            super().__init__(swarm.server)
            self.answer = answer

        async def ask(
            self, message: Ask, payload: Sequence[bytes] = (), *, timeout_s: float
        ) -> tuple[Reply, list[memoryview]]:
            if isinstance(self.answer, SwarmError):
                raise self.answer
            return self.answer

    false = Manifest((ManifestFile("m.gguf", 1, (bytes(32),)),)).to_bytes()
    wrong: list[Caller] = [
        Other(PeerTimeout("late")),
        Other(BadRequest("not here")),
        Other((ChunkReply(), [memoryview(swarm.manifest.to_bytes())])),
        Other((ManifestReply(), [])),
        Other((ManifestReply(), [memoryview(b"junk")])),
        Other((ManifestReply(), [memoryview(false)])),
    ]
    fingerprint = swarm.manifest.fingerprint
    assert await get_manifest([*wrong, Peer(swarm.server)], fingerprint, 1.0) == swarm.manifest
    with pytest.raises(DownloadFailed, match=fingerprint.hex()[:8]):
        await get_manifest(wrong, fingerprint, 1.0)
    with pytest.raises(DownloadFailed, match="nobody has it"):
        await get_manifest([], fingerprint, 1.0)


async def test_the_server_names_what_it_has_not(swarm: Swarm) -> None:
    with pytest.raises(BadRequest, match="model 0000") as caught:
        await swarm.server.answer(GetManifest(bytes(32)))
    assert caught.value.param == "fingerprint"
    for index in (N_CHUNKS, 2**32):
        with pytest.raises(BadRequest, match=f"chunk {index} of a model with {N_CHUNKS}"):
            await swarm.server.answer(GetChunk(swarm.manifest.fingerprint, index))


@pytest.mark.parametrize("change", ["gone", "shorter", "other"])
async def test_a_file_that_changed_is_not_served(swarm: Swarm, change: str) -> None:
    path = swarm.files[0]
    changed = path.stat().st_mtime_ns
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        os.truncate(path, CHUNK)
        os.utime(path, ns=(changed, changed))
    else:
        path.write_bytes(bytes(swarm.manifest.size))
        os.utime(path, ns=(changed, changed + 1))
    with pytest.raises(NotReady, match=r"m\.gguf changed"):
        await swarm.server.answer(GetChunk(swarm.manifest.fingerprint, N_CHUNKS - 1))


def test_a_local_copy_is_found_by_its_bytes(swarm: Swarm, tmp_path: Path) -> None:
    directory = tmp_path / "models"
    directory.mkdir()
    places = [tmp_path / "nowhere", directory]
    (directory / "a.gguf").write_bytes(bytes(swarm.manifest.size))
    (directory / "b.gguf").write_bytes(swarm.files[0].read_bytes()[:-1])
    (directory / "gone.gguf").symlink_to(directory / "nothing")
    assert find_local(swarm.manifest, places, swarm.cache) is None
    (directory / "renamed.gguf").write_bytes(swarm.files[0].read_bytes())
    assert find_local(swarm.manifest, places, swarm.cache) == (directory / "renamed.gguf",)


def test_a_local_split_is_found_with_all_its_files(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, (CHUNK + 2, CHUNK + 2, 5))
    directory = tmp_path / "models"
    directory.mkdir()
    for number, path in enumerate(swarm.files, 1):
        assert find_local(swarm.manifest, [directory], swarm.cache) is None
        (directory / f"other-0000{number}-of-00003.gguf").write_bytes(path.read_bytes())
    found = find_local(swarm.manifest, [directory], swarm.cache)
    assert found == tuple(directory / f"other-0000{number}-of-00003.gguf" for number in (1, 2, 3))
