"""Swarm key, peers and identities on disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarmcpp.errors import BadConfig
from swarmcpp.peers import Address
from swarmcpp.swarm.identity import SwarmKey, new_node_keys, node_id
from swarmcpp.swarm.store import SwarmState, SwarmStore

NODE = new_node_keys()
Open = Callable[[], SwarmStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Makes stores of one data directory; each is what another process would see."""
    stores: list[SwarmStore] = []

    def make() -> SwarmStore:
        stores.append(SwarmStore(tmp_path / "data"))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def peer(number: int, key: str = NODE.public) -> Address:
    return Address(f"10.0.{number // 250}.{number % 250 + 1}", 7777, key)


def test_nothing_is_remembered_at_first(opened: Open, tmp_path: Path) -> None:
    assert opened().load() is None
    assert not (tmp_path / "data").exists()


def test_a_swarm_is_remembered(opened: Open) -> None:
    key = SwarmKey.new()
    opened().save(key)
    opened().remember([peer(1), Address("box.local", 80, NODE.public)])
    assert opened().load() == SwarmState(key, (peer(1), Address("box.local", 80, NODE.public)))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_only_this_user_can_read_it(opened: Open, tmp_path: Path) -> None:
    directory = tmp_path / "data" / "swarm"
    directory.mkdir(parents=True, mode=0o755)
    store = opened()
    store.save(SwarmKey.new())
    store.remember([peer(1)])
    store.take_identity()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = [path for path in directory.iterdir() if path.suffix == ".json"]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert not [path for path in directory.iterdir() if path.suffix == ".tmp"]


def test_the_most_recent_peers_are_first_and_the_oldest_go(opened: Open, tmp_path: Path) -> None:
    store = opened()
    store.save(SwarmKey.new())
    store.remember([peer(number) for number in range(200)])
    store.remember([peer(number) for number in range(150, 350)])
    state = store.load()
    assert state
    assert state.peers == tuple(peer(number) for number in (*range(150, 350), *range(56)))
    assert len(json.loads((tmp_path / "data" / "swarm" / "peers.json").read_text())["peers"]) == 256


def test_a_new_key_at_an_old_place_replaces_the_old_one(opened: Open) -> None:
    store, other = opened(), new_node_keys().public
    store.save(SwarmKey.new())
    store.remember([peer(1), peer(2)])
    store.remember([peer(2, other)])
    state = store.load()
    assert state
    assert state.peers == (peer(2, other), peer(1))


def test_addresses_that_are_none_are_not_remembered(opened: Open) -> None:
    store = opened()
    store.save(SwarmKey.new())
    store.remember([Address("a b", 1, NODE.public), Address("10.0.0.1", 1, "no key"), peer(1)])
    state = store.load()
    assert state
    assert state.peers == (peer(1),)


def test_peers_belong_to_their_swarm(opened: Open) -> None:
    store = opened()
    store.remember([peer(1)])
    assert store.load() is None
    store.save(SwarmKey.new())
    store.remember([peer(1)])
    other = SwarmKey.new()
    store.save(other)
    assert store.load() == SwarmState(other, ())


def test_leaving_forgets_the_swarm_and_keeps_the_identity(opened: Open) -> None:
    first = opened()
    key = SwarmKey.new()
    first.save(key)
    first.remember([peer(1)])
    identity = first.take_identity()
    first.leave()
    first.leave()
    first.close()
    again = opened()
    assert again.load() is None
    assert again.take_identity().node_id == identity.node_id
    again.save(key)
    assert again.load() == SwarmState(key, ())


def test_rotating_makes_another_swarm(opened: Open) -> None:
    store = opened()
    old = SwarmKey.new()
    store.save(old)
    store.remember([peer(1)])
    new = store.rotate()
    assert new != old
    assert opened().load() == SwarmState(new, ())


def test_an_identity_lasts_and_its_boots_rise(opened: Open) -> None:
    lives = []
    for _ in range(3):
        store = opened()
        lives.append(store.take_identity())
        store.close()
    assert [life.boot for life in lives] == [1, 2, 3]
    assert {life.keys for life in lives} == {lives[0].keys}
    assert lives[0].node_id == node_id(lives[0].keys.public)
    assert lives[0].keys.secret not in repr(lives[0])


def test_nodes_that_share_a_directory_are_different_nodes(opened: Open) -> None:
    stores = [opened() for _ in range(3)]
    taken = [store.take_identity() for store in stores]
    assert len({identity.node_id for identity in taken}) == 3
    assert len({store.trust_path for store in stores}) == 3
    stores[1].close()
    back = opened()
    second = back.take_identity()
    assert (second.node_id, second.boot) == (taken[1].node_id, 2)
    assert back.trust_path == stores[1].trust_path


