"""Blocks that are shared: this node's for its peers, and theirs for its requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, cast

from swarmcpp.config import Config
from swarmcpp.core import Clock, GenerateRequest, SamplingParams
from swarmcpp.errors import SwarmError
from swarmcpp.kv.arena import Hashed
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.llama import kvwire
from swarmcpp.peers import NodeId
from swarmcpp.sharing.blockserver import BlockServer, Governor
from swarmcpp.sharing.fetch import FetchResult, PrefixQuery, fetch_prefix
from swarmcpp.sharing.fetchcontext import FetchContext, FetchSettings, Front
from swarmcpp.sharing.offers import SwarmModels
from swarmcpp.sharing.shipping import KvWire
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.runner import Fetched
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.swarm.identity import SwarmKey
from swarmcpp.swarm.mesh import Mesh
from swarmcpp.swarm.trust import TrustBook
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

MAX_ORIGINS: Final = 65536
MAX_DIFFERENCE: Final = 0.25
"""Relative RMS in the worst piece of a block. Other kernels and Q8_0 before it make some percent; KV of other tokens
differs by more than 1."""

CHECK_POLL_S: Final = 0.5
CHECK_PATIENCE_S: Final = 60.0
"""How long a check waits for an idle engine before it is given up."""

STORE_POLL_S: Final = 0.01
STORE_PATIENCE_S: Final = 5.0
"""How long the blocks of a front that is computed may take to be in the arena."""


class SharedBlocks:
    """One node's arenas in its swarm, one for each model that is whole here. Used on the event loop's thread."""

    def __init__(
        self, config: Config, key: SwarmKey, mesh: Mesh, trust: TrustBook, models: SwarmModels, clock: Clock
    ) -> None:
        inference = config.inference
        self._block_tokens = inference.prefix_cache_block_tokens
        self._key = key
        self._mesh = mesh
        self._models = models
        self._clock = clock
        self._trust = trust
        self._random = random.SystemRandom()
        self._check: asyncio.Task[None] | None = None
        self._origin: dict[bytes, NodeId] = {}
        """Who sent a block, by its key."""
        self._servers: dict[bytes, BlockServer] = {}
        """By the root of what they give."""
        self._fetching: dict[bytes, asyncio.Event] = {}
        self.context = FetchContext(
            holders=mesh.holders,
            callers=mesh.caller,
            links=mesh.links,
            trust=trust,
            dequantise=kvwire.dequantise,
            block_id=key.block_id,
            settings=FetchSettings(
                kv_wire=cast(KvWire, inference.kv_wire), trust_min=inference.cross_node_prefix_trust_min
            ),
            clock=clock,
        )

    @property
    def can_fetch(self) -> bool:
        """Whether blocks of peers are used at all."""
        return self.context.settings.trust_min <= 1

    def server(self, root: bytes) -> BlockServer | None:
        """What gives the blocks of a root to peers."""
        return self._servers.get(root)

    def use(self, cache: PrefixCache) -> None:
        """Share the blocks of a cache, the only one of its model from now on."""
        root = cache.root
        server = BlockServer(root, cache.read_block, kvwire.quantise, self._key.block_id, self._governor())
        before = self._servers.get(root)
        gone = before.clear() if before else []
        self._servers[root] = server

        def changed(added: list[bytes], dropped: list[bytes]) -> None:
            if self._servers.get(root) is server:
                lost, gained = server.remove(dropped), server.add(added)
                self._mesh.announcer.blocks_changed(root, gained, lost)

        tell_on_loop(cache, changed)
        self._mesh.announcer.blocks_changed(root, server.add(cache.all_keys()), gone)

    def _governor(self) -> Governor:
        return Governor(lambda: any(each.runner.stats.slots_busy for each in self._models.served), self._clock)

    def _whole(self, model: str) -> tuple[LocalReplica, PrefixCache] | None:
        """The engine of a model that is whole here, and its arena."""
        served = self._models.own(model)
        replica = served.replica if served else None
        cache = replica.supervisor.cache if replica else None
        return (replica, cache) if replica and cache else None

    def warm(self, request: GenerateRequest) -> tuple[int, dict[NodeId, int]]:
        """Tokens of a prompt, from the first, whose KV is in the arena here, and that each peer holds."""
        found = self._whole(request.model)
        if found is None:
            return 0, {}
        _, cache = found
        keys, have = cache.held((*request.prompt, *request.generated), request.cache_salt)
        counts: dict[NodeId, int] = {}
        ids = [self._key.block_id(key) for key in keys]
        for number, (_, nodes) in enumerate(self._mesh.holders.holders(cache.root, ids)):
            for node in nodes:
                if counts.get(node, 0) == number:
                    counts[node] = number + 1
        return have * self._block_tokens, {node: count * self._block_tokens for node, count in counts.items()}

    async def fetch(self, request: GenerateRequest) -> Fetched:
        """Bring the blocks of a prompt that peers hold into the arena, where that is worth it.

        On a slow link this node's engine may compute those before them for it meanwhile.
        """
        found = self._whole(request.model)
        if found is None:
            return Fetched()
        replica, cache = found
        tokens = (*request.prompt, *request.generated)
        keys, have = cache.held(tokens, request.cache_salt)
        if have < len(keys) and (running := self._fetching.get(keys[have])):
            # The same blocks are on their way for another request.
            await running.wait()
            keys, have = cache.held(tokens, request.cache_salt)
        if have == len(keys) or keys[have] in self._fetching:
            return Fetched()
        ended = self._fetching[keys[have]] = asyncio.Event()
        try:
            result = await self._fetch(cache, replica, request, keys, have, ended)
        finally:
            self._fetching = {key: event for key, event in self._fetching.items() if event is not ended}
            ended.set()
        self._fetched(replace(request, prompt=tokens, generated=()), keys, have + result.first, result)
        return Fetched(result.blocks * self._block_tokens, result.first * self._block_tokens)

    # -- spot checks ---------------------------------------------------------------------------------------------

    def _fetched(self, request: GenerateRequest, keys: Sequence[bytes], begin: int, result: FetchResult) -> None:
        """Note who sent which block from number `begin`, and now and then check one: a digest proves the bytes, not
        the arithmetic."""
        for key, peer in zip(keys[begin:], result.sources, strict=False):
            self._origin[key] = peer
        while len(self._origin) > MAX_ORIGINS:
            del self._origin[next(iter(self._origin))]
        if not result.blocks or not result.sources or self._check:
            return
        number = self._random.randrange(min(result.blocks, len(result.sources)))
        peer = result.sources[number]
        if self._random.random() < self._trust.spot_check_probability(peer):
            count = (begin + number + 1) * self._block_tokens
            checked = replace(request, prompt=request.prompt[: count + 1])
            self._check = asyncio.create_task(self._spot_check(checked, peer), name="spot check")
            self._check.add_done_callback(self._checked)

    def _checked(self, task: asyncio.Task[None]) -> None:
        self._check = None
        if not task.cancelled() and (error := task.exception()):
            logger.info("a spot check could not be made: %s", error)

    async def _spot_check(self, request: GenerateRequest, peer: NodeId) -> None:
        """Compute the last block of a prompt again on top of those before it, once the engine is idle, and compare."""
        found = self._whole(request.model)
        if found is None:
            return
        replica, cache = found
        tokens, salt, supervisor = request.prompt, request.cache_salt, replica.supervisor
        for _ in range(int(CHECK_PATIENCE_S / CHECK_POLL_S)):
            if not supervisor.active:
                break
            await asyncio.sleep(CHECK_POLL_S)
        else:
            return
        key = cache.keys(tokens, salt)[-1]
        again = await supervisor.recompute(tokens, salt, self._block_tokens)
        if again is None:
            return
        difference = await asyncio.to_thread(cache.compare, key, again)
        cache.drop([again])
        diag(logger, "spot-check", peer=peer, tokens=len(tokens) - 1, difference=difference)
        if difference is not None and difference > MAX_DIFFERENCE:
            self.poisoned(peer, f"its block differs by {difference:.2f} from what this node computes")

    def poisoned(self, peer: NodeId, why: str) -> None:
        """A peer sent KV that is not that of its tokens: trust it no more, and drop all that came from it."""
        self._trust.wrong(peer, why)
        self._mesh.note(f"{self._mesh.name(peer)} is not trusted any more: {why}")
        bad = [key for key, origin in self._origin.items() if origin == peer]
        for supervisor in [each.replica.supervisor for each in self._models.served if each.replica]:
            if supervisor.cache:
                supervisor.cache.drop(bad)
            # It may have loaded some of them.
            supervisor.forget()
        for key in bad:
            del self._origin[key]

    async def close(self) -> None:
        """End a check that is under way."""
        if self._check:
            self._check.cancel()
            await asyncio.gather(self._check, return_exceptions=True)

    # -- fetching ------------------------------------------------------------------------------------------------

    async def _fetch(
        self,
        cache: PrefixCache,
        replica: LocalReplica,
        request: GenerateRequest,
        keys: Sequence[bytes],
        have: int,
        ended: asyncio.Event,
    ) -> FetchResult:
        async def store(first: int, payloads: Sequence[Hashed], *, exact: bool) -> int:
            return await asyncio.to_thread(cache.insert, keys, first, payloads, exact=exact)

        async def front(n_blocks: int) -> bool:
            # Others must not fetch the blocks that follow, once those before them are here.
            self._fetching.setdefault(keys[have + n_blocks], ended)
            return await self._compute(cache, replica.supervisor, request, (have + n_blocks) * self._block_tokens)

        query = PrefixQuery(
            root=cache.root,
            keys=keys,
            have=have,
            block_bytes=cache.block_bytes,
            block_tokens=self._block_tokens,
            prefill_tps=replica.supervisor.stats.prefill_tps,
            deadline_s=request.deadline_s,
        )
        usable: Front | None = front if _idle_for(replica, request) else None
        return await fetch_prefix(self.context, query, store, usable)

    async def _compute(
        self, cache: PrefixCache, supervisor: EngineSupervisor, request: GenerateRequest, count: int
    ) -> bool:
        """Let the engine compute the first `count` tokens of a prompt, whole blocks; whether the arena has them then.

        It answers with a token that nobody reads: with its first token a request's blocks are stored.
        """
        prompt, generated = request.prompt[: count + 1], request.generated[: max(0, count + 1 - len(request.prompt))]
        front = replace(
            request,
            id=f"{request.id} front",
            prompt=prompt,
            generated=generated,
            max_tokens=len(generated) + 1,
            sampling=SamplingParams(temperature=0.0),
            stop=(),
        )
        try:
            stream = supervisor.submit(front)
            try:
                async for _ in stream:
                    pass
            finally:
                if not stream.finished:
                    supervisor.cancel(stream)
        except SwarmError as error:
            logger.info("the beginning of a prompt could not be computed: %s", error)
            return False
        for _ in range(int(STORE_PATIENCE_S / STORE_POLL_S)):
            keys, have = cache.held((*prompt, *generated), request.cache_salt)
            if have == len(keys):
                return True
            await asyncio.sleep(STORE_POLL_S)
        return False


def tell_on_loop(cache: PrefixCache, changed: Callable[[list[bytes], list[bytes]], None]) -> None:
    """Tell `changed` on this loop which keys of exact blocks a cache, whose threads are many, has gained and lost."""
    loop = asyncio.get_running_loop()

    def from_any_thread(added: list[bytes], dropped: list[bytes]) -> None:
        # The loop may have ended by then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed, added, dropped)

    cache.on_change = from_any_thread


def _idle_for(replica: LocalReplica, request: GenerateRequest) -> bool:
    """Whether the engine would begin with a prompt at once, and with no other one beside it: then it is as fast as it
    was measured to be."""
    supervisor, own = replica.supervisor, len(request.prompt) + len(request.generated)
    free = supervisor.stats.slots_busy < supervisor.stats.slots
    return supervisor.status.state == "ready" and free and replica.load().backlog <= own
