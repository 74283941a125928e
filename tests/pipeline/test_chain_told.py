"""Where a request runs that goes through stages, as its head tells it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing

from pipeline_support import GREEDY, Swarm, policy

from swarmcpp.core import GenerateRequest
from swarmcpp.pipeline.conductor import Conductor
from swarmcpp.pipeline.head import StageRunner
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.runner import LOCAL


async def test_the_chain_of_a_request_is_told_to_its_end(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of((0, 2, 5))
    conductor = Conductor(swarm.facts, policy(), swarm.surroundings(), time.monotonic)
    heads: list[Conductor] = []
    runner = StageRunner(
        EngineStatus,
        lambda: "",
        lambda chain: " ".join(f"{each.first}-{each.last}" for each in chain),
        lambda: heads[0] if heads else None,
    )
    assert runner.route("r") == LOCAL
    heads.append(conductor)
    try:
        # Of a request with one token the stages are given back before its reader has it.
        for count in (1, 5):
            wanted = GenerateRequest("r", "m", (1, 2, 3), count, GREEDY)
            assert runner.route("r") == LOCAL
            async with aclosing(runner.tokens(runner.admit(wanted))) as parts:
                told = [runner.route("r") async for _ in parts]
            assert told == ["0-2 2-5"] * count
    finally:
        await conductor.close()
