"""An engine process and its keeper: started, fed, and when it dies started again."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

from swarmcpp.core import EngineState, KvLayout
from swarmcpp.errors import EngineFailed, NotReady, StartupError, SwarmError, revive
from swarmcpp.kv.cache import Grant, PrefixCache
from swarmcpp.supervisor.incarnation import STOP_GRACE_S, Incarnation, describe_exit, launch
from swarmcpp.supervisor.nodelink import NodeLink
from swarmcpp.wire.engine import (
    BlocksStored,
    EngineOptions,
    Fault,
    FromEngine,
    Load,
    LoadProgress,
    Ran,
    Ready,
    StepOut,
    StoreBlocks,
    UseArena,
)

logger = logging.getLogger(__name__)

MAX_CRASHES = 3
"""Deaths of its own making, without a token in between, after which a model (or one request) is given up."""

MAX_KILLS = 10
"""The same for deaths by SIGKILL or SIGTERM: somebody else's doing, the OOM killer's perhaps, and worth more tries."""

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pause before the n-th restart in a row. The first is immediate: readers are waiting in mid-sentence."""

FAULT_EXIT = 1
"""Exit code of an engine that sent a Fault (and of one with an uncaught exception)."""

LAST_WORDS_S = 1.0
"""How long the messages and the stderr of an engine that exited are waited for."""

