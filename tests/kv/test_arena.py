"""The arena file: what was stored is found again, and whatever else happens to the file is a miss at worst."""

from __future__ import annotations

import errno
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from kv.blocks_on_disk import BLOCK_BYTES, BLOCK_TOKENS, IDENTITY, Rig, chain, filled, open_arena, open_rig, size_of

from swarmcpp.kv import arena as arena_module
from swarmcpp.kv.arena import (
    MAX_ARENAS,
    PAGE,
    Arena,
    ArenaFile,
    ArenaGeometry,
    StoredBlock,
    read_header,
    read_label,
)
from swarmcpp.kv.cache import PrefixCache, verify
from swarmcpp.kv.keys import KvIdentity

A, B, C = chain(1, 3), chain(2, 4), chain(3, 2)
N_STORED = 9
ENTRY = 120
TICK_AT = 96


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def recall_all(rig: Rig) -> int:
    """Blocks of A, B and C that are there; each judged sound is checked against its key."""
    found = sum(rig.recall(tokens) for tokens in (A, B, C))
    rig.cache.check_integrity()
    return found


def survives(directory: Path) -> int:
    """Open what is left, use all of it, store it again, use it, restart, use it: blocks found at first."""
    with closing(open_rig(directory, None)) as rig:
        found = recall_all(rig)
        for tokens in (A, B, C):
            rig.store(tokens)
        assert recall_all(rig) == N_STORED
    with closing(open_rig(directory, None)) as rig:
        assert recall_all(rig) == N_STORED
    return found


# -- geometry --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20_000), st.integers(0, 3_000_000))
def test_the_geometry_fits_and_nothing_overlaps(block_bytes: int, max_bytes: int) -> None:
    geometry = ArenaGeometry.within(block_bytes, max_bytes)
    assert geometry.n_blocks >= 0
    if geometry.n_blocks:
        assert geometry.file_bytes <= max_bytes
        assert geometry.payload_start >= PAGE + geometry.n_blocks * ENTRY
        assert geometry.offset(geometry.n_blocks - 1) + block_bytes <= geometry.file_bytes
        assert geometry.offset(0) % PAGE == 0
        assert geometry.stride >= block_bytes
    assert ArenaGeometry(block_bytes, geometry.n_blocks + 1).file_bytes > max_bytes


@pytest.mark.parametrize("slot", [-1, 16, 10**9])
def test_a_slot_outside_is_an_error(slot: int) -> None:
    with pytest.raises(IndexError):
        ArenaGeometry(BLOCK_BYTES, 16).offset(slot)


# -- the good case ---------------------------------------------------------------------------------------------------


def test_what_is_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path, A, B, C)
    with closing(open_rig(tmp_path, None)) as rig:
        assert [rig.recall(tokens) for tokens in (A, B, C)] == [3, 4, 2]
        assert rig.recall(A[:8] + B) == 2
        assert rig.recall(A, salt="other") == 0
        assert rig.cache.stats().blocks == N_STORED


def test_the_table_is_the_same_after_a_restart(tmp_path: Path) -> None:
    with closing(open_arena(tmp_path)) as arena:
        blocks = [
            StoredBlock(slot, bytes([slot + 1]) * 32, bytes(32), blake3(bytes([slot])).digest(), tick=slot)
            for slot in (0, 3, 15)
        ]
        for block in blocks:
            arena.write(block.slot, bytes([block.slot]) * BLOCK_BYTES)
            arena.enter(block)
        assert list(arena.entries()) == blocks
        arena.erase(3)
        arena.touch(15, 2**40)
    with closing(open_arena(tmp_path, None)) as arena:
        assert [(block.slot, block.tick) for block in arena.entries()] == [(0, 0), (15, 2**40)]
        assert arena.read(0) == bytes(BLOCK_BYTES)
        assert arena.read(15) == bytes([15]) * BLOCK_BYTES
        assert arena.geometry == ArenaGeometry(BLOCK_BYTES, 16)


def test_a_new_size_starts_empty_and_no_size_keeps_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, A, n_blocks=12)
    with closing(open_rig(tmp_path, None)) as rig:
        assert rig.cache.n_blocks == 12
    assert not caplog.records
    with closing(open_rig(tmp_path, 8)) as rig:
        assert rig.cache.n_blocks == 8
        assert rig.recall(A) == 0
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE - 1])
def test_a_size_for_no_block_gives_no_arena_and_leaves_it_to_others(tmp_path: Path, size: int) -> None:
    identity = IDENTITY.root()
    assert Arena.open(tmp_path, identity, BLOCK_BYTES, size, 0) is None
    assert list(tmp_path.glob("*.arena")) == []
    open_arena(tmp_path).close()


