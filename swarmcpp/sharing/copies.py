"""KV of stages, copied to another node with the same layers: should a stage's node vanish in the middle of answers,
that one goes on from there, and little has to be computed again.

The node that has stored blocks offers them; the other one fetches them like any blocks of peers, from a node that it
knows and as far as it trusts it. Nobody can push KV to anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from swarmcpp.core import TILE_ROWS, Clock
from swarmcpp.errors import SwarmError
from swarmcpp.kv.arena import Hashed
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.llama import kvwire
from swarmcpp.peers import NodeId
from swarmcpp.pipeline.calls import hop
from swarmcpp.pipeline.chains import OwnStage, Pipelines
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.route.passes import pass_s
from swarmcpp.sharing.blocks import tell_on_loop
from swarmcpp.sharing.blockserver import BlockServer, Governor
from swarmcpp.sharing.fetch import PrefixQuery, fetch_copy
from swarmcpp.sharing.fetchcontext import FetchContext
from swarmcpp.telemetry import diag
from swarmcpp.wire.peers import Blocks, Caller, FetchBlocks, OfferBlocks

logger = logging.getLogger(__name__)

SHARE: Final = 0.5
"""Of the time that computing a block takes, its copy may take the link under `auto`: prompts go on beside it."""

OFFER_TIMEOUT_S: Final = 5.0
AT_ONCE: Final = 2
MAX_WAITING: Final = 64
"""Offers that wait, of this node and of others. More are forgotten: what they would have saved is computed again, if it
comes to that."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """A stage of this node whose blocks can be fetched."""

    stage: OwnStage
    cache: PrefixCache
    server: BlockServer


class StageCopies:
    """Copies of one node's stages, and those that it keeps for others. Used on the event loop's thread."""

    def __init__(
        self,
        own: NodeId,
        pipelines: Pipelines,
        callers: Callable[[NodeId], Caller | None],
        context: FetchContext,
        *,
        replicate: str,
        clock: Clock,
    ) -> None:
        """`replicate` is the setting `replicate_kv`; `context` that of the node's fetches."""
        self._own = own
        self._pipelines = pipelines
        self._callers = callers
        self._context = context
        self._replicate = replicate
        self._clock = clock
        self._shared: dict[StageRef, _Shared] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what this node has ----------------------------------------------------------------------------------------

    def others(self, ref: StageRef) -> list[NodeId]:
        """Nodes that run the same layers and are to stay, the one with the best link first."""
        links = self._context.links
        found = [
            seen.ref.node
            for seen in self._pipelines.seen(ref.fingerprint)
            if (seen.ref.first, seen.ref.last) == (ref.first, ref.last)
            and seen.ref.node != ref.node
            and not seen.offer.draining
        ]
        return sorted(found, key=lambda node: (-links.bytes_per_s(node), node))

    def wanted(self, chain: Sequence[StageRef]) -> bool:
        """Whether blocks of requests that still run on `chain` are to be stored: a stage of it has a double, which
        decides what of them it fetches."""
        return self._replicate != "off" and any(self.others(ref) for ref in chain)

    def stored(self, stage: OwnStage, keys: Sequence[bytes]) -> None:
        """The arena of `stage` has got blocks of a chain; offer them to another node."""
        cache = stage.supervisor.cache
        # What came of rounded rows is given to nobody.
        exact = cache.exact_keys(keys) if cache else 0
        if self._replicate == "off" or not exact:
            return
        self._share(stage)
        if others := self.others(stage.ref):
            self._spawn(self._offer(replace(stage.ref, node=others[0]), tuple(keys[:exact])))

    def _share(self, stage: OwnStage) -> None:
        cache, known = stage.supervisor.cache, self._shared.get(stage.ref)
        if cache is None or (known and known.cache is cache):
            return
        # What may be fetched has just been computed, which took thirty times as long: no limit is needed.
        governor = Governor(lambda: False, self._clock)
        server = BlockServer(cache.arena_root, cache.read_block, kvwire.quantise, self._context.block_id, governor)

        def changed(added: list[bytes], dropped: list[bytes]) -> None:
            server.remove(dropped)
            server.add(added)

        tell_on_loop(cache, changed)
        server.add(cache.all_keys())
        self._shared[stage.ref] = _Shared(stage, cache, server)

    async def _offer(self, there: StageRef, keys: tuple[bytes, ...]) -> None:
        caller = self._callers(there.node)
        if caller is None:
            return
        try:
            await caller.ask(OfferBlocks(there.fingerprint, hop(there), self._own, keys), timeout_s=OFFER_TIMEOUT_S)
        except SwarmError as error:
            logger.debug("%s does not take an offer of blocks: %s", there.node, error)

    def drop(self, ref: StageRef) -> None:
        """A stage of this node is gone."""
        self._shared.pop(ref, None)

    async def answer(self, message: FetchBlocks) -> tuple[Blocks, list[bytes | memoryview]]:
        """Blocks of stages for a peer; none of a root that no stage has. Raises QueueFull."""
        for shared in self._shared.values():
            if shared.cache.arena_root == message.root:
                return await shared.server.answer(message)
        return Blocks(()), []

    # -- what others have ------------------------------------------------------------------------------------------

    def offered(self, ref: StageRef, source: NodeId, keys: Sequence[bytes]) -> None:
        """A peer has blocks of a stage that this node runs too; fetch them if that is worth it."""
        stage = self._pipelines.own(ref)
        # Whoever sends an offer says whose it is, which need not be true.
        if stage is None or source not in self.others(ref) or len(self._tasks) >= MAX_WAITING:
            return
        cache = stage.supervisor.cache
        if cache is None or len(keys) > stage.supervisor.status.ctx_size // cache.block_tokens:
            return
        if self._affordable(stage, cache, source):
            self._spawn(self._fetch(stage, source, keys))

    def _affordable(self, stage: OwnStage, cache: PrefixCache, source: NodeId) -> bool:
        settings, links = self._context.settings, self._context.links
        if self._replicate == "off" or settings.trust_min > 1:
            return False
        if not self._context.trust.trusted(source, settings.trust_min):
            return False
        if self._replicate == "on":
            return True
        row_s = pass_s(stage.times.curve(), TILE_ROWS, stage.ref.last - stage.ref.first) / TILE_ROWS
        ship_s = cache.block_bytes / links.bytes_per_s(source)
        return links.rate_known(source) and ship_s <= SHARE * row_s * cache.block_tokens

    async def _fetch(self, stage: OwnStage, source: NodeId, keys: Sequence[bytes]) -> None:
        async with self._places:
            cache = stage.supervisor.cache
            have = cache.held_keys(keys) if cache else 0
            if cache is None or have == len(keys):
                return

            async def store(first: int, payloads: Sequence[Hashed], *, exact: bool) -> int:
                return await asyncio.to_thread(cache.insert, keys, first, payloads, exact=exact)

            query = PrefixQuery(
                root=cache.arena_root,
                keys=keys,
                have=have,
                block_bytes=cache.block_bytes,
                block_tokens=cache.block_tokens,
            )
            result = await fetch_copy(self._context, query, source, store)
        diag(
            logger,
            "KV copied",
            source=source,
            layers=f"{stage.ref.first}-{stage.ref.last}",
            blocks=result.blocks,
            of=len(keys) - have,
        )

    # -- tasks -----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="copies of KV")
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("blocks could not be copied", exc_info=error)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
