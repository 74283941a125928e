"""Announcements, and finding each other over a real network of two namespaces."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.peers import Address
from swarmcpp.swarm.discovery import SERVICE, Discovery, announced, announcement, lan_addresses
from swarmcpp.swarm.identity import SwarmKey, new_node_keys, node_id, valid_address

SWARM = SwarmKey.new()
NODE = new_node_keys()
OWN = Address("0.0.0.0", 7777, NODE.public)
GOOD: dict[bytes, bytes | None] = {b"swarm": SWARM.swarm_id.encode(), b"key": NODE.public.encode(), b"protocol": b"1"}


def test_an_announcement_says_where_who_and_which_swarm() -> None:
    info = announcement(SWARM.swarm_id, OWN, ["192.168.1.2", "fd00::2"])
    assert info.name == f"{node_id(NODE.public)}.{SERVICE}"
    assert info.port == 7777
    assert info.parsed_addresses() == ["192.168.1.2", "fd00::2"]
    found = announced(info.properties, info.parsed_addresses(), info.port, SWARM.swarm_id)
    assert found == (Address("192.168.1.2", 7777, NODE.public), Address("fd00::2", 7777, NODE.public))


def test_an_announcement_tells_nothing_secret() -> None:
    info = announcement(SWARM.swarm_id, OWN, ["192.168.1.2"])
    for secret in (SWARM.secret, SWARM.secret.hex().encode(), SWARM.member.secret.encode(), NODE.secret.encode()):
        assert secret not in info.text
    assert SWARM.member.public.encode() not in info.text


def test_a_node_that_listens_at_one_address_announces_that_one() -> None:
    info = announcement(SWARM.swarm_id, Address("10.1.2.3", 7777, NODE.public), ["192.168.1.2"])
    assert info.parsed_addresses() == ["10.1.2.3"]
    info = announcement(SWARM.swarm_id, Address("box", 7777, NODE.public), ["192.168.1.2"])
    assert info.parsed_addresses() == ["192.168.1.2"]


@pytest.mark.parametrize(
    ("change", "port"),
    [
        ({b"swarm": b"0" * 16}, 7777),
        ({b"swarm": None}, 7777),
        ({b"swarm": b""}, 7777),
        ({b"swarm": b"\xff" * 300}, 7777),
        ({b"key": None}, 7777),
        ({b"key": b""}, 7777),
        ({b"key": b"\xff" * 40}, 7777),
        ({b"key": b"x" * 41}, 7777),
        ({}, 0),
        ({}, None),
        ({}, 70000),
    ],
)
def test_other_swarms_and_garbage_are_ignored(change: dict[bytes, bytes | None], port: int | None) -> None:
    assert announced(GOOD, ["10.0.0.1"], 7777, SWARM.swarm_id)
    assert announced(GOOD | change, ["10.0.0.1"], port, SWARM.swarm_id) == ()


def test_addresses_that_are_no_other_machine_are_ignored() -> None:
    hosts = [
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "::",
        "224.0.0.251",
        "ff02::1",
        "fe80::1",
        "255.255.255.255",
        "x",
        "10.0.0.1",
    ]
    assert announced(GOOD, hosts, 1, SWARM.swarm_id) == ()
    assert announced(GOOD, hosts[-4:], 1, SWARM.swarm_id) == (Address("10.0.0.1", 1, NODE.public),)


@given(
    st.dictionaries(st.sampled_from([b"swarm", b"key", b"protocol", b""]), st.none() | st.binary(max_size=64)),
    st.lists(st.ip_addresses().map(str) | st.text(max_size=20), max_size=20),
    st.none() | st.integers(-1, 70000),
)
def test_whatever_is_announced_can_be_connected_to(
    properties: dict[bytes, bytes | None], hosts: list[str], port: int | None
) -> None:
    found = announced(GOOD | properties, hosts, port, SWARM.swarm_id)
    assert len(found) <= 8
    assert all(valid_address(address) for address in found)


def test_lan_addresses_are_those_of_other_machines_private_ones_first() -> None:
    found = [ipaddress.ip_address(host) for host in lan_addresses()]
    assert not any(ip.is_loopback or (ip.version == 6 and ip.is_link_local) for ip in found)
    assert [ip.version for ip in found] == sorted(ip.version for ip in found)


async def test_without_a_network_a_node_goes_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    discovery = Discovery(SWARM.swarm_id, OWN, lambda _: None, ["127.0.0.1", "not an address"])
    with caplog.at_level(logging.WARNING):
        await discovery.start()
    assert [record.getMessage() for record in caplog.records] == [
        "members on this network are not found by themselves (multicast DNS: no network interface to use); "
        "join tokens still work"
    ]
    await discovery.close()
    await discovery.close()


# What runs in a namespace: reads its part as JSON, prints each address that it finds, ends with its standard input.
CHILD = """
import asyncio, json, logging, socket, sys
from swarmcpp.peers import Address
from swarmcpp.swarm.discovery import Discovery, lan_addresses