def test_the_file_is_sparse(tmp_path: Path) -> None:
    arena = Arena.open(tmp_path, IDENTITY.root(), 100_000, 1 << 30, 0)
    assert arena is not None
    with closing(arena):
        assert arena.path.stat().st_size > 900_000_000
        assert arena.path.stat().st_blocks * 512 < 1_000_000


def test_the_label_tells_what_it_is_of(tmp_path: Path) -> None:
    for label in ("model.gguf", "ä" * 5000):
        arena = Arena.open(tmp_path, IDENTITY.root(), BLOCK_BYTES, size_of(4), 0, label)
        assert arena is not None
        arena.close()
        shown = read_label(arena.path)
        assert label.startswith(shown.rstrip("�"))
        assert len(shown) >= min(len(label), 500)
    open_arena(tmp_path, None).close()
    assert read_label(arena.path) == shown, "without a label the old one stays"
    assert read_label(tmp_path / "none") == ""


# -- several nodes ---------------------------------------------------------------------------------------------------


def test_a_second_node_gets_a_file_of_its_own(tmp_path: Path) -> None:
    filled(tmp_path, A)
    with closing(open_rig(tmp_path)) as first, closing(open_rig(tmp_path)) as second:
        assert first.cache.path != second.cache.path
        assert first.recall(A) == 3
        assert second.recall(A) == 0
        second.store(B)
        assert first.recall(B) == 0
        assert second.recall(B) == 4
    with closing(open_rig(tmp_path)) as first, closing(open_rig(tmp_path)) as second:
        assert (first.recall(A), second.recall(B)) == (3, 4)


def test_the_ninth_node_is_told_what_to_do(tmp_path: Path) -> None:
    arenas = [open_arena(tmp_path) for _ in range(MAX_ARENAS)]
    with pytest.raises(OSError, match="--data-dir"):
        open_arena(tmp_path)
    arenas[4].close()
    arenas[4] = open_arena(tmp_path)
    for arena in arenas:
        arena.close()


