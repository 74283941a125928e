"""Networks of this machine's own: namespaces joined by a switch, with links of a chosen rate. Linux, as root.

A thread enters a namespace for as long as it starts a process or makes a socket there; what was made stays. So every
node has its own 127.0.0.1, clients reach its API over that without the link, and only nodes use the network between.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "swarmcpp-bench"
WHERE = Path("/run/netns")
LINK = "swarm0"
"""A node's interface; it is the only one beside its loopback."""

NETWORK = "10.77.0"
MAX_SPACES = 250
CLONE_NEWNET = 0x40000000

BURST_S = 0.001
LEAST_BURST = 10_000
"""Bytes. The bucket holds what the link carries in BURST_S, which a kernel that ticks 250 to 1000 times a second needs
to reach the rate, and on a slow link a few packets, so that little comes faster than the rate allows."""

QUEUE_S = 0.05
LEAST_QUEUE = 64_000
"""Bytes. What waits on the link before packets are dropped, as in a switch: QUEUE_S of its rate."""


class NoNamespaces(RuntimeError):
    """This machine or user cannot make network namespaces."""


def missing() -> str | None:
    """Why namespaces cannot be made here; None: they can, as far as can be told before trying."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"`{program}` is missing: install iproute2"
    return None if os.geteuid() == 0 else "network namespaces need root: run this with sudo"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network of one node. `port` is the switch's end of its link."""

    name: str
    address: str
    switch: str
    port: str

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts, is in the namespace; others of the process are not. Raises OSError."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(WHERE / self.name, os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, for any thread."""
        with self.inside():
            return socket.socket(family, kind, protocol)

    def set_rate(self, mbit: float) -> None:
        """Let the link carry `mbit` Mbit/s (10^6 bits) each way, headers included."""
        bytes_per_s = mbit * 1e6 / 8
        burst = max(LEAST_BURST, round(bytes_per_s * BURST_S))
        limit = max(LEAST_QUEUE, round(bytes_per_s * QUEUE_S))
        shape = ("root", "tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", str(burst), "limit", str(limit))
        for space, interface in ((self.name, LINK), (self.switch, self.port)):
            run_tool("tc", "-n", space, "qdisc", "replace", "dev", interface, *shape)

    def received(self) -> int:
        """Bytes that came in over its links so far."""
        with self.inside():
            # Not /proc/net: that is the network of the process's first thread.
            lines = [line.partition(":") for line in Path("/proc/thread-self/net/dev").read_text().splitlines()]
        return sum(int(counts.split()[0]) for name, _, counts in lines if counts and name.strip() != "lo")


def _enter(descriptor: int) -> None:
    # os.setns came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def run_tool(*argv: str) -> None:
    """Run `ip` or `tc`. Raises NoNamespaces with what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaces(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")


def _remove(name: str) -> None:
    subprocess.run(("ip", "netns", "del", name), capture_output=True, check=False)


def clean() -> None:
    """Remove what processes left behind that ended without doing so."""
    for path in WHERE.glob(f"{PREFIX}-*"):
        pid = path.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(path.name)


@contextlib.contextmanager
def namespaces(count: int, mbit: float | None = None) -> Iterator[tuple[Namespace, ...]]:
    """`count` namespaces on one switch that reaches nothing else, at `mbit` each way or unlimited; removed at the end.

    Only one such network of a process exists at a time. Raises NoNamespaces.
    """
    if why := missing():
        raise NoNamespaces(why)
    if not 1 <= count <= MAX_SPACES:
        raise ValueError(f"{count} namespaces are not from 1 to {MAX_SPACES}")
    clean()
    own = f"{PREFIX}-{os.getpid()}"
    switch = f"{own}-switch"
    spaces = tuple(
        Namespace(f"{own}-{index}", f"{NETWORK}.{index}", switch, f"port{index}") for index in range(1, count + 1)
    )
    try:
        run_tool("ip", "netns", "add", switch)
        run_tool("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        run_tool("ip", "-n", switch, "link", "set", "bridge0", "up")
        for space in spaces:
            _connect(space)
            if mbit is not None:
                space.set_rate(mbit)
        yield spaces
    finally:
        for space in spaces:
            _remove(space.name)
        _remove(switch)


def _connect(space: Namespace) -> None:
    run_tool("ip", "netns", "add", space.name)
    run_tool("ip", "-n", space.name, "link", "set", "lo", "up")
    ends = ("link", "add", LINK, "type", "veth", "peer", "name", space.port, "netns", space.switch)
    run_tool("ip", "-n", space.name, *ends)
    run_tool("ip", "-n", space.name, "address", "add", f"{space.address}/24", "dev", LINK)
    run_tool("ip", "-n", space.name, "link", "set", LINK, "up")
    run_tool("ip", "-n", space.switch, "link", "set", space.port, "master", "bridge0", "up")
