"""Blocks for peers: what this node has, under ids that only members can compute, and a limit on what serving costs."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from swarmcpp.core import Clock
from swarmcpp.errors import QueueFull, SnapshotError
from swarmcpp.kv.arena import Hashed
from swarmcpp.sharing.shipping import can_quantise
from swarmcpp.telemetry import diag
from swarmcpp.wire.peers import MAX_FRAMES, MAX_IDS, BlockPage, Blocks, FetchBlocks, ListBlocks

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES: Final = 16 << 20
"""Of frames in one reply, unless its first block alone is larger."""

MAX_BUDGET_S: Final = 2.0
MAX_ANSWERS: Final = 8
"""Answers that are put together at once: it bounds their memory, since each is held as a whole."""

BUSY_SHARE: Final = 0.04
"""Of one core's time while the engine computes. Decoding waits for its slowest thread, so what serving takes from one
core is lost on all: 4% leaves room under the 5% that it may cost."""
BUSY_BURST_S: Final = 0.05
SEND_BYTES_PER_S: Final = 250e6
"""What one core encrypts and hands to the kernel."""

_RETRY_S = 1.0

Sleep = Callable[[float], Awaitable[None]]


class TokenBucket:
    """Seconds of work that may be done: `share` of the time that passes, `burst_s` saved up at most.

    Work is taken when its cost is known, so the balance may fall below 0; nothing is let in until it is above 0 again.
    """

    def __init__(self, share: float, burst_s: float, now: float) -> None:
        self._share = share
        self._burst_s = burst_s
        self._balance = burst_s
        self._at = now

    def wait_s(self, now: float) -> float:
        """Seconds until work may begin; 0: now."""
        self._refill(now)
        return 0.0 if self._balance > 0 else (1e-6 - self._balance) / self._share

    def take(self, seconds: float, now: float) -> None:
        """Work took `seconds`, or will; less than 0 gives back."""
        self._refill(now)
        self._balance = min(self._burst_s, self._balance - seconds)

    def _refill(self, now: float) -> None:
        # A clock that stands still or goes back gives nothing.
        self._balance = min(self._burst_s, self._balance + self._share * max(0.0, now - self._at))
        self._at = max(self._at, now)


class Governor:
    """Keeps serving from slowing the local engine: no limit while it is idle, 4% of a core while it is busy."""

    def __init__(self, busy: Callable[[], bool], clock: Clock, sleep: Sleep = asyncio.sleep) -> None:
        self.clock = clock
        self._busy = busy
        self._sleep = sleep
        self._bucket = TokenBucket(BUSY_SHARE, BUSY_BURST_S, clock())
        self._typical_s = 0.0

    async def admit(self, deadline: float) -> float | None:
        """Wait until a block may be served. The cost charged for it so far, None if that would be after `deadline`."""
        while self._busy():
            now = self.clock()
            wait_s = self._bucket.wait_s(now)
            if wait_s == 0:
                # Charged before it is known: others that ask meanwhile must not all be let in on the same balance.
                self._bucket.take(self._typical_s, now)
                return self._typical_s
            if now + wait_s > deadline:
                return None
            await self._sleep(wait_s)
        return 0.0

    def settle(self, charged_s: float, cost_s: float) -> None:
        """The block that was admitted for `charged_s` took `cost_s` of a core."""
        self._typical_s += (cost_s - self._typical_s) / 4 if self._typical_s else cost_s
        if charged_s or self._busy():
            self._bucket.take(cost_s - charged_s, self.clock())


@dataclass(frozen=True, slots=True)
class _Loaded:
    frame: Hashed | None
    """None: the block cannot be served."""
    cost_s: float


class BlockServer:
    """Answers peers for one model's cache. `read_block` (called in threads) gives the payload of a key, None if that
    is not there any more; `quantise` turns a payload into Q8_0; `root` is that of the model's offer."""

    def __init__(
        self,
        root: bytes,
        read_block: Callable[[bytes], Hashed | None],
        quantise: Callable[[bytes | memoryview], bytes],
        block_id: Callable[[bytes], bytes],
        governor: Governor,
    ) -> None:
        self._root = root
        self._read_block = read_block
        self._quantise = quantise
        self._block_id = block_id
        self._governor = governor
        self._clock = governor.clock
        self._keys: dict[bytes, bytes] = {}
        self._sorted: list[bytes] | None = None
        self._places = asyncio.Semaphore(MAX_ANSWERS)

    def add(self, keys: Iterable[bytes]) -> list[bytes]:
        """These blocks may be served from now on. Their ids."""
        found = {self._block_id(key): key for key in keys}
        self._keys.update(found)
        self._sorted = None
        return list(found)

    def clear(self) -> list[bytes]:
        """All blocks are gone. Their ids."""
        ids = list(self._keys)
        self._keys.clear()
        self._sorted = None
        return ids

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """These blocks are gone. Their ids."""
        ids = [self._block_id(key) for key in keys]
        for each in ids:
            self._keys.pop(each, None)
        self._sorted = None
        return ids

    def list_page(self, message: ListBlocks, sequence: int) -> BlockPage:
        """The ids after `message.after`; `sequence` is that of the last gossip sent. Empty for another root."""
        if message.root != self._root:
            return BlockPage((), sequence, False)
        if self._sorted is None:
            self._sorted = sorted(self._keys)
        begin = bisect_right(self._sorted, message.after)
        page = self._sorted[begin : begin + MAX_IDS]
        return BlockPage(tuple(page), sequence, begin + len(page) < len(self._sorted))

    async def answer(self, message: FetchBlocks) -> tuple[Blocks, list[bytes | memoryview]]:
        """The leading run of what was asked for, within budget and sizes; empty when the first block is not here.

        Raises QueueFull when there is no time to serve even the first one.
        """
        begun = self._clock()
        deadline = begun + min(message.budget_s, MAX_BUDGET_S)
        try:
            async with asyncio.timeout(max(0.0, deadline - begun)):
                await self._places.acquire()
        except TimeoutError:
            raise self._too_busy() from None
        try:
            frames = await self._run(message, deadline)
        finally:
            self._places.release()
        diag(
            logger,
            "served PrefixKvFetch",
            asked=len(message.ids),
            blocks=len(frames),
            bytes=sum(len(frame.data) for frame in frames),
            encoding=message.encoding,
            ms=round(1000 * (self._clock() - begun), 3),
            hit=bool(frames),
        )
        return Blocks(tuple(frame.digest for frame in frames)), [frame.data for frame in frames]

    async def _run(self, message: FetchBlocks, deadline: float) -> list[Hashed]:
        frames: list[Hashed] = []
        size = 0
        wanted = message.ids[:MAX_FRAMES] if message.root == self._root else ()
        for block in wanted:
            key = self._keys.get(block)
            if key is None or (frames and (size + size // len(frames) > MAX_REPLY_BYTES or self._clock() >= deadline)):
                break
            charged_s = await self._governor.admit(deadline)
            if charged_s is None:
                if not frames:
                    raise self._too_busy()
                break
            # An asker that cancels meanwhile has been charged: the thread goes on with its block.
            loaded = await asyncio.to_thread(self._load, key, message.encoding == "q8_0")
            self._governor.settle(charged_s, loaded.cost_s)
            if not loaded.frame:
                break
            frames.append(loaded.frame)
            size += len(loaded.frame.data)
        return frames

    def _load(self, key: bytes, quantised: bool) -> _Loaded:
        begun = time.thread_time()
        frame = self._read_block(key)
        if frame and quantised:
            try:
                frame = Hashed.of(self._quantise(frame.data)) if can_quantise(len(frame.data)) else None
            except SnapshotError:
                frame = None
        size = len(frame.data) if frame else 0
        return _Loaded(frame, time.thread_time() - begun + size / SEND_BYTES_PER_S)

    @staticmethod
    def _too_busy() -> QueueFull:
        return QueueFull("this node has no time to serve blocks now; compute, or ask another", retry_after=_RETRY_S)
