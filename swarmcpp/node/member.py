"""A node in its swarm: its links, what it says of itself, and what it does for peers."""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Final

from swarmcpp import __version__
from swarmcpp.config import Config
from swarmcpp.core import Clock, GenerateRequest, Limits, TokenPart
from swarmcpp.errors import UnknownModel
from swarmcpp.hardware import read_hardware
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.modelfiles import SparseModel
from swarmcpp.node.preparing import draft_bytes
from swarmcpp.node.remote import serve_generate
from swarmcpp.node.requests import Requests
from swarmcpp.node.view import chain_text, node_row, request_rows
from swarmcpp.peers import Address, Capability, Load, NodeId, StageOffer
from swarmcpp.pipeline.chains import Pipelines
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.pipeline.service import StageService
from swarmcpp.sharing.blocks import SharedBlocks
from swarmcpp.sharing.copies import StageCopies
from swarmcpp.sharing.modelserver import ModelServer
from swarmcpp.sharing.offers import Served, SwarmModels
from swarmcpp.status import EventRow, SwarmStatus
from swarmcpp.supervisor.runner import LOCAL
from swarmcpp.swarm.discovery import Discovery, lan_addresses
from swarmcpp.swarm.endpoint import Responder
from swarmcpp.swarm.identity import MAX_TOKEN_ADDRESSES, JoinToken, SwarmKey
from swarmcpp.swarm.membership import PeerView, Status
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.store import Identity, SwarmStore
from swarmcpp.swarm.trust import TrustBook
from swarmcpp.wire.peers import (
    AskStage,
    BlockPage,
    Caller,
    FetchBlocks,
    Generate,
    GetChunk,
    GetManifest,
    ListBlocks,
    RunStage,
)

logger = logging.getLogger(__name__)

TELL_S: Final = 0.25
"""How often the node looks at itself for news."""

STAGES_S: Final = 2.0
"""How often what changes with every request is told of stages."""

SAVE_S: Final = 30.0
"""How often trust and peers are written, when they changed."""

ANY_HOST = ("0.0.0.0", "::")


