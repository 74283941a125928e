"""Networks in namespaces, for real. Only root on Linux can make them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bench import netns

REASON = netns.missing()
root_only = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def pair() -> Iterator[tuple[netns.Namespace, netns.Namespace]]:
    try:
        with netns.namespaces(2) as spaces:
            yield spaces[0], spaces[1]
    except netns.NoNamespaces as error:
        # Root of a container may not do it either.
        pytest.skip(str(error))


def _mbit(sender: netns.Namespace, receiver: netns.Namespace, megabytes: int) -> float:
    """Payload Mbit/s of one TCP connection, from the first byte that arrives to the last."""
    with receiver.socket() as listener, sender.socket() as out:
        listener.bind((receiver.address, 0))
        listener.listen()
        address = listener.getsockname()

        def send() -> None:
            out.connect(address)
            for _ in range(megabytes):
                out.sendall(bytes(1_000_000))
            out.shutdown(1)

        thread = threading.Thread(target=send)
        thread.start()
        connection, _ = listener.accept()
        with connection:
            size, begun = len(connection.recv(1 << 20)), time.perf_counter()
            while piece := connection.recv(1 << 20):
                size += len(piece)
            took = time.perf_counter() - begun
        thread.join()
    assert size == megabytes * 1_000_000
    return size * 8 / 1e6 / took


@root_only
def test_a_link_has_its_rate_both_ways_and_can_be_changed(pair: tuple[netns.Namespace, netns.Namespace]) -> None:
    a, b = pair
    a.set_rate(1000)
    b.set_rate(1000)
    before = b.received()
    # How much less it is than the rate depends on what else runs here; that it is more than a lower rate does not.
    assert 105 < _mbit(a, b, 40) <= 1000
    assert b.received() - before >= 40_000_000
    b.set_rate(100)
    for sender, receiver in ((a, b), (b, a)):
        assert 6 < _mbit(sender, receiver, 5) <= 105
    a.set_rate(5)
    assert _mbit(b, a, 1) <= 6


@root_only
def test_nodes_have_loopbacks_of_their_own_and_no_way_out(pair: tuple[netns.Namespace, netns.Namespace]) -> None:
    a, b = pair
    with a.socket() as one, b.socket() as other:
        one.bind(("127.0.0.1", 8080))
        other.bind(("127.0.0.1", 8080))
    with a.socket() as outward, pytest.raises(OSError, match="unreachable"):
        outward.connect(("192.0.2.1", 80))
    listing = [sys.executable, "-c", "import os; print(os.readlink('/proc/self/ns/net'))"]
    with a.inside():
        there = subprocess.check_output(listing, text=True)
    assert there != subprocess.check_output(listing, text=True)


@root_only
def test_namespaces_go_with_their_owner(pair: tuple[netns.Namespace, netns.Namespace]) -> None:
    stopped = subprocess.Popen([sys.executable, "-c", ""])
    stopped.wait()
    left = f"{netns.PREFIX}-{stopped.pid}-1"
    subprocess.run(["ip", "netns", "add", left], check=True)
    netns.clean()
    assert not (netns.WHERE / left).exists()
    assert (netns.WHERE / pair[0].name).exists()


@root_only
def test_an_error_inside_leaves_nothing_behind() -> None:
    try:
        with netns.namespaces(1) as (space,):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert not (netns.WHERE / space.name).exists()
        assert not (netns.WHERE / space.switch).exists()
    except netns.NoNamespaces as error:
        pytest.skip(str(error))
