"""`swarmcpp token`: what another machine needs to join this machine's swarm."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from swarmcpp.commands import terminal
from swarmcpp.commands.server import Server
from swarmcpp.commands.status import ask
from swarmcpp.errors import StartupError, SwarmError
from swarmcpp.peers import Address
from swarmcpp.status import NodeRow
from swarmcpp.swarm.identity import MAX_TOKEN_ADDRESSES, JoinToken, SwarmKey, valid_address
from swarmcpp.swarm.store import SwarmState, SwarmStore


def show(server: Server, data_dir: Path) -> None:
    """Print the command that joins. Raises StartupError when this machine is in no swarm, BadConfig for a bad store."""
    state = load(SwarmStore(data_dir))
    _print(state.key, _addresses(server, state))


def rotate(server: Server, data_dir: Path) -> None:
    """Make a new key and print the command that joins with it. Raises as `show`."""
    store = SwarmStore(data_dir)
    old = load(store)
    addresses = _addresses(server, old)
    key = store.rotate()
    terminal.stderr().print(
        f"swarm {old.key.swarm_id} has become {key.swarm_id}: every machine has to join again with the new token,"
        " and a node that runs here keeps the old key until it is started again",
        soft_wrap=True,
    )
    # Nodes keep their own keys and mostly their places, so the old addresses will do once they have joined again.
    _print(key, addresses)


def load(store: SwarmStore) -> SwarmState:
    """The swarm of this machine. Raises StartupError when there is none."""
    state = store.load()
    if state is None:
        raise StartupError(
            "this machine is in no swarm: `swarmcpp serve MODEL --swarm` begins one, `swarmcpp join TOKEN` joins one"
        )
    return state


def _addresses(server: Server, state: SwarmState) -> tuple[Address, ...]:
    """Where members are: as the running node knows them, else as remembered."""
    try:
        status = ask(server)
    except SwarmError as error:
        terminal.note(f"{terminal.one_line(error)}; the token has the addresses that are remembered")
        return (*_written(server, state), *state.peers)
    if status.swarm != state.key.swarm_id:
        terminal.note(f"the node at {server.url} is not in swarm {state.key.swarm_id}: start it again to change that")
        return state.peers
    nodes = sorted(status.nodes, key=lambda node: (not node.is_self, node.status != "alive"))
    return tuple(_spread([list(_valid(node)) for node in nodes]))


def _written(server: Server, state: SwarmState) -> Iterator[Address]:
    """What the node itself wrote down: with an API key of its own it may not tell."""
    wrote = server.wrote
    if wrote and wrote.swarm == state.key.swarm_id:
        yield from _valid(NodeRow(addresses=wrote.addresses, key=wrote.key))


def _valid(node: NodeRow) -> Iterator[Address]:
    for text in node.addresses:
        host, _, port = text.rpartition(":")
        if port.isascii() and port.isdigit():
            address = Address(host.removeprefix("[").removesuffix("]"), int(port), node.key)
            if valid_address(address):
                yield address


def _spread(nodes: list[list[Address]]) -> Iterable[Address]:
    """All addresses of the first node, then the first one of each other: one machine that is off must not matter."""
    return itertools.chain(nodes[0] if nodes else (), *(addresses[:1] for addresses in nodes[1:]))


def _print(key: SwarmKey, addresses: tuple[Address, ...]) -> None:
    if not addresses:
        terminal.note("no addresses are known: the token works where machines find one another by mDNS")
    token = JoinToken(key, addresses[:MAX_TOKEN_ADDRESSES])
    terminal.stdout().print(f"swarmcpp join {token}", soft_wrap=True)
