"""The transfer of a model's chunks from several holders: who is asked for what, and when it is given up."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from swarmcpp.core import Clock
from swarmcpp.errors import BadRequest, DownloadFailed, SwarmError
from swarmcpp.models.capacity import gigabytes
from swarmcpp.models.download import BACKOFF_S, PullProgress, Sleep
from swarmcpp.models.manifest import FileChunk, Manifest
from swarmcpp.wire.peers import Caller, ChunkReply, GetChunk

WINDOW = 4
"""Chunks under way at one holder: its link stays full while one is read there and another is checked here."""
FIRST_WINDOW = 2
SLOW_CHUNK_S = 10.0
"""A holder that takes longer than this is asked for one chunk at a time, so that none comes near the time-out."""
CHUNK_TIMEOUT_S = 60.0
"""One chunk at 0.6 Mbit/s."""
TICK_S = 0.25
"""How often new holders and late chunks are looked for when nothing arrives."""
RESCUE_FACTOR = 2.0
RESCUE_MIN_S = 0.5
"""At the end, a chunk that is later than this, or than so many times what another holder takes, is asked for there."""
MEAN_SHARE = 0.3
"""What the newest chunk counts in the mean time of a holder's chunks."""
PATIENCE_S = 15.0
"""How long a transfer that no peer can feed waits for one that can."""

Fallback = Callable[[FileChunk], Awaitable[bytes]]
"""Gives chunks that no peer has. Raises DownloadFailed when it never will, another SwarmError when it may later."""


class ChunkTarget(Protocol):
    """Where chunks go."""

    @property
    def manifest(self) -> Manifest:
        """What the chunks are of."""

    def store(self, index: int, data: bytes | memoryview) -> bool:
        """Check and write chunk `index`; False when these are not its bytes. Blocking. Raises OSError."""


class _WrongBytes(Exception):
    """A holder sent something else than the chunk."""


@dataclass(slots=True, eq=False)
class _Holder:
    caller: Caller | None
    """None: the fallback."""
    listed: bool = True
    dropped: bool = False
    window: int = FIRST_WINDOW
    chunk_s: float = 0.0
    """Mean time of its chunks; 0: none yet."""
    failures: int = 0
    resting_until: float = 0.0
    asked: set[int] = field(default_factory=set)
    lacks: set[int] = field(default_factory=set)
    """Chunks that it refused: nodes may hold parts of a model."""
    given: int = -1
    """The chunk that it gave last."""

    def may_give(self, index: int) -> bool:
        """It is worth waiting for."""
        return self.listed and not self.dropped and index not in self.lacks


@dataclass(frozen=True, slots=True)
class _Ask:
    holder: _Holder
    index: int
    started: float


