"""What a running node writes of itself in its data directory, and how those are told apart that were killed."""

from __future__ import annotations

import logging
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from entries import killed, running

from swarmcpp.files import try_lock
from swarmcpp.node.whereabouts import Entry, Whereabouts, find_nodes

URL = "http://127.0.0.1:8081"


def names(data_dir: Path) -> list[str]:
    return sorted(path.suffix for path in (data_dir / "nodes").iterdir())


def test_nobody_runs_with_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert find_nodes(tmp_path / "none") == ([], [])
    assert not (tmp_path / "none").exists()


def test_a_node_is_found_while_it_runs(tmp_path: Path) -> None:
    told = {"swarm": "1f3a", "addresses": ("10.0.0.1:17610", "[fd00::10]:17610"), "key": "k" * 40}
    with running(tmp_path / "data", URL, **told) as where:
        assert find_nodes(tmp_path / "data") == ([where], [])
        assert where == Whereabouts(URL, os.getpid(), where.started, *told.values())
    assert find_nodes(tmp_path / "data") == ([], [])
    assert names(tmp_path / "data") == []


def test_a_killed_node_is_gone_although_its_process_number_is_in_use(tmp_path: Path) -> None:
    where = killed(tmp_path, URL)
    assert find_nodes(tmp_path) == ([], [where])


def test_whoever_looks_at_the_same_time_is_not_taken_for_the_node(tmp_path: Path) -> None:
    where = killed(tmp_path, URL)
    with next((tmp_path / "nodes").glob("*.lock")).open("rb") as other:
        assert try_lock(other, shared=True)
        assert find_nodes(tmp_path) == ([], [where])
    with running(tmp_path, URL) as where:
        assert find_nodes(tmp_path) == find_nodes(tmp_path) == ([where], [])


def test_the_next_node_removes_what_a_killed_one_left_and_nothing_of_those_that_run(tmp_path: Path) -> None:
    killed(tmp_path, URL)
    with running(tmp_path, "http://127.0.0.1:1") as first, running(tmp_path, "http://127.0.0.1:2") as second:
        assert find_nodes(tmp_path) == ([first, second], [])
        assert names(tmp_path) == [".json", ".json", ".lock", ".lock"]


def test_the_oldest_is_first(tmp_path: Path) -> None:
    with ExitStack() as stack:
        for started in (3.0, 1.0, 2.0):
            stack.enter_context(running(tmp_path, URL, started=started))
        assert [each.started for each in find_nodes(tmp_path)[0]] == [1.0, 2.0, 3.0]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_it_is_for_this_user_only(tmp_path: Path) -> None:
    with running(tmp_path, URL):
        directory = tmp_path / "nodes"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*.json")] == [0o600]


@pytest.mark.parametrize("content", [b"", b"[1]", b"[" * 100_000, b"\xff", b'{"url": 1}', b'{"url": "http://h"}'])
def test_a_damaged_entry_is_none_and_goes(tmp_path: Path, content: bytes) -> None:
    killed(tmp_path, URL)
    next((tmp_path / "nodes").glob("*.json")).write_bytes(content)
    assert find_nodes(tmp_path) == ([], [])
    with running(tmp_path, URL):
        assert names(tmp_path) == [".json", ".lock"]


def test_fields_of_a_later_version_do_not_matter(tmp_path: Path) -> None:
    killed(tmp_path, URL)
    next((tmp_path / "nodes").glob("*.json")).write_text('{"url": "u", "pid": 1, "started": 2, "more": [1]}')
    assert find_nodes(tmp_path) == ([], [Whereabouts("u", 1, 2.0)])


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nodes").write_text("")
    with caplog.at_level(logging.WARNING), running(tmp_path, URL):
        assert f"--url {URL}" in caplog.text and str(tmp_path / "nodes") in caplog.text
        assert find_nodes(tmp_path) == ([], [])


def test_a_node_that_ends_meanwhile_is_none_that_was_killed(tmp_path: Path) -> None:
    ended = threading.Event()

    def live() -> None:
        for _ in range(100):
            with running(tmp_path, URL):
                pass
        ended.set()

    thread = threading.Thread(target=live)
    thread.start()
    lost = []
    while not ended.is_set():
        lost += find_nodes(tmp_path)[1]
    thread.join()
    assert lost == []


def test_closing_is_for_any_time(tmp_path: Path) -> None:
    entry = Entry(tmp_path)
    entry.close()
    entry.write(Whereabouts(URL, 1, 2.0))
    entry.close()
    entry.close()
    assert names(tmp_path) == []
