"""A node whose swarm is made up: the real API server on a loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from swarmcpp.api.listener import RunningServer, start_server
from swarmcpp.api.options import ServerOptions
from swarmcpp.api.server import build_app
from swarmcpp.api.swarm import add_routes
from swarmcpp.errors import BadRequest
from swarmcpp.status import EventRow, NodeRow, PlanRates, PlanRow, RequestRow, SwarmPlan, SwarmStatus
from swarmcpp.testing import FakeService

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
"""A public key in Z85: that of the specification's example."""


def three_nodes(swarm: str = "1f3a5b7c9d0e1f2a") -> SwarmStatus:
    """Two replicas, and one node that is not heard any more."""
    here = NodeRow(
        id="a" * 16,
        name="laptop",
        addresses=("192.168.1.10:17610", "[fd00::10]:17610"),
        key=KEY,
        is_self=True,
        version="0.1.0",
        cpu="AMD EPYC 7543",
        cores=8,
        memory_used=5_200_000_000,
        memory_total=16_000_000_000,
        model="qwen2.5-0.5b-instruct-q8_0",
        last_layer=24,
        n_layers=24,
        slots_busy=1,
        slots=4,
        prefill_tps=812.3,
        decode_tps=45.2,
        ttft_s=0.35,
        slot_tokens=5000,
        arena_tokens=2000,
        peer_tokens=1000,
        computed_tokens=2000,
        blocks=1234,
    )
    box = NodeRow(
        id="b" * 16,
        name="box",
        addresses=("192.168.1.20:17610",),
        key=KEY,
        model="qwen2.5-0.5b-instruct-q8_0",
        first_layer=0,
        last_layer=24,
        n_layers=24,
        slots=8,
        decode_tps=90.0,
        rtt_s=0.0004,
        bytes_per_s=112e6,
        trust=0.83,
    )
    desk = NodeRow(
        id="c" * 16, name="desk", addresses=("192.168.1.30:17610",), key=KEY, status="gone", last_layer=12, n_layers=24
    )
    return SwarmStatus(
        node=here.id,
        swarm=swarm,
        nodes=(here, box, desk),
        requests=(RequestRow("chatcmpl-1", "qwen2.5-0.5b-instruct-q8_0", "peer box", 2048, 12, 3.2, "decode"),),
        events=(EventRow(400.0, "peer desk joined"), EventRow(12.0, "peer desk is gone")),
        at=1.0,
    )


def two_halves() -> SwarmPlan:
    """A plan for two machines that hold a half each."""
    return SwarmPlan(
        model="big",
        n_layers=24,
        ctx_size=4096,
        slots=4,
        rates=PlanRates(10.0, 25.5, 1.25),
        before=PlanRates(8.0, 20.0, 1.5),
        rows=(PlanRow("a" * 16, "laptop", 1, 0, 12, 10**9, 0.02), PlanRow("b" * 16, "box", 1, 12, 24, 10**9, 0.03)),
        sentences=("laptop -> box answer together.", "Expected: 10 tokens/s."),
    )


class FakeNode:
    """Used with `with`; `status` may be replaced at any time. `asked` counts the answers."""

    def __init__(self, status: SwarmStatus, api_key: str | None = None) -> None:
        self.status = status
        self.asked = 0
        self.url = ""
        self._api_key = api_key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: RunningServer | None = None

    def swarm_status(self) -> SwarmStatus:
        self.asked += 1
        return self.status

    async def swarm_plan(self, added: Sequence[str]) -> SwarmPlan:
        if "nobody" in added:
            raise BadRequest("with 'nobody': is no node of the swarm", param="with")
        return replace(two_halves(), added=tuple(added))

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def start(self, port: int = 0) -> None:
        """Listen, again if need be."""
        asyncio.run_coroutine_threadsafe(self._start(port), self._loop).result(10)

    def stop(self) -> None:
        """Stop listening; again is fine."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(10)
            self._server = None

    async def _start(self, port: int) -> None:
        app = build_app(FakeService(), ServerOptions(api_key=self._api_key))
        add_routes(app, self)
        self._server = await start_server(app, "127.0.0.1", port, grace_s=0.05)
        self.url = self._server.url
