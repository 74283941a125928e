"""A node's side of its engine: start it, feed it, and when it dies start it again and resume what ran there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from swarmcpp.core import EngineState, EngineStats, GenerateRequest, KvLayout
from swarmcpp.engine.abortflag import AbortFlag
from swarmcpp.errors import EngineFailed, NotReady, StartupError, SwarmError, WireError, revive
from swarmcpp.kv.cache import Grant, Lease, PrefixCache
from swarmcpp.swarm.link import NodeLink
from swarmcpp.wire import (
    BlocksFull,
    BlocksStored,
    Cancel,
    EngineOptions,
    Fault,
    Forget,
    Load,
    LoadProgress,
    Ready,
    StepOut,
    Stop,
    StoreBlocks,
    Submit,
    TokenOut,
    UseArena,
)

logger = logging.getLogger(__name__)

MAX_CRASHES = 3
"""Deaths of its own making, without a token in between, after which a model (or one request) is given up."""

MAX_KILLS = 10
"""The same for deaths by SIGKILL or SIGTERM: somebody else's doing, the OOM killer's perhaps, and worth more tries."""

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pause before the n-th restart in a row. The first is immediate: readers are waiting in mid-sentence."""

STOP_GRACE_S = 3.0

FAULT_EXIT = 1
"""Exit code of an engine that sent a Fault (and of one with an uncaught exception)."""

CHECK_S = 10.0
"""How long the block of a finished check is waited for."""

LAST_WORDS_S = 1.0
"""How long the messages and the stderr of an engine that exited are waited for."""

_EXTERNAL = {-int(signal.SIGTERM), -int(getattr(signal, "SIGKILL", signal.SIGTERM))}


class EngineStream:
    """One request on the engine, across as many engine processes as it takes.

    `async for` yields a TokenOut per token, in order, each token once; after the one with `finish` it ends. An error
    that ends the request is raised instead. Not more than `request.max_tokens` entries are ever buffered.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.serial = 0
        self.tokens: list[int] = list(request.generated)
        self.finished = False
        self.deaths = 0
        self.ready: deque[TokenOut] = deque()
        self.error: SwarmError | None = None
        self.lease: Lease | None = None
        self.chain: tuple[tuple[int, ...], str] | None = None
        """Tokens and salt whose blocks are loaded in place of the request's own; see `EngineSupervisor.recompute`."""
        self.wake = asyncio.Event()

    def push(self, out: TokenOut) -> None:
        """Take a token from the engine."""
        self.deaths = 0
        self.tokens.append(out.token)
        self.ready.append(out)
        self.finished = out.finish is not None
        self.wake.set()

    def fail(self, error: SwarmError) -> None:
        """End the request with `error`."""
        self.error = error
        self.finished = True
        self.wake.set()

    async def __aiter__(self) -> AsyncIterator[TokenOut]:
        while True:
            while self.ready:
                out = self.ready.popleft()
                yield out
                if out.finish is not None:
                    return
            if self.error is not None:
                raise self.error
            self.wake.clear()
            await self.wake.wait()


@dataclass(slots=True)
class Incarnation:
    """One engine process and what belongs to it alone."""

    process: asyncio.subprocess.Process
    link: NodeLink
    abort: AbortFlag
    directory: tempfile.TemporaryDirectory[str]
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=30))
    grants: dict[int, deque[Grant]] = field(default_factory=dict)
    """By serial, in the order of their StoreBlocks."""

    def close(self) -> None:
        """Release everything but the process."""
        self.link.close()
        self.abort.close()
        self.directory.cleanup()


@dataclass(slots=True)
class _Check:
    """A block that is computed again, see `EngineSupervisor.recompute`."""

    key: bytes = b""
    stored: asyncio.Event = field(default_factory=asyncio.Event)


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


