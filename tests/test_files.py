"""Reads and writes at offsets, and locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp import files
from swarmcpp.files import read_at, read_into, replace_file, try_lock, write_at


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    yield descriptor
    os.close(descriptor)


@given(
    st.lists(st.tuples(st.binary(max_size=9), st.integers(0, 40)), max_size=8), st.integers(0, 60), st.integers(0, 60)
)
def test_the_file_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[bytes, int]], size: int, offset: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0))
    expected = bytearray()
    try:
        for data, at in writes:
            write_at(descriptor, data, at)
            if data:
                expected.extend(bytes(max(0, at + len(data) - len(expected))))
                expected[at : at + len(data)] = data
        assert read_at(descriptor, size, offset) == bytes(expected[offset : offset + size])
    finally:
        os.close(descriptor)


def test_a_read_past_the_end_is_short(fd: int) -> None:
    write_at(fd, b"abcdef", 0)
    target = bytearray(b"......")
    assert read_into(fd, memoryview(target), 4) == 2
    assert target == b"ef...."
    assert read_into(fd, memoryview(target), 100) == 0
    assert read_at(fd, 3, 100) == b""
    assert read_at(fd, 0, 0) == b""


def test_views_of_any_item_are_written_as_bytes(fd: int) -> None:
    write_at(fd, memoryview(b"abcdefgh").cast("I"), 1)
    assert read_at(fd, 20, 0) == b"\0abcdefgh"


def test_writes_and_reads_in_small_pieces_are_completed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pread = files._pwrite, files._pread_into
    monkeypatch.setattr(files, "_pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(files, "_pread_into", lambda fd, target, offset: pread(fd, target[:2], offset))
    write_at(fd, b"0123456789", 5)
    assert read_at(fd, 100, 5) == b"0123456789"


def test_a_write_that_stops_half_way_raises(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = files._pwrite
    written: list[int] = []

    def full(fd: int, data: memoryview, offset: int) -> int:
        if written:
            raise OSError(errno.ENOSPC, "full")
        written.append(pwrite(fd, data[:4], offset))
        return written[0]

    monkeypatch.setattr(files, "_pwrite", full)
    with pytest.raises(OSError, match="full"):
        write_at(fd, b"0123456789", 0)
    assert read_at(fd, 10, 0) == b"0123"


def test_a_closed_file_is_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.close(descriptor)
    with pytest.raises(OSError):
        write_at(descriptor, b"x", 0)
    with pytest.raises(OSError):
        read_at(descriptor, 1, 0)


def test_threads_do_not_disturb_one_another(fd: int) -> None:
    def work(at: int) -> None:
        for turn in range(200):
            data = bytes([at, turn]) * 50
            write_at(fd, data, at * 100)
            assert read_at(fd, 100, at * 100) == data

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_at(fd, 400, 0) == b"".join(bytes([at, 199]) * 50 for at in range(4))


def test_a_lock_is_exclusive_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a+b") as first, path.open("a+b") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no shared locks here")
def test_shared_locks_bear_each_other_only(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a+b") as first, path.open("a+b") as second, path.open("a+b") as third:
        assert try_lock(first, shared=True) and try_lock(second, shared=True)
        assert not try_lock(third)
        first.close()
        second.close()
        assert try_lock(third)
        with path.open("a+b") as fourth:
            assert not try_lock(fourth, shared=True)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    for data in (b"old", b"new"):
        replace_file(path, data)
        assert path.read_bytes() == data

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.e2e
def test_a_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"from swarmcpp.files import try_lock; print(try_lock(open({str(path)!r}, 'a+b')))"

    def other() -> str:
        command = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with path.open("a+b") as file:
        assert try_lock(file)
        assert other() == "False\n"
    assert other() == "True\n"