_EXTERNAL = {-int(signal.SIGTERM), -int(getattr(signal, "SIGKILL", signal.SIGTERM))}


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State of the supervised engine. `detail` says why it is not ready; `pid` is 0 when none runs."""

    state: EngineState = "starting"
    detail: str = ""
    load_fraction: float = 0.0
    ctx_size: int = 0
    slots: int = 0
    resident_bytes: int = 0
    restarts: int = 0
    pid: int = 0


class ProcessOptions(TypedDict, total=False):
    """What every EngineProcess may be given beside the options of its engine; see its `__init__`."""

    on_change: Callable[[EngineStatus], None]
    sleep: Callable[[float], Awaitable[None]]
    command: tuple[str, ...]
    open_cache: Callable[[KvLayout], PrefixCache | None]


class EngineProcess(ABC):
    """Keeps one engine alive. Every method runs on the event loop of `start`."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        on_change: Callable[[EngineStatus], None] = lambda _status: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        command: tuple[str, ...] = (sys.executable, "-m", "swarmcpp.worker"),
        open_cache: Callable[[KvLayout], PrefixCache | None] = lambda _layout: None,
    ) -> None:
        """`on_change` is told every status, `sleep` takes the pauses before launches, `command` is what is launched,
        and `open_cache` opens the arena for KV of a shape, in a thread."""
        self._options = options
        self._on_change = on_change
        self._sleep = sleep
        self._command = command
        self._open_cache = open_cache
        self.cache: PrefixCache | None = None
        """The node's blocks, once an engine has told the shape of its KV."""
        self._opening: asyncio.Task[PrefixCache | None] | None = None
        self._serial = 0
        self._deaths = 0
        self._incarnation: Incarnation | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._fault: SwarmError | None = None
        self.status = EngineStatus()

    # -- for those who know what it computes -----------------------------------------------------------------------

    @abstractmethod
    def _handle(self, incarnation: Incarnation, message: FromEngine, frame: bytes | None) -> None:
        """Apply a message of an engine that is ready, and the frame beside it. Raises WireError for one that makes no
        sense: the engine ends."""

    @abstractmethod
    def _serve(self, incarnation: Incarnation) -> None:
        """An engine has become ready: give it what waits."""

    @abstractmethod
    def _gone(self) -> None:
        """An engine is gone: nothing is read or written by it any more."""

    @abstractmethod
    def _count_death(self, limit: int, reason: str) -> None:
        """The engine died and another one is started. `limit`: deaths of one request after which that is given up."""

    @abstractmethod
    def _fail_all(self, error: SwarmError) -> None:
        """No other engine will be started: end all that waits with `error`."""

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model; `wait_ready` tells how it went."""
        self._task = asyncio.create_task(self._run(), name="engine supervisor")

    async def wait_ready(self) -> None:
        """Return once the engine is ready. Raises the StartupError or EngineFailed that says why it never will be."""
        while self.status.state != "ready":
            if self.status.state in ("failed", "stopped"):
                raise self._fault or NotReady("the engine was stopped")
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        """Stop the engine; what is unfinished fails with NotReady."""
        self._set(state="stopped", detail="shutting down")
        self._fail_all(NotReady("this node is shutting down"))
        if self._incarnation:
            await self._incarnation.end()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._opening:
            self.cache, self._opening = await self._opening, None
        if self.cache:
            self.cache.close()
            self.cache = None

    def _set(self, **changes: object) -> None:
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        self._changed.set()
        self._on_change(self.status)

    async def _run(self) -> None:
        """Launch engines, one after another, until one is told to stop or nothing more can be tried."""
        try:
            while self.status.state not in ("stopped", "failed"):
                await self._sleep(BACKOFF_S[min(max(self._deaths - 1, 0), len(BACKOFF_S) - 1)])
                incarnation = self._incarnation = await launch(self._command)
                self._set(pid=incarnation.process.pid)
                try:
                    code = await self._attend(incarnation)
                finally:
                    self._incarnation = None
                    self._end_blocks(incarnation)
                    incarnation.close()
                if self.status.state != "stopped":
                    self._after_death(code, incarnation)
        except Exception as error:
            logger.exception("the engine supervisor failed")
            self._give_up(EngineFailed(f"the engine supervisor failed: {error}"))

    async def _attend(self, incarnation: Incarnation) -> int:
        """Handle an engine's messages until it exits; its exit code."""
        link = incarnation.link
        link.start(partial(self._take, incarnation))
        errors = asyncio.create_task(incarnation.collect_stderr(), name="engine stderr")
        try:
            exited = asyncio.create_task(incarnation.process.wait())
            ends: set[asyncio.Future[Any]] = {exited, link.ended}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                await self._dismiss(link.ended, exited, incarnation)
            code = await exited
            ends = {errors}
            if link.connected or code == FAULT_EXIT:
                # An exit may be noticed before the last messages, of which one may be the Fault that explains it.
                ends.add(link.ended)
            await asyncio.wait(ends, timeout=LAST_WORDS_S)
            return code
        finally:
            errors.cancel()
            if incarnation.readying:
                incarnation.readying.cancel()
            await asyncio.gather(errors, *filter(None, (incarnation.readying,)), return_exceptions=True)
            if incarnation.process.returncode is None:
                incarnation.process.kill()
                await incarnation.process.wait()

    async def _dismiss(self, ended: asyncio.Future[None], exited: asyncio.Task[int], incarnation: Incarnation) -> None:
        """End an engine that has said its last: a Fault, or a frame that is none of ours."""
        error = ended.exception()
        # An engine that cannot be written to has died, of what its exit code tells.
        if error and not isinstance(error, EngineFailed):
            # Such an engine cannot be trusted with more.
            self._fault = error if isinstance(error, SwarmError) else EngineFailed(f"engine messages: {error!r}")
        else:
            await asyncio.wait({exited}, timeout=STOP_GRACE_S)
        if not exited.done():
            incarnation.process.kill()

    # -- messages ------------------------------------------------------------------------------------------------

    def _take(self, incarnation: Incarnation, message: FromEngine, frame: bytes | None) -> None:
        """Handle a message; a Fault is the last one. Raises WireError."""
        if not incarnation.introduced:
            incarnation.introduced = True
            incarnation.link.send(Load(options=self._options))
        match message:
            case Ran() | StepOut():
                # By far the most, so first.
                self._handle(incarnation, message, frame)
            case LoadProgress(fraction=fraction):
                self._set(load_fraction=fraction)
            case Ready():
                # It is given nothing to do before it is found ready, so nothing of it can come meanwhile.
                incarnation.readying = asyncio.create_task(self._on_ready(incarnation, message))
                incarnation.readying.add_done_callback(partial(_end_with, incarnation.link))
            case Fault(code=code, message=text):
                self._fault = revive(code, text)
                incarnation.link.end()
            case _:
                self._handle(incarnation, message, frame)

    async def _on_ready(self, incarnation: Incarnation, ready: Ready) -> None:
        if ready.layout is None:
            logger.info("no arena for this model: %s", ready.no_blocks)
        elif self.cache is None or not self.cache.in_place():
            if self.cache:
                # Its file was deleted, or another node has made one of that name: this engine could not use it.
                self.cache.close()
                self.cache = None
            if self._opening is None:
                # It reads the table of an arena, which may be large.
                self._opening = asyncio.create_task(asyncio.to_thread(self._open_cache, ready.layout))
            # A thread cannot be stopped: should this engine die meanwhile, the next one takes what it opens.
            self.cache = await asyncio.shield(self._opening)
            self._opening = None
        if self.cache:
            cache = self.cache
            incarnation.link.send(
                UseArena(path=str(cache.path), block_bytes=cache.block_bytes, n_blocks=cache.n_blocks)
            )
        self._set(
            state="ready",
            detail="",
            load_fraction=1.0,
            ctx_size=ready.ctx_size,
            slots=ready.slots,
            resident_bytes=ready.resident_bytes,
        )
        self._serve(incarnation)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _grant(self, incarnation: Incarnation, serial: int, grant: Grant) -> None:
        """Let the engine write blocks of `serial`; it answers every such message with BlocksStored, in their order."""
        incarnation.grants.setdefault(serial, deque()).append(grant)
        incarnation.link.send(StoreBlocks(serial=serial, grants=grant.grants))

    def _enter(self, incarnation: Incarnation, stored: BlocksStored) -> Grant | None:
        """Enter what an engine wrote; the grant that it had."""
        waiting = incarnation.grants.get(stored.serial)
        if self.cache is None or not waiting:
            return None
        grant = waiting.popleft()
        self.cache.enter(grant, stored.written)
        if not waiting:
            del incarnation.grants[stored.serial]
        return grant

    def _end_blocks(self, incarnation: Incarnation) -> None:
        self._gone()
        if self.cache:
            for waiting in incarnation.grants.values():
                for grant in waiting:
                    self.cache.enter(grant, ())
        incarnation.grants.clear()

    # -- deaths --------------------------------------------------------------------------------------------------

    def _after_death(self, code: int, incarnation: Incarnation) -> None:
        """Decide what an exit means: restart, or give up."""
        if self._fault and isinstance(self._fault, StartupError):
            self._give_up(self._fault)
            return
        self._deaths += 1
        # With a fault, a SIGKILL was the supervisor's own.
        limit = MAX_KILLS if code in _EXTERNAL and self._fault is None else MAX_CRASHES
        reason = describe_exit(code, incarnation.stderr, self._fault)
        self._fault = None
        logger.warning("the engine died (%s); death %d of %d in a row", reason, self._deaths, limit)
        if self._deaths >= limit:
            self._give_up(
                EngineFailed(
                    f"{self._options.model_path}: this model killed its engine {self._deaths} times in a row "
                    f"({reason}); it is not tried again. `swarmcpp doctor` checks this machine"
                )
            )
            return
        self._count_death(limit, reason)
        self._set(state="restarting", detail=reason, restarts=self.status.restarts + 1, pid=0, load_fraction=0.0)

    def _give_up(self, error: SwarmError) -> None:
        self._fault = error
        self._fail_all(error if not isinstance(error, StartupError) else NotReady(str(error)))
        self._set(state="failed", detail=str(error), pid=0)


def _end_with(link: NodeLink, task: asyncio.Task[None]) -> None:
    """End the link with the error of a task, if it had one."""
    if not task.cancelled() and (error := task.exception()) is not None:
        link.end(error if isinstance(error, Exception) else EngineFailed(repr(error)))