HOLDER = """
import sys, pathlib
from swarmcpp.kv.arena import Arena
arena = Arena.open(pathlib.Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), int(sys.argv[3]), None, int(sys.argv[4]))
print(arena.path.name, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Another process that holds an arena; the name of its file."""
    arguments = (str(directory), IDENTITY.root().hex(), str(BLOCK_BYTES), str(size_of(16)))
    command = [sys.executable, "-c", HOLDER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


@pytest.mark.e2e
def test_another_process_holds_its_arena_until_it_dies(tmp_path: Path) -> None:
    path = filled(tmp_path, A)
    with holder(tmp_path) as (name, process):
        assert name == path.name
        assert Arena.open_file(path) is None
        assert not Arena.remove(path)
        assert Arena.count(path, ArenaGeometry(BLOCK_BYTES, 16)) == 3
        with closing(open_rig(tmp_path)) as rig:
            assert rig.cache.path.name == name.replace(".arena", "-1.arena")
        process.kill()
        process.wait()
        with closing(open_rig(tmp_path)) as rig:
            assert rig.cache.path == path
            assert rig.recall(A) == 3


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filled(tmp_path_factory.mktemp("sound"), A, B, C).read_bytes()


@pytest.fixture
def laid(tmp_path: Path) -> Callable[[bytes], Path]:
    """Puts bytes where the arena of this model is looked for; returns the file."""

    def lay(data: bytes) -> Path:
        path = tmp_path / (IDENTITY.root().hex()[:16] + ".arena")
        path.write_bytes(data)
        return path

    return lay


def interesting_lengths(whole: int) -> list[int]:
    edges = [0, 1, 8, 55, 56, 87, 88, 89, PAGE - 1, PAGE, PAGE + 1, PAGE + ENTRY * 3 + 7, 2 * PAGE, whole - 1, whole]
    return edges + list(range(2 * PAGE, whole, 3001))


def test_a_file_cut_at_any_length(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    for length in interesting_lengths(len(sound_bytes)):
        path = laid(sound_bytes[:length])
        found = survives(path.parent)
        assert found <= N_STORED
        assert length < len(sound_bytes) or found == N_STORED


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_bits_flipped_anywhere(
    tmp_path_factory: pytest.TempPathFactory, sound_bytes: bytes, data: st.DataObject
) -> None:
    geometry = ArenaGeometry(BLOCK_BYTES, 16)
    regions = (
        st.integers(0, 100),
        st.integers(0, PAGE - 1),
        st.integers(PAGE, PAGE + ENTRY * 16 - 1),
        st.integers(geometry.payload_start, geometry.file_bytes - 1),
    )
    damaged = bytearray(sound_bytes)
    for offset in data.draw(st.lists(st.one_of(*regions), min_size=1, max_size=6)):
        damaged[offset] ^= data.draw(st.integers(1, 255))
    directory = tmp_path_factory.getbasetemp() / "flipped"
    directory.mkdir(exist_ok=True)
    (directory / (IDENTITY.root().hex()[:16] + ".arena")).write_bytes(damaged)
    survives(directory)


def test_a_table_full_of_ones_in_the_ticks(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    damaged = bytearray(sound_bytes)
    for slot in range(16):
        at = PAGE + slot * ENTRY + TICK_AT
        damaged[at : at + 8] = b"\xff" * 8
    path = laid(bytes(damaged))
    assert survives(path.parent) == N_STORED


def test_payloads_of_zeros_ones_and_each_other(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    geometry = ArenaGeometry(BLOCK_BYTES, 16)
    for other in (bytes(BLOCK_BYTES), b"\xff" * BLOCK_BYTES, sound_bytes[geometry.offset(1) :][:BLOCK_BYTES]):
        damaged = bytearray(sound_bytes)
        damaged[geometry.offset(0) : geometry.offset(0) + BLOCK_BYTES] = other
        path = laid(bytes(damaged))
        assert survives(path.parent) == N_STORED - len(A) // BLOCK_TOKENS


def test_an_entry_copied_to_another_place_is_not_believed(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    damaged = bytearray(sound_bytes)
    damaged[PAGE + 12 * ENTRY : PAGE + 13 * ENTRY] = sound_bytes[PAGE : PAGE + ENTRY]
    path = laid(bytes(damaged))
    assert Arena.count(path, ArenaGeometry(BLOCK_BYTES, 16)) == N_STORED
    assert survives(path.parent) == N_STORED


def test_swapped_entries_are_not_believed(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    damaged = bytearray(sound_bytes)
    first, second = slice(PAGE, PAGE + ENTRY), slice(PAGE + ENTRY, PAGE + 2 * ENTRY)
    damaged[first], damaged[second] = sound_bytes[second], sound_bytes[first]
    path = laid(bytes(damaged))
    assert Arena.count(path, ArenaGeometry(BLOCK_BYTES, 16)) == N_STORED - 2
    assert survives(path.parent) == N_STORED - len(A) // BLOCK_TOKENS


def test_verify_erases_what_is_damaged(laid: Callable[[bytes], Path], sound_bytes: bytes) -> None:
    path = laid(sound_bytes)
    with closing(open_rig(path.parent, None)) as rig:
        lease = rig.cache.lease((*B, 0), "")
        rig.cache.release(lease)
    damage(path, ArenaGeometry(BLOCK_BYTES, 16).offset(lease.refs[1].slot) + 599, b"\x01")
    damage(path, ArenaGeometry(BLOCK_BYTES, 16).offset(lease.refs[1].slot) + 598, b"\x07")
    arena = Arena.open_file(path)
    assert arena is not None
    with closing(arena):
        assert verify(arena) == (N_STORED - 3, 3)
        assert verify(arena) == (N_STORED - 3, 0)
    with closing(open_rig(path.parent, None)) as rig:
        assert [rig.recall(tokens) for tokens in (A, B, C)] == [3, 1, 2]


def test_damage_while_it_is_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path, A, B, C)
    with closing(open_rig(tmp_path, None)) as rig:
        assert recall_all(rig) == N_STORED
        lease = rig.cache.lease((*B, 0), "")
        rig.cache.release(lease)
        damage(path, ArenaGeometry(BLOCK_BYTES, 16).offset(lease.refs[2].slot), b"\xff\xff")
        assert rig.recall(B) == 2, "although it was sound a moment ago"
        assert rig.recall(B) == 2
        assert rig.recall(A) == 3
        rig.store(B)
        assert rig.recall(B) == 4
    assert len(caplog.records) == 1


@pytest.mark.parametrize("length", [0, 100, PAGE + 200, 3 * PAGE])
def test_a_cut_while_it_is_open(tmp_path: Path, length: int) -> None:
    path = filled(tmp_path, A, B, C)
    with closing(open_rig(tmp_path, None)) as rig:
        os.truncate(path, length)
        recall_all(rig)
        # Growing again makes zeros of what was cut.
        for tokens in (C, A, B):
            rig.store(tokens)
        assert recall_all(rig) == N_STORED
    survives(tmp_path)


def test_a_file_that_is_deleted_while_it_is_open(tmp_path: Path) -> None:
    path = filled(tmp_path, A, B)
    with closing(open_rig(tmp_path, None)) as rig:
        path.unlink()
        assert [rig.recall(tokens) for tokens in (A, B)] == [3, 4]
        rig.store(C)
        assert rig.recall(C) == 2
    assert not path.exists()
    with closing(open_rig(tmp_path, None)) as rig:
        assert recall_all(rig) == 0


def test_the_arena_knows_whether_its_path_is_still_its_own(tmp_path: Path) -> None:
    with closing(open_arena(tmp_path)) as arena:
        assert arena.in_place()
        data = arena.path.read_bytes()
        arena.path.unlink()
        assert not arena.in_place()
        arena.path.write_bytes(data)
        assert not arena.in_place(), "another file of that name"
    assert not arena.in_place()


# -- others' files ---------------------------------------------------------------------------------------------------


def reheaded(data: bytes, magic: bytes, block_bytes: int, n_blocks: int, identity: bytes) -> bytes:
    header = struct.pack("<8sQQ32s", magic, block_bytes, n_blocks, identity)
    return header + blake3(header).digest() + data[len(header) + 32 :]


@pytest.mark.parametrize(
    "header",
    [
        (b"SWARMKV\x01", BLOCK_BYTES, 16, IDENTITY.root()),
        (arena_module.MAGIC, BLOCK_BYTES, 16, KvIdentity(bytes(32), 64, (1, 1)).root()),
        (arena_module.MAGIC, BLOCK_BYTES + 2, 16, IDENTITY.root()),
        (arena_module.MAGIC, 0, 16, IDENTITY.root()),
        (arena_module.MAGIC, BLOCK_BYTES, 0, IDENTITY.root()),
        (arena_module.MAGIC, 2**63, 2**63, IDENTITY.root()),
    ],
    ids=["version", "model", "block size", "no block size", "no blocks", "absurd"],
)
def test_a_file_of_something_else_starts_empty_with_one_line(
    laid: Callable[[bytes], Path],
    sound_bytes: bytes,
    header: tuple[bytes, int, int, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = laid(reheaded(sound_bytes, *header))
    assert survives(path.parent) == 0
    assert len(caplog.records) == 1
    assert "starting it empty" in caplog.text


@pytest.mark.parametrize("data", [b"", b"\n", b"SWARMKV\x01", b"x" * 10_000])
def test_a_file_that_is_no_arena(laid: Callable[[bytes], Path], data: bytes) -> None:
    path = laid(data)
    assert read_header(path) is None
    with pytest.raises(OSError, match="cache clear"):
        Arena.open_file(path)
    assert survives(path.parent) == 0


def test_another_model_has_another_file(tmp_path: Path) -> None:
    filled(tmp_path, A)
    other = KvIdentity(fingerprint=bytes(32), block_tokens=BLOCK_TOKENS, kv_types=(1, 1))
    with closing(open_rig(tmp_path, identity=other)) as rig:
        assert rig.recall(A) == 0
        rig.store(B)
    with closing(open_rig(tmp_path)) as rig:
        assert [rig.recall(tokens) for tokens in (A, B)] == [3, 0]
    assert len(list(tmp_path.glob("*.arena"))) == 2


# -- what the system refuses -----------------------------------------------------------------------------------------


def opens_are_refused(directory: Path, wanted: type[OSError] = OSError) -> None:
    """Every time, with no file left open."""
    before = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    for _ in range(3):
        with pytest.raises(wanted):
            open_arena(directory)
    after = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    assert after == before


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    opens_are_refused(tmp_path / "file")
    opens_are_refused(tmp_path / "file" / "below")


@pytest.mark.parametrize("suffix", [".arena", ".lock"])
def test_a_file_that_is_a_directory(tmp_path: Path, suffix: str) -> None:
    (tmp_path / (IDENTITY.root().hex()[:16] + suffix)).mkdir()
    opens_are_refused(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o400, 0o000])
def test_a_file_that_may_not_be_written(tmp_path: Path, mode: int) -> None:
    path = filled(tmp_path, A)
    path.chmod(mode)
    opens_are_refused(tmp_path, PermissionError)


@contextmanager
def small_disk(at: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of `size` bytes mounted on `at`; the value remounts it with other options."""
    at.mkdir(exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(at)], check=True) and None
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 1 << 20) as remount:
        filled(disk, A)
        remount("ro")
        opens_are_refused(disk)


@pytest.mark.parametrize("free_pages", range(13))
def test_a_full_disk(tmp_path: Path, free_pages: int, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 64 * PAGE):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes((64 - free_pages) * PAGE))
        try:
            rig = open_rig(disk)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return
        with closing(rig):
            stored = sum(rig.store(tokens) for tokens in (A, B, C))
            assert stored < N_STORED or free_pages > 10
            assert recall_all(rig) == stored
            assert len(caplog.records) <= 1, caplog.text
            ballast.unlink()
            for tokens in (A, B, C):
                rig.store(tokens)
            assert recall_all(rig) == N_STORED
        with closing(open_rig(disk)) as rig:
            assert recall_all(rig) == N_STORED


FULL = """
import resource, signal, sys, pathlib
sys.path.insert(0, sys.argv[1])
from kv.blocks_on_disk import chain, open_rig, size_of
from swarmcpp.kv.arena import ArenaGeometry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = pathlib.Path(sys.argv[2])
rig = open_rig(directory)
limit = ArenaGeometry(600, 16).offset(4) + 300
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
chains = chain(1, 3), chain(2, 4), chain(3, 2)
print([rig.store(tokens) for tokens in chains], [rig.recall(tokens) for tokens in chains])
rig.cache.check_integrity()
"""


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[3, 1, 0] [3, 1, 0]\n"
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    with closing(open_rig(tmp_path)) as rig:
        assert [rig.recall(tokens) for tokens in (A, B, C)] == [3, 1, 0]


def test_after_close_nothing_works_and_nothing_breaks(tmp_path: Path) -> None:
    rig = open_rig(tmp_path)
    rig.store(A)
    rig.close()
    rig.cache.close()
    lease = rig.cache.lease((*A, 0), "")
    rig.cache.release(lease, 0)
    grant = rig.cache.grant(B, "")
    assert rig.cache.enter(grant, [(slot, bytes(32)) for _, slot in grant.grants]) == 0
    rig.cache.check_integrity()


# -- the engine's view -----------------------------------------------------------------------------------------------


def test_an_engine_reads_and_writes_whole_blocks_in_their_places(tmp_path: Path) -> None:
    with closing(open_arena(tmp_path)) as arena, closing(ArenaFile(arena.path, arena.geometry)) as file:
        target = memoryview(bytearray(BLOCK_BYTES))
        assert file.write(2, memoryview(b"a" * BLOCK_BYTES))
        assert file.read_into(2, target)
        assert bytes(target) == arena.read(2) == b"a" * BLOCK_BYTES
        for slot in (-1, 16, 2**40):
            assert not file.write(slot, memoryview(b"b" * BLOCK_BYTES))
            assert not file.read_into(slot, target)
        for size in (0, BLOCK_BYTES - 1, BLOCK_BYTES + 1):
            assert not file.write(2, memoryview(bytes(size)))
        assert arena.read(2) == b"a" * BLOCK_BYTES
        assert {arena.read(slot) for slot in (1, 3)} == {bytes(BLOCK_BYTES)}


def test_an_engine_whose_arena_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ArenaFile(tmp_path / "none", ArenaGeometry(BLOCK_BYTES, 16))


def test_care_of_one_file(tmp_path: Path) -> None:
    path = filled(tmp_path, A, B)
    geometry = ArenaGeometry(BLOCK_BYTES, 16)
    assert read_header(path) == (geometry, IDENTITY.root())
    assert Arena.count(path, geometry) == 7
    assert Arena.count(tmp_path / "none", geometry) == 0
    assert Arena.remove(path)
    assert not path.exists()
    assert read_header(path) is None


def test_warnings_come_from_one_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path, A)
    path.write_bytes(b"junk")
    with caplog.at_level(logging.WARNING), closing(PrefixCache(open_arena(tmp_path), IDENTITY)) as cache:
        assert cache.stats().blocks == 0
    assert [record.name for record in caplog.records] == ["swarmcpp.kv.arena"]