class Swarm:
    """One node's part in the swarm. Every method runs on the event loop of `start`."""

    def __init__(
        self, config: Config, key: SwarmKey, store: SwarmStore, identity: Identity, *, clock: Clock = time.monotonic
    ) -> None:
        self._config = config
        self._store = store
        self._identity = identity
        self._clock = clock
        self._hardware = read_hardware()
        self._draft_bytes = draft_bytes(config)
        self._addresses: tuple[Address, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []
        self._discovery: Discovery | None = None
        self._saved = clock()
        self._remembered: tuple[Address, ...] = ()
        self._files = ModelServer()
        self.key = key
        self.mesh = Mesh(key, identity, self, clock=clock)
        self.trust = TrustBook(store.trust_path, clock)
        self.models = SwarmModels(self.mesh, config.storage.data_dir)
        self.stages = StageService(
            identity.node_id,
            self.mesh.caller,
            clock,
            alive=self.mesh.membership.is_alive,
            on_offer=lambda ref, source, keys: self.copies.offered(ref, source, keys),
        )
        compression = config.inference.activation_compression
        self.pipelines = Pipelines(identity.node_id, self.mesh, self.stages, compression=compression)
        self._own: Capability | None = None
        self._told: tuple[StageOffer, ...] = ()
        self._told_at = clock()
        self.blocks = SharedBlocks(config, key, self.mesh, self.trust, self.models, clock)
        self.copies = StageCopies(
            identity.node_id,
            self.pipelines,
            self.mesh.caller,
            self.blocks.context,
            replicate=config.inference.replicate_kv,
            clock=clock,
        )
        queue_size = config.server.queue_size
        self.requests = Requests(identity.node_id, queue_size, self.mesh, self.models, self.blocks, clock)
        self.mesh.announcer.capability(self.capability())

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self, hosts: Sequence[str], port: int, known: Sequence[Address], *, discover: bool) -> None:
        """Listen at `hosts`, dial whom is known, and look for others on the network. Raises PortInUse."""
        endpoint = self.mesh.endpoint
        await endpoint.listen(hosts, port)
        shown = [each for host in hosts for each in (lan_addresses() if host in ANY_HOST else [host])]
        self._addresses = tuple(Address(host, endpoint.port, self._identity.keys.public) for host in shown)
        self.mesh.announcer.capability(self.capability())
        self.mesh.start()
        for address in known:
            self.mesh.dial((address,), kept=True)
        self._tasks.append(asyncio.create_task(self._clockwork(), name="swarm clockwork"))
        if discover and self._addresses:
            self._discovery = Discovery(
                self.key.swarm_id, self._addresses[0], lambda found: self.mesh.dial((found,)), interfaces=shown
            )
            self._tasks.append(asyncio.create_task(self._discovery.start(), name="discovery"))

    async def close(self) -> None:
        """Leave, and save what is known of peers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._discovery:
            await self._discovery.close()
        await self.blocks.close()
        await self.copies.close()
        await asyncio.to_thread(self._save)
        await self.mesh.close()
        self.models.close()

    @property
    def public_key(self) -> str:
        """This node's own."""
        return self._identity.keys.public

    def distrust(self, caller: Caller, why: str) -> None:
        """A peer, known by its link, did what no honest one does."""
        for node, link in self.mesh.callers().items():
            if link is caller:
                self.trust.wrong(node, why)

    @property
    def token(self) -> JoinToken:
        """What another machine needs to join."""
        return JoinToken(self.key, self._addresses[:MAX_TOKEN_ADDRESSES])

    @property
    def node_id(self) -> NodeId:
        """This node's own."""
        return self._identity.node_id

    def serve(self, served: Served) -> None:
        """Offer a model that this node answers for."""
        self.models.serve(served)
        self.mesh.announcer.capability(self.capability())

    def give(self, manifest: Manifest, files: Sequence[Path]) -> None:
        """Give a model's files to peers. Raises BadModel when they are gone."""
        self._files.offer(manifest, files)

    def give_parts(self, parts: SparseModel) -> None:
        """Give the chunks of a model that are here to peers."""
        self._files.offer_parts(parts)

    async def _clockwork(self) -> None:
        """Tell news of this node, and save now and then."""
        while True:
            await asyncio.sleep(TELL_S)
            try:
                await self._tick()
            except Exception:
                # A node that says nothing more is soon taken for dead, whatever was wrong here.
                logger.exception("the swarm's clockwork failed")

    async def _tick(self) -> None:
        self.mesh.announcer.capability(self.capability())
        now, addresses = self._clock(), self.mesh.addresses()
        # A peer that was just met is written at once: this node may be killed before the next time.
        if addresses == self._remembered and now - self._saved < SAVE_S:
            return
        self._saved, self._remembered = now, addresses
        await asyncio.to_thread(self._save)
        self._hardware = await asyncio.to_thread(read_hardware)
        if self._discovery:
            await self._discovery.refresh()

    def _save(self) -> None:
        self.trust.save()
        self._store.remember(self.mesh.addresses())

    def capability(self) -> Capability:
        """See `PeerService`."""
        served = self.models.served
        states = [each.runner.status.state for each in served]
        caches = [each.replica.supervisor.cache for each in served if each.replica]
        self._own = Capability(
            node=self._identity.node_id,
            boot=self._identity.boot,
            name=self._config.swarm.name or platform.node(),
            addresses=self._addresses,
            pub_port=self.mesh.endpoint.pub_port,
            version=__version__,
            # Requests for a model whose engine is just restarted wait for it here.
            state="ready" if "ready" in states else next(iter(states), "starting"),
            cpu=self._hardware.cpu_model,
            cores=self._hardware.physical_cores,
            memory_total=self._hardware.memory_total,
            memory_free=self._hardware.memory_available,
            models=tuple(each.offer for each in served if each.runner.usable),
            load=_load([each.runner.load(self.requests.tally.ttft_s) for each in served]),
            hits=self.requests.tally.hits(),
            blocks=sum(cache.stats().blocks for cache in caches if cache),
            observed_latencies=self.mesh.links.observed(),
            stages=self._stages(),
            memory_model=self._memory_model(),
        )
        return self._own

    def _stages(self) -> tuple[StageOffer, ...]:
        """This node's stages. Their times and free sequences change with every request, and are told now and then."""
        now, offers = self._clock(), self.pipelines.offers()
        same = [_settled(each) for each in offers] == [_settled(each) for each in self._told]
        if not same or now - self._told_at >= STAGES_S:
            self._told, self._told_at = offers, now
        return self._told

    def _memory_model(self) -> int:
        whole = (each.replica.status.resident_bytes for each in self.models.served if each.replica)
        resident = self.pipelines.resident_bytes + sum(whole)
        limit = self._config.engine.memory_bytes
        free = self._hardware.memory_available + resident
        room = free if limit is None else min(limit, free)
        return max(0, room - self._draft_bytes)

    def capabilities(self) -> list[Capability]:
        """What the nodes that can be asked now say of themselves, this one first."""
        self.capability()
        return self.told()

    def told(self) -> list[Capability]:
        """As `capabilities`, this node as it was told last: for what is asked often, or by `capability` itself."""
        callers = self.mesh.callers()
        peers = [view.capability for view in self.mesh.membership.peers() if view.capability.node in callers]
        return [self._own, *peers] if self._own else peers

    def chain_text(self, chain: Sequence[StageRef]) -> str:
        """A chain of stages as users see it."""
        return chain_text(chain, {each.node: each.name for each in self.told()})

    # -- what peers ask ------------------------------------------------------------------------------------------

    async def generate(self, message: Generate, respond: Responder) -> None:
        """See `PeerService`."""
        served = self.models.own(message.request.model)
        if served is None:
            raise UnknownModel(f"model {message.request.model[:80]!r} is not served by this node", param="model")

        async def run(request: GenerateRequest) -> AsyncGenerator[TokenPart, None]:
            with self.requests.tracked(request, lambda: _for_peer(served.runner.route(request.id))) as row:
                async with aclosing(self.requests.run_here(served.runner, request)) as parts:
                    async for part in parts:
                        row.count(part)
                        yield part

        limits = Limits(ctx_size=served.runner.ctx_size, n_vocab=served.offer.n_vocab)
        await serve_generate(message, respond.send, run, limits)

    async def fetch_blocks(self, message: FetchBlocks, respond: Responder) -> None:
        """See `PeerService`."""
        reply, frames = await (self.blocks.server(message.root) or self.copies).answer(message)
        respond.send(reply, frames)

    async def list_blocks(self, message: ListBlocks, respond: Responder) -> None:
        """See `PeerService`."""
        sequence, server = self.mesh.announcer.sequence, self.blocks.server(message.root)
        respond.send(server.list_page(message, sequence) if server else BlockPage((), sequence, False))

    async def model_file(self, message: GetManifest | GetChunk, respond: Responder) -> None:
        """See `PeerService`."""
        reply, payload = await self._files.answer(message)
        respond.send(reply, payload)

    async def stage(self, message: AskStage, respond: Responder) -> None:
        """See `PeerService`."""
        await self.stages.answer(message, respond)

    def begin_pass(self, message: RunStage, payload: list[memoryview], respond: Responder) -> None:
        """See `PeerService`."""
        self.stages.begin(message, payload, respond)

    # -- status --------------------------------------------------------------------------------------------------

    def status(self) -> SwarmStatus:
        """The swarm as this node sees it."""
        now = self._clock()
        own = PeerView(self.capability(), Status.ALIVE, 0.0)
        views = (own, *self.mesh.membership.peers())
        return SwarmStatus(
            node=self._identity.node_id,
            swarm=self.key.swarm_id,
            nodes=tuple(node_row(view, self.mesh, self.trust, is_self=view is own) for view in views),
            requests=request_rows(self.requests.running(), now),
            events=tuple(EventRow(now - at, text) for at, text in self.mesh.events),
            at=time.time(),
        )


def _load(loads: Sequence[Load]) -> Load:
    """Of a node's engines together: they share its cores. Rates cannot be added; those of the first one are told."""
    return replace(
        loads[0] if loads else Load(),
        slots_busy=sum(each.slots_busy for each in loads),
        waiting=sum(each.waiting for each in loads),
        backlog=sum(each.backlog for each in loads),
    )


def _for_peer(route: str) -> str:
    return "for a peer" if route == LOCAL else f"for a peer, {route}"


def _settled(offer: StageOffer) -> StageOffer:
    """An offer without what changes with every request."""
    return replace(offer, free=0, pass_s=())
