"""Model files from peers: several holders at once, every chunk checked before it is written, resumable."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarmcpp.core import Clock
from swarmcpp.errors import DownloadFailed, SwarmError
from swarmcpp.models.capacity import gigabytes
from swarmcpp.models.download import BACKOFF_S, SPARE_BYTES, FreeSpace, PullProgress, Sleep
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.modelfiles import ModelParts, stored_paths
from swarmcpp.models.partial import locked
from swarmcpp.peerwire import Caller, ChunkReply, GetChunk, GetManifest, ManifestReply

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


async def get_manifest(callers: Sequence[Caller], fingerprint: bytes, timeout_s: float) -> Manifest:
    """The manifest of a model from the first of its holders that gives the right one, each within `timeout_s`.

    Raises DownloadFailed when none does.
    """
    reason = "nobody has it"
    for caller in callers:
        try:
            reply, payload = await caller.ask(GetManifest(fingerprint), timeout_s=timeout_s)
            if isinstance(reply, ManifestReply) and len(payload) == 1:
                manifest = Manifest.from_bytes(payload[0])
                if manifest.fingerprint == fingerprint:
                    return manifest
            reason = "a peer answered with something else"
        except SwarmError as error:
            reason = _shown(error)
    raise DownloadFailed(
        f"model {fingerprint.hex()[:8]}: no peer told what its files are ({reason}); "
        "start a node that has the model, and run the same command again"
    )


async def fetch_model(
    manifest: Manifest,
    directory: Path,
    holders: Callable[[], Sequence[Caller]],
    *,
    progress: Callable[[PullProgress], None],
    rejected: Callable[[Caller], None],
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
    free_space: FreeSpace | None = None,
) -> tuple[Path, ...]:
    """Fetch a model's files into `directory` and return them; at once when they are there already.

    `holders` is called again and again: peers may come and go. One that sends wrong bytes is given to `rejected` and
    not asked any more. What arrived before an interruption stays in NAME.part, and a later call goes on from there.
    Where another model has the name, the beginning of the fingerprint is added to it. Raises DownloadFailed: which
    path, what is wrong, what to do.
    """
    tag = ""
    measure = free_space or _disk_free
    while True:
        finals = stored_paths(manifest, directory, tag)
        try:
            with locked(finals[0]):
                progress(PullProgress(finals[0].name, 0, manifest.size, 0.0, verifying=True))
                parts = await asyncio.to_thread(ModelParts.look, manifest, finals)
                if parts.clash and not tag:
                    tag = f"-{manifest.fingerprint.hex()[:8]}"
                    continue
                missing = await asyncio.to_thread(parts.prepare)
                _check_space(manifest, missing, directory, measure)
                await _Transfer(parts, missing, finals[0], holders, progress, rejected, clock).run(sleep)
                await asyncio.to_thread(parts.commit)
                return finals
        except OSError as error:
            raise _cannot_write(manifest, finals[0], measure, error) from None


def _disk_free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def _cannot_write(manifest: Manifest, final: Path, measure: FreeSpace, error: OSError) -> DownloadFailed:
    free = f"{gigabytes(measure(final.parent))} free" if final.parent.is_dir() else "no such directory"
    return DownloadFailed(
        f"{final}: cannot be written ({error.strerror or type(error).__name__}); "
        f"{gigabytes(manifest.size)} needed for the whole model, {free}; check the directory and the disk"
    )


def _check_space(manifest: Manifest, missing: set[int], directory: Path, measure: FreeSpace) -> None:
    needed = sum(manifest.chunk(index).size for index in missing) + SPARE_BYTES
    if missing and needed > (free := measure(directory)):
        raise DownloadFailed(
            f"{directory}: {gigabytes(needed)} needed for {manifest.files[0].name}, {gigabytes(free)} free; "
            "free disk space, or choose another directory with --data-dir"
        )


class _WrongBytes(Exception):
    """A holder sent something else than the chunk."""


@dataclass(slots=True, eq=False)
class _Holder:
    caller: Caller
    listed: bool = True
    dropped: bool = False
    window: int = FIRST_WINDOW
    chunk_s: float = 0.0
    """Mean time of its chunks; 0: none yet."""
    failures: int = 0
    resting_until: float = 0.0
    asked: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Ask:
    holder: _Holder
    index: int
    started: float


class _Transfer:
    """One run of fetch_model. A single task decides; one task per chunk under way asks, checks and writes."""

    def __init__(
        self,
        parts: ModelParts,
        missing: set[int],
        final: Path,
        holders: Callable[[], Sequence[Caller]],
        progress: Callable[[PullProgress], None],
        rejected: Callable[[Caller], None],
        clock: Clock,
    ) -> None:
        self._parts = parts
        self._manifest = parts.manifest
        self._fingerprint = parts.manifest.fingerprint
        self._missing = missing
        self._pending = deque(sorted(missing))
        """Missing chunks that no holder is asked for now."""
        self._final = final
        self._list_holders = holders
        self._holders: dict[int, _Holder] = {}
        """By the identity of their caller, which they keep alive."""
        self._asks: dict[asyncio.Task[None], _Ask] = {}
        self._withdrawn: set[asyncio.Task[None]] = set()
        self._progress = progress
        self._rejected = rejected
        self._clock = clock
        self._started = self._hopeful_at = clock()
        self._done = self._manifest.size - sum(self._manifest.chunk(index).size for index in missing)
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
            holder.listed = key in callers
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
        if self._pending:
            return self._pending.popleft()
        started: dict[int, float] = {}
        for ask in self._asks.values():
            started[ask.index] = max(ask.started, started.get(ask.index, ask.started))
        patience = max(RESCUE_FACTOR * holder.chunk_s, RESCUE_MIN_S)
        late = (index for index, since in started.items() if now - since > patience and index not in holder.asked)
        return min(late, key=started.__getitem__, default=None)

    async def _fetch(self, holder: _Holder, index: int) -> None:
        reply, payload = await holder.caller.ask(GetChunk(self._fingerprint, index), timeout_s=CHUNK_TIMEOUT_S)
        if not isinstance(reply, ChunkReply) or len(payload) != 1:
            raise _WrongBytes
        if not await asyncio.to_thread(self._parts.store, index, payload[0]):
            raise _WrongBytes

    def _settle(self, task: asyncio.Task[None]) -> None:
        """Take note of how an ask ended. Raises what no other holder can mend."""
        ask = self._forget(task)
        try:
            task.result()
        except _WrongBytes:
            self._drop(ask.holder, "a peer sent wrong bytes")
            self._rejected(ask.holder.caller)
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
            self._drop(holder, _shown(error))
            return
        self._reason = _shown(error)
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
        if self._asks or any(holder.listed and not holder.dropped for holder in self._holders.values()):
            self._hopeful_at = now
        elif now - self._hopeful_at > PATIENCE_S:
            raise DownloadFailed(
                f"{self._final}: {gigabytes(self._done)} of {gigabytes(self._manifest.size)} are here, and no peer is "
                f"left that gives the rest ({self._reason}); start a node that has the model and run the same command "
                "again: it goes on from there"
            )

    def _report(self) -> None:
        elapsed = self._clock() - self._started
        rate = self._received / elapsed if elapsed > 0 else 0.0
        self._progress(PullProgress(self._final.name, self._done, self._manifest.size, rate))


def _shown(error: SwarmError) -> str:
    """What a peer may have written, as a part of one line."""
    return " ".join(str(error).split())[:200]
