"""`swarmcpp peers`: the other nodes of the swarm, from the running node or from what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from swarmcpp.commands import terminal
from swarmcpp.commands.server import Server
from swarmcpp.commands.status import ask
from swarmcpp.errors import StartupError
from swarmcpp.status import NodeRow
from swarmcpp.swarm.store import SwarmStore
from swarmcpp.tui import clean, rate_text, time_text


def run(server: Server, data_dir: Path, *, may_remember: bool, as_json: bool) -> None:
    """Print the peers. Without a node at `server`, and if `may_remember`, the addresses of this machine's swarm.

    Raises SwarmError when there is neither, BadConfig for a damaged store.
    """
    try:
        peers = tuple(node for node in ask(server).nodes if not node.is_self)
    except StartupError as error:
        state = SwarmStore(data_dir).load() if may_remember else None
        if state is None:
            raise
        terminal.stderr().print(f"{terminal.one_line(error)}; remembered of swarm {state.key.swarm_id}:")
        peers = tuple(NodeRow(addresses=(str(address),), status="remembered") for address in state.peers)
    rows = [_row(node) for node in peers]
    if as_json:
        terminal.print_json(rows)
    else:
        _print(rows)


def _row(node: NodeRow) -> dict[str, str | float | None]:
    return {
        "name": clean(node.name, 40),
        "id": clean(node.id, 16),
        "address": clean(next(iter(node.addresses), ""), 300),
        "status": clean(node.status, 10),
        "rtt_s": node.rtt_s or None,
        "bytes_per_s": node.bytes_per_s or None,
        "trust": node.trust if node.id else None,
        "model": clean(node.model, 60),
    }


def _print(rows: Sequence[dict[str, str | float | None]]) -> None:
    if not rows:
        terminal.stdout().print("no peers")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "id", "address", "status", "RTT", "rate", "trust", "model"):
        table.add_column(title, overflow="fold", justify="right" if title in ("RTT", "rate", "trust") else "left")
    for row in rows:
        rtt, rate, trust = (float(row[key] or 0) for key in ("rtt_s", "bytes_per_s", "trust"))
        table.add_row(
            *(str(row[key]) for key in ("name", "id", "address", "status")),
            time_text(rtt),
            rate_text(rate),
            "-" if row["trust"] is None else f"{trust:.2f}",
            str(row["model"]),
        )
    terminal.stdout().print(table)