async def main(part):
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if part["taken"]:
        taken.bind(("", 5353))
    own = Address(*part["own"]) if part["own"] else None
    print("lan", *lan_addresses(), flush=True)
    discovery = Discovery(part["swarm"], own, lambda found: print("found", found, found.key, flush=True))
    await discovery.start()
    print("started", flush=True)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not (await asyncio.wait([ended], timeout=0.1))[0]:
        await discovery.refresh()
    await discovery.close()
    taken.close()
    print("closed", flush=True)

asyncio.run(main(json.loads(sys.argv[1])))
"""


@dataclass
class Child:
    """A discovery in a namespace."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def stop(self) -> list[str]:
        """Ends it in order; what it still had to say."""
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return out.split("\n")[:-1]


@dataclass
class Wire:
    """Two network namespaces joined by a cable: 10.77.0.1 and 10.77.0.2."""

    names: tuple[str, str]
    children: list[Child]

    def discover(self, end: int, own: Address | None, swarm: str = SWARM.swarm_id, *, taken: bool = False) -> Child:
        part = {"own": [own.host, own.port, own.key] if own else None, "swarm": swarm, "taken": taken}
        command = ["ip", "netns", "exec", self.names[end], sys.executable, "-c", CHILD, json.dumps(part)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.children.append(Child(process))
        return self.children[-1]


def _ip(command: str) -> str:
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def wire() -> Iterator[Wire]:
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and ip")
    names = (f"swarmd{os.getpid()}a", f"swarmd{os.getpid()}b")
    made = Wire(names, [])
    try:
        try:
            for name in names:
                _ip(f"netns add {name}")
            _ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        except subprocess.CalledProcessError:
            pytest.skip("this machine does not let us make network namespaces")
        for number, name in enumerate(names, 1):
            _ip(f"-n {name} addr add 10.77.0.{number}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
        deadline = time.monotonic() + 60
        while not all("state UP" in _ip(f"-n {name} link show eth0") for name in names):
            assert time.monotonic() < deadline, "the cable does not come up"
        yield made
    finally:
        for child in made.children:
            with child.process as process:
                process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.e2e
def test_members_on_one_network_find_each_other_and_nobody_else(wire: Wire) -> None:
    other, stranger = new_node_keys().public, new_node_keys().public
    alone = wire.discover(0, Address("0.0.0.0", 7000, stranger), SwarmKey.new().swarm_id)
    first = wire.discover(0, OWN)
    assert [alone.line(), alone.line()] == ["lan 10.77.0.1", "started"]
    assert [first.line(), first.line()] == ["lan 10.77.0.1", "started"]

    second = wire.discover(1, Address("0.0.0.0", 8888, other))
    assert second.line() == "lan 10.77.0.2"
    heard = {second.line(), second.line()}
    assert heard == {"started", f"found 10.77.0.1:7777 {NODE.public}"}
    assert first.line() == f"found 10.77.0.2:8888 {other}"

    # One that only looks finds both, without being found.
    onlooker = wire.discover(1, None)
    lines = {onlooker.line() for _ in range(4)}
    assert {line for line in lines if line.startswith("found")} == {
        f"found 10.77.0.1:7777 {NODE.public}",
        f"found 10.77.0.2:8888 {other}",
    }
    for child in (onlooker, second, first, alone):
        assert {line for line in child.stop() if not line.startswith("found 10.77")} == {"closed"}


@pytest.mark.e2e
def test_a_node_that_comes_back_is_found_again(wire: Wire) -> None:
    other = new_node_keys().public
    onlooker = wire.discover(0, None)
    assert [onlooker.line(), onlooker.line()] == ["lan 10.77.0.1", "started"]
    for port in (8888, 9999, 7777):
        node = wire.discover(1, Address("0.0.0.0", port, other))
        # What was known before may be told again first.
        while (line := onlooker.line()) != f"found 10.77.0.2:{port} {other}":
            assert line.startswith("found 10.77.0.2:")
        if port == 8888:
            assert "closed" in node.stop()
        else:
            # It had no time to take its announcement back.
            node.process.kill()
            node.process.wait()


@pytest.mark.e2e
def test_a_network_that_comes_late_is_used(wire: Wire) -> None:
    _ip(f"-n {wire.names[0]} link set eth0 down")
    first = wire.discover(0, OWN)
    assert first.line() == "lan"
    assert "no network interface to use" in first.line()
    assert first.line() == "started"
    _ip(f"-n {wire.names[0]} link set eth0 up")
    onlooker = wire.discover(1, None)
    while (line := onlooker.line()) != f"found 10.77.0.1:7777 {NODE.public}":
        assert line.startswith(("lan", "started", "WARNING"))
    assert first.stop() == ["closed"]


@pytest.mark.e2e
def test_a_taken_port_is_one_warning(wire: Wire) -> None:
    child = wire.discover(0, OWN, taken=True)
    assert child.line() == "lan 10.77.0.1"
    assert "not found by themselves" in child.line()
    assert child.line() == "started"
    assert child.stop() == ["closed"]


@pytest.mark.e2e
def test_no_network_at_all_is_one_warning(wire: Wire) -> None:
    _ip(f"-n {wire.names[0]} link set eth0 down")
    child = wire.discover(0, OWN)
    assert child.line() == "lan"
    assert "no network interface to use" in child.line()
    assert child.line() == "started"
    assert child.stop() == ["closed"]