class EngineSupervisor:
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
        self._options = options
        self._on_change = on_change
        self._sleep = sleep
        self._command = command
        self._open_cache = open_cache
        self.cache: PrefixCache | None = None
        """The node's blocks, once an engine has told the shape of its KV."""
        self._opening: asyncio.Task[PrefixCache | None] | None = None
        self._streams: dict[int, EngineStream] = {}
        self._checks: dict[str, _Check] = {}
        """By salt."""
        self._serial = 0
        self._deaths = 0
        self._incarnation: Incarnation | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._fault: SwarmError | None = None
        self.status = EngineStatus()
        self.stats = EngineStats(slots=options.slots, slots_busy=0, waiting=0)

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
        """Stop the engine; unfinished streams fail with NotReady."""
        self._set(state="stopped", detail="shutting down")
        self._fail_all(NotReady("this node is shutting down"))
        if self._incarnation:
            await self._end(self._incarnation)
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
                incarnation = self._incarnation = await self._launch()
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

    async def _launch(self) -> Incarnation:
        with contextlib.ExitStack() as undo:
            directory = tempfile.TemporaryDirectory(prefix="swarmcpp-", ignore_cleanup_errors=True)
            undo.callback(directory.cleanup)
            abort_file = Path(directory.name) / "abort"
            abort = AbortFlag(abort_file, create=True)
            undo.callback(abort.close)
            link = NodeLink()
            # A link that is dropped with its socket open blocks for ever when it is collected.
            undo.callback(link.close)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                # Ctrl-C belongs to the node, which then stops the engine in order.
                start_new_session=sys.platform != "win32",
            )
            undo.pop_all()
        incarnation = Incarnation(process, link, abort, directory)
        if process.stdin:
            ticket = {**link.ticket, "abort_file": str(abort_file)}
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps(ticket).encode() + b"\n")
                await process.stdin.drain()
        self._set(pid=process.pid)
        return incarnation

    async def _attend(self, incarnation: Incarnation) -> int:
        """Handle an engine's messages until it exits; its exit code."""
        pump = asyncio.create_task(self._pump(incarnation), name="engine messages")
        errors = asyncio.create_task(self._collect_stderr(incarnation), name="engine stderr")
        try:
            exited = asyncio.create_task(incarnation.process.wait())
            await asyncio.wait({exited, pump}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                await self._dismiss(pump, exited, incarnation)
            code = await exited
            await asyncio.wait({errors}, timeout=LAST_WORDS_S)
            if code == FAULT_EXIT:
                # The exit may be noticed before the Fault that explains it.
                await asyncio.wait({pump}, timeout=LAST_WORDS_S)
            return code
        finally:
            pump.cancel()
            errors.cancel()
            await asyncio.gather(pump, errors, return_exceptions=True)
            if incarnation.process.returncode is None:
                incarnation.process.kill()
                await incarnation.process.wait()

    async def _dismiss(self, pump: asyncio.Task[None], exited: asyncio.Task[int], incarnation: Incarnation) -> None:
        """End an engine that has said its last: a Fault, or a frame that is none of ours."""
        error = pump.exception()
        # An engine that cannot be written to has died, of what its exit code tells.
        if error and not isinstance(error, EngineFailed):
            # Such an engine cannot be trusted with more.
            self._fault = error if isinstance(error, SwarmError) else EngineFailed(f"engine messages: {error!r}")
        else:
            await asyncio.wait({exited}, timeout=STOP_GRACE_S)
        if not exited.done():
            incarnation.process.kill()

    async def _end(self, incarnation: Incarnation) -> None:
        with contextlib.suppress(EngineFailed):
            incarnation.link.send(Stop())
        try:
            await asyncio.wait_for(incarnation.process.wait(), STOP_GRACE_S)
        except TimeoutError:
            incarnation.process.kill()
            await incarnation.process.wait()

    async def _collect_stderr(self, incarnation: Incarnation) -> None:
        if incarnation.process.stderr is None:
            return
        while True:
            try:
                line = await incarnation.process.stderr.readline()
            except ValueError:
                # Longer than the reader's buffer; it is dropped, so that the engine never blocks on a full pipe.
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            incarnation.stderr.append(text)
            logger.debug("engine: %s", text)

    # -- messages ------------------------------------------------------------------------------------------------

    async def _pump(self, incarnation: Incarnation) -> None:
        """Handle messages until a Fault, which is the last one. Raises WireError."""
        introduced = False
        while True:
            message = await incarnation.link.receive()
            if not introduced:
                introduced = True
                incarnation.link.send(Load(options=self._options))
            match message:
                case StepOut():
                    self._on_step(message)
                case LoadProgress(fraction=fraction):
                    self._set(load_fraction=fraction)
                case Ready():
                    await self._on_ready(incarnation, message)
                case BlocksFull():
                    self._on_full(incarnation, message)
                case BlocksStored():
                    self._on_stored(incarnation, message)
                case Fault(code=code, message=text):
                    self._fault = revive(code, text)
                    return

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
        # One by one: should this engine fail in between, the next one finds the rest.
        for waiting, stream in list(self._streams.items()):
            try:
                self._place(incarnation, stream)
            except WireError as error:
                stream.fail(error)
            del self._streams[waiting]

    def _on_step(self, step: StepOut) -> None:
        self.stats = step.stats
        if step.tokens:
            self._deaths = 0
        for out in step.tokens:
            stream = self._streams.get(out.serial)
            if stream is None:
                continue
            self._end_lease(stream, out)
            stream.push(out)
            if out.finish is not None:
                del self._streams[out.serial]
        for refusal in step.refused:
            if stream := self._streams.pop(refusal.serial, None):
                self._end_lease(stream)
                stream.fail(revive(refusal.code, refusal.message))

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Requests that are waiting or running."""
        return len(self._streams)

    def submit(self, request: GenerateRequest, *, chain: tuple[tuple[int, ...], str] | None = None) -> EngineStream:
        """Queue a request; while an engine restarts it waits for the next one. Raises NotReady, WireError.

        `chain`: tokens and salt whose blocks are loaded in place of the request's own.
        """
        if self.status.state in ("failed", "stopped"):
            raise NotReady(self.status.detail or "the engine is not running")
        stream = EngineStream(request)
        stream.chain = chain
        if self._incarnation and self.status.state == "ready":
            self._place(self._incarnation, stream)
        else:
            self._serial += 1
            self._streams[self._serial] = stream
        return stream

    def _place(self, incarnation: Incarnation, stream: EngineStream) -> None:
        """Give a stream to this engine under a new serial, from where it stands."""
        self._serial += 1
        stream.serial = self._serial
        request = replace(stream.request, generated=tuple(stream.tokens))
        if self.cache:
            self._end_lease(stream)
            chain = stream.chain or ((*request.prompt, *request.generated), request.cache_salt)
            stream.lease = self.cache.lease(*chain)
        blocks = stream.lease.refs if stream.lease else ()
        try:
            incarnation.link.send(Submit(serial=self._serial, request=request, blocks=blocks))
        except WireError:
            self._end_lease(stream)
            raise
        except EngineFailed:
            # It has just died, which is noticed a moment later, or reads no more. The next one finds the stream.
            with contextlib.suppress(ProcessLookupError):
                incarnation.process.kill()
        self._streams[self._serial] = stream

    def cancel(self, stream: EngineStream) -> None:
        """Drop a request at once; a prompt in the middle of a step is aborted. Finished streams are ignored."""
        stream.finished = True
        self._streams = {serial: other for serial, other in self._streams.items() if other is not stream}
        self._end_lease(stream)
        if stream.serial and self._incarnation and self.status.state == "ready":
            with contextlib.suppress(EngineFailed):
                self._incarnation.link.send(Cancel(serial=stream.serial))
            self._incarnation.abort.abort_prompt(stream.serial)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _end_lease(self, stream: EngineStream, out: TokenOut | None = None) -> None:
        """The engine needs a stream's blocks no more; `out`, its first token, tells which of them were sound."""
        lease, stream.lease = stream.lease, None
        if lease is None or self.cache is None:
            return
        told = out is not None and (out.tier == "arena" or out.bad_blocks)
        self.cache.release(lease, out.cached_tokens if told and out else None)

    def _on_full(self, incarnation: Incarnation, full: BlocksFull) -> None:
        if self.cache is None:
            return
        check = self._checks.get(full.salt)
        if check:
            grant, key = self.cache.grant_check(full.tokens, full.salt)
            if grant.grants:
                check.key = key
            else:
                check.stored.set()
        else:
            grant = self.cache.grant(full.tokens, full.salt)
        # Even when nothing is wanted: the engine keeps the slot for the answer.
        incarnation.grants.setdefault(full.serial, deque()).append(grant)
        incarnation.link.send(StoreBlocks(serial=full.serial, grants=grant.grants))

    def _on_stored(self, incarnation: Incarnation, stored: BlocksStored) -> None:
        waiting = incarnation.grants.get(stored.serial)
        if self.cache is None or not waiting:
            return
        grant = waiting.popleft()
        self.cache.enter(grant, stored.written)
        if not waiting:
            del incarnation.grants[stored.serial]
        for check in self._checks.values():
            if any(block.key == check.key for block in grant.blocks.values()):
                check.stored.set()

    async def recompute(self, tokens: tuple[int, ...], salt: str, block_tokens: int) -> bytes | None:
        """Compute the last full block of `tokens` again, on top of the blocks before it that the arena has.

        `tokens` has at least one token after that block. Returns the key under which the arena holds the result until
        the caller drops it; None when that could not be done. Raises NotReady, EngineFailed.
        """
        if self.cache is None:
            return None
        before = (len(tokens) // block_tokens - 1) * block_tokens
        # A salt of its own: nothing else is read from what this computes, and it is stored under a key of its own.
        own_salt = f"check {secrets.token_hex(16)}"
        request = GenerateRequest(own_salt, "", tokens, 1, cache_salt=own_salt)
        check = self._checks[own_salt] = _Check()
        # The result must not take the place of the block that it is for, which as a copy goes before all others.
        cache, lease = self.cache, self.cache.lease(tokens, salt)
        try:
            stream = self.submit(request, chain=(tokens[: before + 1], salt))
            try:
                async for _ in stream:
                    pass
                async with asyncio.timeout(CHECK_S):
                    await check.stored.wait()
            except TimeoutError:
                return None
            finally:
                if not stream.finished:
                    self.cancel(stream)
        finally:
            cache.release(lease)
            del self._checks[own_salt]
        return check.key or None

    def forget(self) -> None:
        """Let the engine use none of the KV that it has, after blocks that it may have loaded were found to be wrong.

        Drop them from the cache first.
        """
        if self._incarnation and self.status.state == "ready":
            # A dead engine has forgotten.
            with contextlib.suppress(EngineFailed):
                self._incarnation.link.send(Forget())

    def _end_blocks(self, incarnation: Incarnation) -> None:
        """An engine is gone: nothing is read or written by it any more."""
        for stream in self._streams.values():
            self._end_lease(stream)
        if self.cache:
            for waiting in incarnation.grants.values():
                for grant in waiting:
                    self.cache.enter(grant, ())
        incarnation.grants.clear()

    # -- deaths --------------------------------------------------------------------------------------------------

    def _after_death(self, code: int, incarnation: Incarnation) -> None:
        """Decide what an exit means: restart, or give up."""
        self.stats = EngineStats(slots=self._options.slots, slots_busy=0, waiting=0)
        if self._fault and isinstance(self._fault, StartupError):
            self._give_up(self._fault)
            return
        self._deaths += 1
        # With a fault, a SIGKILL was the supervisor's own.
        limit = MAX_KILLS if code in _EXTERNAL and self._fault is None else MAX_CRASHES
        reason = _describe_exit(code, incarnation.stderr, self._fault)
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
        for serial, stream in list(self._streams.items()):
            stream.deaths += 1
            if stream.deaths >= limit:
                del self._streams[serial]
                stream.fail(EngineFailed(f"the engine died {stream.deaths} times on this request ({reason})"))
        self._set(state="restarting", detail=reason, restarts=self.status.restarts + 1, pid=0, load_fraction=0.0)

    def _give_up(self, error: SwarmError) -> None:
        self._fault = error
        self._fail_all(error if not isinstance(error, StartupError) else NotReady(str(error)))
        self._set(state="failed", detail=str(error), pid=0)

    def _fail_all(self, error: SwarmError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)


def _describe_exit(code: int, stderr: deque[str], fault: SwarmError | None) -> str:
    """An exit code with its signal's name and the last thing the engine said."""
    if fault is not None:
        return str(fault)
    try:
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        what = f"signal {-code}"
    last = next((line for line in reversed(stderr) if line.strip()), "")
    return f"{what}: {last}" if last else what