class Transfer:
    """Brings `missing` chunks of the `total` bytes that are wanted. A single task decides; one task per chunk under way
    asks, checks and writes."""

    def __init__(
        self,
        target: ChunkTarget,
        missing: set[int],
        total: int,
        final: Path,
        holders: Callable[[], Sequence[Caller]],
        progress: Callable[[PullProgress], None],
        rejected: Callable[[Caller], None],
        clock: Clock,
        fallback: Fallback | None = None,
    ) -> None:
        self._target = target
        self._manifest = target.manifest
        self._fingerprint = target.manifest.fingerprint
        self._missing = missing
        self._pending = deque(sorted(missing))
        """Missing chunks that no holder is asked for now."""
        self._final = final
        self._list_holders = holders
        self._fallback = fallback
        self._holders: dict[int, _Holder] = {} if fallback is None else {id(fallback): _Holder(None)}
        """By the identity of their caller, which they keep alive."""
        self._asks: dict[asyncio.Task[None], _Ask] = {}
        self._withdrawn: set[asyncio.Task[None]] = set()
        self._progress = progress
        self._rejected = rejected
        self._clock = clock
        self._started = self._hopeful_at = clock()
        self._total = total
        self._done = total - sum(self._manifest.chunk(index).size for index in missing)
        self._received = 0
        self._reason = "none was found"

    async def run(self, sleep: Sleep) -> None:
        """Until nothing is missing. Raises DownloadFailed when no holder is left, OSError when writing fails."""
        tick: asyncio.Future[None] | None = None
        self._report()
        try:
            while self._missing:
                self._list()
                self._ask_more()
                self._check_hope()
                if tick is None or tick.done():
                    tick = asyncio.ensure_future(sleep(TICK_S))
                finished, _ = await asyncio.wait({*self._asks, tick}, return_when=asyncio.FIRST_COMPLETED)
                for task in self._asks.keys() & finished:
                    # Another one of these may have ended it meanwhile.
                    if task in self._asks:
                        self._settle(task)
                self._report()
        finally:
            for task in list(self._asks):
                self._withdraw(task)
            if tick is not None:
                tick.cancel()
            await asyncio.gather(*self._withdrawn, *([tick] if tick else []), return_exceptions=True)

    def _list(self) -> None:
        """Learn which holders there are now."""
        callers = {id(caller): caller for caller in self._list_holders()}
        for key, caller in callers.items():
            self._holders.setdefault(key, _Holder(caller))
        for key, holder in list(self._holders.items()):
            holder.listed = holder.caller is None or key in callers
            # One that was dropped is kept: it must not begin anew when it is listed again.
            if not (holder.listed or holder.asked or holder.dropped):
                del self._holders[key]

    def _ask_more(self) -> None:
        now = self._clock()
        for holder in self._holders.values():
            if holder.dropped or not holder.listed or now < holder.resting_until:
                continue
            while len(holder.asked) < holder.window:
                index = self._next(holder, now)
                if index is None:
                    break
                holder.asked.add(index)
                self._asks[asyncio.ensure_future(self._fetch(holder, index))] = _Ask(holder, index, now)

    def _next(self, holder: _Holder, now: float) -> int | None:
        """The chunk to ask `holder` for: one that nobody is asked for, else the latest of those that others owe."""
        index = self._pick(holder)
        if index is not None:
            self._pending.remove(index)
            return index
        if holder.caller is None:
            return None
        started: dict[int, float] = {}
        for ask in self._asks.values():
            started[ask.index] = max(ask.started, started.get(ask.index, ask.started))
        patience = max(RESCUE_FACTOR * holder.chunk_s, RESCUE_MIN_S)
        late = (index for index, since in started.items() if now - since > patience and index not in holder.asked)
        return min((index for index in late if holder.may_give(index)), key=started.__getitem__, default=None)

    def _pick(self, holder: _Holder) -> int | None:
        """A pending chunk for `holder`; for the fallback one that no peer has."""
        if holder.caller is None:
            peers = [peer for peer in self._holders.values() if peer.caller is not None]
            mine = (index for index in self._pending if not any(peer.may_give(index) for peer in peers))
            return next((index for index in mine if holder.may_give(index)), None)
        if not holder.lacks:
            return next(iter(self._pending), None)
        known = [index for index in self._pending if index not in holder.lacks]
        if holder.given + 1 in known:
            return holder.given + 1
        # What it has is next to what it has: asking in order could take thousands of refusals to come there.
        return random.choice(known) if known else None

    async def _fetch(self, holder: _Holder, index: int) -> None:
        data: bytes | memoryview
        if holder.caller is not None:
            reply, payload = await holder.caller.ask(GetChunk(self._fingerprint, index), timeout_s=CHUNK_TIMEOUT_S)
            if not isinstance(reply, ChunkReply) or len(payload) != 1:
                raise _WrongBytes
            data = payload[0]
        else:
            assert self._fallback is not None
            data = await self._fallback(self._manifest.chunk(index))
        if not await asyncio.to_thread(self._target.store, index, data):
            raise _WrongBytes

    def _settle(self, task: asyncio.Task[None]) -> None:
        """Take note of how an ask ended. Raises what no other holder can mend."""
        ask = self._forget(task)
        try:
            task.result()
        except _WrongBytes:
            if ask.holder.caller is not None:
                self._drop(ask.holder, "a peer sent wrong bytes")
                self._rejected(ask.holder.caller)
            else:
                self._drop(ask.holder, "what its URL has now is another model")
        except BadRequest as error:
            ask.holder.lacks.add(ask.index)
            self._reason = shown(error)
        except DownloadFailed as error:
            self._drop(ask.holder, shown(error))
        except SwarmError as error:
            self._failed(ask, error)
        else:
            self._stored(ask)
        self._requeue(ask.index)

    def _stored(self, ask: _Ask) -> None:
        size = self._manifest.chunk(ask.index).size
        self._missing.discard(ask.index)
        self._done += size
        self._received += size
        for task in [task for task, other in self._asks.items() if other.index == ask.index]:
            self._withdraw(task)
        holder = ask.holder
        holder.given = ask.index
        took = self._clock() - ask.started
        holder.chunk_s += (took - holder.chunk_s) * (MEAN_SHARE if holder.chunk_s else 1.0)
        holder.window = WINDOW if holder.chunk_s < SLOW_CHUNK_S else 1
        holder.failures = 0

    def _failed(self, ask: _Ask, error: SwarmError) -> None:
        holder = ask.holder
        if ask.started < holder.resting_until:
            # All that was under way breaks together: one failure, not several.
            return
        if holder.failures == len(BACKOFF_S):
            self._drop(holder, shown(error))
            return
        self._reason = shown(error)
        holder.window = 1
        holder.resting_until = self._clock() + BACKOFF_S[holder.failures]
        holder.failures += 1

    def _drop(self, holder: _Holder, reason: str) -> None:
        holder.dropped = True
        self._reason = reason
        for task, ask in list(self._asks.items()):
            if ask.holder is holder:
                self._withdraw(task)
                self._requeue(ask.index)

    def _withdraw(self, task: asyncio.Task[None]) -> None:
        self._forget(task)
        self._withdrawn.add(task)
        task.add_done_callback(self._withdrawn.discard)
        # An error that came before the end of its task has nobody else to look at it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        task.cancel()

    def _forget(self, task: asyncio.Task[None]) -> _Ask:
        ask = self._asks.pop(task)
        ask.holder.asked.discard(ask.index)
        return ask

    def _requeue(self, index: int) -> None:
        if index in self._missing and index not in self._pending and all(a.index != index for a in self._asks.values()):
            self._pending.appendleft(index)

    def _check_hope(self) -> None:
        now = self._clock()
        able = (holder for holder in self._holders.values() if holder.listed and not holder.dropped)
        if self._asks or any(not self._missing <= holder.lacks for holder in able):
            self._hopeful_at = now
        elif now - self._hopeful_at > PATIENCE_S:
            raise DownloadFailed(
                f"{self._final}: {gigabytes(self._done)} of {gigabytes(self._total)} are here, and no peer is "
                f"left that gives the rest ({self._reason}); start a node that has the model and run the same command "
                "again: it goes on from there"
            )

    def _report(self) -> None:
        elapsed = self._clock() - self._started
        rate = self._received / elapsed if elapsed > 0 else 0.0
        self._progress(PullProgress(self._final.name, self._done, self._total, rate))


def shown(error: SwarmError) -> str:
    """What a peer may have written, as a part of one line."""
    return " ".join(str(error).split())[:200]
