"""`swarmcpp plan`: which machine would hold what of a model, and what a further one would change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlencode

from swarmcpp.commands import terminal
from swarmcpp.commands.server import Server
from swarmcpp.commands.status import StatusClient
from swarmcpp.status import MAX_SENTENCE, SwarmPlan, plan_from_json, to_json
from swarmcpp.tui import clean

PLAN_TIMEOUT_S: Final = 60.0
"""A hundred nodes take a second, and as much again for each machine that is added."""


def run(server: Server, added: Sequence[str], *, as_json: bool) -> None:
    """Print the plan of `server` with the machines `added`. Raises SwarmError."""
    found = asyncio.run(_ask(server, added))
    if as_json:
        terminal.print_json(to_json(found))
        return
    console = terminal.stdout()
    for line in _lines(found):
        console.print(clean(line, MAX_SENTENCE), soft_wrap=True)


async def _ask(server: Server, added: Sequence[str]) -> SwarmPlan:
    query = urlencode([("with", each) for each in added])
    async with StatusClient(server.url, server.api_key) as client:
        return plan_from_json(await client.document(f"/swarm/plan?{query}", PLAN_TIMEOUT_S))


def _lines(plan: SwarmPlan) -> list[str]:
    head = f"{plan.model}: {plan.n_layers} layers, {plan.slots} slots of {plan.ctx_size} tokens"
    return [head + (f", with {', '.join(plan.added)}" if plan.added else ""), *plan.sentences]