def test_another_process_holds_its_identity_until_it_ends(opened: Open, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from swarmcpp.swarm.store import SwarmStore\n"
        "store = SwarmStore(Path(sys.argv[1])); print(store.take_identity().node_id, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        first = child.stdout.readline().strip()
        assert len(first) == 16
        assert opened().take_identity().node_id != first
        child.kill()
        child.wait()
    assert opened().take_identity().node_id == first


def test_a_renewed_identity_is_another_node_and_lasts(opened: Open) -> None:
    store = opened()
    old = store.take_identity()
    new = store.renew_identity()
    assert new.node_id != old.node_id
    assert new.boot == 1
    store.close()
    after = opened().take_identity()
    assert (after.keys, after.boot) == (new.keys, 2)


def test_a_copied_directory_has_the_same_identity_until_it_is_renewed(opened: Open, tmp_path: Path) -> None:
    store = opened()
    first = store.take_identity()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copy = SwarmStore(tmp_path / "copy")
    assert copy.take_identity().node_id == first.node_id
    assert copy.renew_identity().node_id != first.node_id
    copy.close()


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b" " * (2 << 20), b'{"key": 7}']


@pytest.mark.parametrize("content", [*GARBAGE, b'{"key": "00"}', b'{"key": "zz"}'], ids=lambda content: content[:16])
def test_a_damaged_swarm_key_is_an_error_that_names_the_file(opened: Open, tmp_path: Path, content: bytes) -> None:
    store = opened()
    store.save(SwarmKey.new())
    path = tmp_path / "data" / "swarm" / "key.json"
    path.write_bytes(content)
    with pytest.raises(BadConfig, match="delete that file") as caught:
        store.load()
    assert str(path) in str(caught.value)
    path.unlink()
    assert store.load() is None


def pair(boot: object, secret: str = NODE.secret, public: str = NODE.public) -> bytes:
    return json.dumps({"public": public, "secret": secret, "boot": boot}).encode()


@pytest.mark.parametrize(
    "content",
    [
        *GARBAGE,
        pair("1"),
        pair(-1),
        pair(True),
        pair(2**60),
        pair(1, secret=new_node_keys().secret),
        pair(1, secret="x"),
        pair(1, public="\udc80"),
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_a_damaged_identity_is_made_anew_with_a_warning(
    opened: Open, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    old = first.take_identity()
    first.close()
    path = tmp_path / "data" / "swarm" / "node.json"
    path.write_bytes(content)
    second = opened()
    with caplog.at_level(logging.WARNING):
        new = second.take_identity()
    second.close()
    assert new.node_id not in (old.node_id, node_id(NODE.public))
    assert new.boot == 1
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert opened().take_identity().node_id == new.node_id


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: content[:16])
def test_damaged_peers_are_forgotten_with_a_warning(
    opened: Open, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    key = SwarmKey.new()
    store.save(key)
    (tmp_path / "data" / "swarm" / "peers.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.load() == SwarmState(key, ())
    assert len(caplog.records) == 1
    store.remember([peer(1)])
    assert store.load() == SwarmState(key, (peer(1),))


@pytest.mark.parametrize(
    "peers",
    [7, "abc", {"a": 1}, [7], [{}], [{"host": 1, "port": 1, "key": ""}], [{"host": "a", "port": True, "key": ""}]],
)
def test_peers_of_the_wrong_shape_are_forgotten(opened: Open, tmp_path: Path, peers: object) -> None:
    store = opened()
    key = SwarmKey.new()
    store.save(key)
    content = json.dumps({"swarm": key.swarm_id, "peers": peers})
    (tmp_path / "data" / "swarm" / "peers.json").write_text(content)
    assert store.load() == SwarmState(key, ())


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    store = SwarmStore(tmp_path / "data")
    for attempt in (lambda: store.save(SwarmKey.new()), store.take_identity, store.rotate, store.load, store.leave):
        with pytest.raises(BadConfig, match="--data-dir") as caught:
            attempt()
        assert str(tmp_path / "data") in str(caught.value)


def test_peers_that_cannot_be_kept_do_not_stop_a_node(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    store.save(SwarmKey.new())
    # A directory in its place can be neither read nor replaced, not even by root.
    (tmp_path / "data" / "swarm" / "peers.json" / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        store.remember([peer(1)])
    assert ["not remembered" in record.getMessage() for record in caplog.records] == [True]
