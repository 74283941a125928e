"""`swarmcpp leave`: forget the swarm of this machine."""

from __future__ import annotations

from pathlib import Path

from swarmcpp.commands import terminal
from swarmcpp.commands.token import load
from swarmcpp.swarm.store import SwarmStore


def run(data_dir: Path) -> None:
    """Forget key and peers. Raises StartupError when this machine is in no swarm, BadConfig when it cannot forget."""
    store = SwarmStore(data_dir)
    state = load(store)
    store.leave()
    terminal.stdout().print(
        f"left swarm {state.key.swarm_id}: its key and {len(state.peers)} remembered peers are forgotten here\n"
        "a node that still runs stays in it until it is stopped",
        soft_wrap=True,
    )
