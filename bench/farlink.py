"""A long way between two namespaces: every packet arrives a set time late, whatever program sent it. Linux, as root.

Each namespace gets a TUN interface; packets that leave by one are written into the other by this process's event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from bench.netns import Namespace, NoNamespaces, run_tool

NETWORK = "10.78.0"
LINK = "far0"
MTU = 65000
"""Like that of a loopback: with few, large packets this process has little to do."""

QUEUE_PACKETS = 10_000
"""In the interface, for moments at which the loop is busy: no packet is lost on the way."""

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


@asynccontextmanager
async def far(
    spaces: tuple[Namespace, Namespace], one_way_s: float, later: Callable[..., object] | None = None
) -> AsyncIterator[tuple[Namespace, Namespace]]:
    """The same namespaces under addresses between which packets take `one_way_s` longer. Raises NoNamespaces.

    `later` calls a function after so many seconds, as the running loop's `call_later` does, which it is if None.
    """
    loop = asyncio.get_running_loop()
    after = later or loop.call_later
    made = tuple(replace(space, address=f"{NETWORK}.{index}") for index, space in enumerate(spaces, 1))
    with ExitStack() as stack:
        try:
            ends = [_interface(space) for space in made]
        except OSError as error:
            raise NoNamespaces(f"no TUN interface: {error}") from None
        for end in ends:
            stack.callback(os.close, end)

        def pass_on(source: int, target: int) -> None:
            # All that wait now: with one packet a turn of the loop, a burst would arrive later than it should.
            with suppress(BlockingIOError):
                while True:
                    after(one_way_s, _write, target, os.read(source, MTU + 100))

        for source, target in (ends, ends[::-1]):
            loop.add_reader(source, pass_on, source, target)
            stack.callback(loop.remove_reader, source)
        yield made[0], made[1]


def _write(target: int, packet: bytes) -> None:
    # A namespace that is being taken down takes no more packets.
    with suppress(OSError):
        os.write(target, packet)


def _interface(space: Namespace) -> int:
    """A TUN interface with the address of `space`; its packets are read and written at this descriptor."""
    with space.inside():
        end = os.open(Path("/dev/net/tun"), os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", LINK.encode(), IFF_TUN | IFF_NO_PI))
    run_tool("ip", "-n", space.name, "address", "add", f"{space.address}/24", "dev", LINK)
    up = ("mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS), "up")
    run_tool("ip", "-n", space.name, "link", "set", LINK, *up)
    return end
