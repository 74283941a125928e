"""Blocks of a prompt from peers: who has them, and whether that is faster than computing them.

On a slow link it may be faster that the engine computes the first blocks while peers send those after them: a block is
valid whatever computed its predecessors.

Whatever peers do, a fetch ends in time and with blocks that passed every check, or with none: a clean miss. It never
raises for what a peer did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarmcpp.peers import NodeId
from swarmcpp.sharing.fetchcontext import FetchContext, Front, Store
from swarmcpp.sharing.fetchrun import FetchRun
from swarmcpp.sharing.shipping import LONGEST_S, Encoding, Shipment, ShipPlan, Source, decide, plan_copy
from swarmcpp.telemetry import diag

logger = logging.getLogger(__name__)

MAX_SOURCES: Final = 4
"""Peers that share a run from its start; others step in for what none of these has."""


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """`keys` are those of the prompt's usable full blocks, the first `have` of which are here already.

    `queue_s`: how long the local engine is busy with others anyway; `deadline_s`: what is left of the request's time.
    """

    root: bytes
    keys: Sequence[bytes]
    have: int
    block_bytes: int
    block_tokens: int
    prefill_tps: float = 0.0
    queue_s: float = 0.0
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class FetchResult:
    """`blocks` of peers were stored; `sources[i]` sent the i-th of them. `bytes` came in all.

    They follow those that were there and the `first` ones that the engine here computed. `reason` says why not more:
    empty when all came that trusted peers have.
    """

    blocks: int
    bytes: int
    seconds: float
    reason: str
    sources: tuple[NodeId, ...] = ()
    encoding: Encoding = "f16"
    first: int = 0


async def fetch_prefix(
    context: FetchContext, query: PrefixQuery, store: Store, front: Front | None = None
) -> FetchResult:
    """Bring the missing blocks of a prompt from peers into `store`, in order, when that is worth the time.

    With `front` the first of them may be computed here instead, and the fetch then ends after that.
    """
    begun = context.clock()
    ids = [context.block_id(key) for key in query.keys[query.have :]]
    held = _held(context, query.root, ids)
    if not held:
        return _missed(context, "off" if context.settings.trust_min > 1 else "no-holder", begun)
    peers = _best(context, held)
    what = _shipment(context, query, len(held), can_split=front is not None)
    plan = decide(what, _sources(context, held, peers), context.settings.kv_wire)
    if not plan.n_blocks:
        return _missed(context, plan.reason, begun, ship_s=plan.ship_s, compute_s=plan.compute_s)
    back = slice(plan.first, plan.first + plan.n_blocks)
    computing: asyncio.Task[bool] | None = None
    if plan.first and front:
        _tell_split(plan)
        computing = asyncio.create_task(front(plan.first), name="front of a prompt")
        peers = _best(context, held[back])
    have = query.have + plan.first
    run = FetchRun(context, query.root, have, ids[back], held[back], what, plan, store, computing)
    return await _drive(query, run, peers, begun)


async def fetch_copy(context: FetchContext, query: PrefixQuery, source: NodeId, store: Store) -> FetchResult:
    """Bring the missing blocks of a chain, which nobody waits for, from `source` into `store`, in order."""
    begun = context.clock()
    if not _usable(context, source):
        return _missed(context, "no-holder", begun)
    ids = [context.block_id(key) for key in query.keys[query.have :]]
    held = [{source} for _ in ids]
    what = _shipment(context, query, len(ids), can_split=False)
    plan = plan_copy(what, _sources(context, held, [source]), context.settings.kv_wire)
    if not plan.n_blocks:
        return _missed(context, plan.reason, begun, ship_s=plan.ship_s)
    ids, held = ids[: plan.n_blocks], held[: plan.n_blocks]
    run = FetchRun(context, query.root, query.have, ids, held, what, plan, store, waited_for=False)
    return await _drive(query, run, [source], begun)


async def _drive(query: PrefixQuery, run: FetchRun, peers: Sequence[NodeId], begun: float) -> FetchResult:
    """Fetch as planned, beginning with `peers`, and tell what came of it."""
    context, plan = run.context, run.plan
    reason = "cancelled"
    try:
        reason = await run.drive(peers)
    finally:
        await run.end(slow=reason in ("overtaken", "timed-out"))
    result = FetchResult(
        blocks=run.stored,
        bytes=run.received,
        seconds=context.clock() - begun,
        reason=reason,
        sources=tuple(run.sources),
        encoding=plan.encoding,
        first=0 if reason == "front-failed" else plan.first,
    )
    _tell(context, query, result, run.receiving_s - plan.rtt_s)
    for peer in set(run.sources) - run.wrong:
        context.trust.ok(peer)
    return result


def _held(context: FetchContext, root: bytes, ids: Sequence[bytes]) -> list[set[NodeId]]:
    """Peers that are trusted, reachable and hold a block, for the leading run of `ids` that has any."""
    held: list[set[NodeId]] = []
    if not ids or context.settings.trust_min > 1:
        return held
    usable: dict[NodeId, bool] = {}
    for (found, peers), block in zip(context.holders.holders(root, ids), ids, strict=False):
        for peer in peers:
            if peer not in usable:
                usable[peer] = _usable(context, peer)
        able = {peer for peer in peers if usable[peer]}
        if found != block or not able:
            break
        held.append(able)
    return held


def _usable(context: FetchContext, peer: NodeId) -> bool:
    return context.trust.trusted(peer, context.settings.trust_min) and context.callers(peer) is not None


def _shipment(context: FetchContext, query: PrefixQuery, n_blocks: int, *, can_split: bool) -> Shipment:
    return Shipment(
        n_blocks=n_blocks,
        block_bytes=query.block_bytes,
        block_tokens=query.block_tokens,
        prefill_tps=query.prefill_tps,
        queue_s=query.queue_s,
        limit_s=LONGEST_S if query.deadline_s is None else query.deadline_s,
        own_bytes_per_s=context.links.own_bytes_per_s(),
        can_split=can_split,
    )


def _best(context: FetchContext, held: Sequence[set[NodeId]]) -> list[NodeId]:
    """Who is asked first: by trust, then rate. Others are asked for what these do not have or fail to send."""
    rate = context.links.bytes_per_s
    order = sorted(set().union(*held), key=lambda peer: (-context.trust.score(peer), -rate(peer), peer))
    # A slow peer that is given the next blocks of the run would hold up all that others send after them.
    fastest = max(rate(peer) for peer in order)
    return [peer for peer in order if rate(peer) >= fastest / 4][:MAX_SOURCES]


def _sources(context: FetchContext, held: Sequence[set[NodeId]], peers: Sequence[NodeId]) -> list[Source]:
    """What peers add to the rate: who has half of the blocks counts half."""
    counts = Counter(peer for able in held for peer in able)
    links = context.links
    return [Source(links.rtt_s(peer), links.bytes_per_s(peer) * counts[peer] / len(held)) for peer in peers]


def _missed(context: FetchContext, reason: str, begun: float, **details: float) -> FetchResult:
    diag(logger, "cross-node prefix MISS", reason=reason, **details)
    return FetchResult(0, 0, context.clock() - begun, reason)


def _tell_split(plan: ShipPlan) -> None:
    diag(
        logger,
        "cross-node prefix SPLIT",
        computed_blocks=plan.first,
        shipped_blocks=plan.n_blocks,
        compute_s=round(plan.front_s, 3),
        ship_s=round(plan.ship_s, 3),
        encoding=plan.encoding,
    )


def _tell(context: FetchContext, query: PrefixQuery, result: FetchResult, receiving_s: float) -> None:
    ms = round(1000 * result.seconds, 3)
    if not result.blocks:
        diag(logger, "cross-node prefix MISS", reason=result.reason, bytes=result.bytes, ms=ms)
        return
    context.links.add_total(result.bytes, receiving_s)
    diag(
        logger,
        "cross-node prefix HIT",
        peer=",".join(sorted(set(result.sources))),
        blocks=result.blocks,
        tokens=result.blocks * query.block_tokens,
        bytes=result.bytes,
        ms=ms,
        encoding=result.encoding,
        ended=result.reason or None,
    )
