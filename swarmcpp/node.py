"""The node: what joins the model, its engine, the text side and the HTTP API into one running process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.config import Config
from swarmcpp.core import (
    ChatMessage,
    Done,
    Event,
    FinishReason,
    GenerateRequest,
    KvLayout,
    Limits,
    ModelInfo,
    NodeSnapshot,
    TextEvent,
    Timings,
    Usage,
)
from swarmcpp.errors import BadModel, Cancelled, NotReady, PromptTooLong, QueueFull, SwarmError, UnknownModel
from swarmcpp.hardware import Hardware, disk_free, read_hardware
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.probe import ProbeReport, probe
from swarmcpp.llama.text import TextStream
from swarmcpp.llama.vocab import VocabModel
from swarmcpp.models.capacity import choose_capacity
from swarmcpp.models.fingerprint import fingerprint
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.supervisor import EngineStatus, EngineStream, EngineSupervisor
from swarmcpp.wire import EngineOptions, TokenOut

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 30.0

DISK_SHARE = 10
"""A new arena takes at most one part in so many of the free disk,"""

MEMORY_SHARE = 4
"""and of the machine's memory: blocks are quick as long as the page cache can hold them."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is decided before the engine starts."""

    model: ModelFile
    info: ModelInfo
    options: EngineOptions
    hardware: Hardware
    probe: ProbeReport


def prepare(config: Config, path: Path, name: str | None = None) -> Prepared:
    """Check the model, the machine and its kernels. Blocking. Raises BadModel and NotEnoughMemory."""
    model = inspect(path)
    if not model.has_tokenizer:
        raise BadModel(f"{path}: has no tokenizer, so it cannot read text; get a GGUF of the whole model")
    hardware = read_hardware()
    ctx_size, slots = choose_capacity(model, hardware.memory_available, config.engine.ctx_size, config.engine.slots)
    report = probe(config.storage.data_dir)
    inference = config.inference
    options = EngineOptions(
        model_path=str(path.resolve()),
        ctx_size=ctx_size,
        slots=slots,
        threads=config.engine.threads or hardware.physical_cores,
        use_extra_bufts=report.chosen.use_extra_bufts,
        prefill_chunk_tokens=inference.prefill_chunk_tokens,
        prefill_budget_s=inference.prefill_budget_ms / 1000,
        continuous_batching=inference.continuous_batching,
        batched_prefill_forward=inference.batched_prefill_forward,
        prefix_block_tokens=inference.prefix_cache_block_tokens if inference.prefix_cache_enabled else 0,
    )
    info = ModelInfo(
        id=name or path.stem,
        path=str(path),
        architecture=model.architecture,
        description=f"{model.name} {model.ftype}",
        n_params=model.n_params,
        size_bytes=model.size_bytes,
        n_vocab=model.n_vocab,
        n_ctx_train=model.n_ctx_train,
        n_layers=model.n_layers,
        created=int(path.stat().st_mtime),
    )
    return Prepared(model, info, options, hardware, report)


class Node:
    """One served model. Satisfies `core.Service`; every method runs on its event loop."""

    def __init__(self, config: Config, prepared: Prepared, supervisor: EngineSupervisor) -> None:
        self._config = config
        self._prepared = prepared
        self._supervisor = supervisor
        self._vocab: VocabModel | None = None
        self._codec: ChatCodec | None = None
        self._names = {prepared.info.id, prepared.info.path, Path(prepared.info.path).name}

    async def start(self) -> None:
        """Load the model in its engine, then its vocabulary here. Raises StartupError, EngineFailed.

        In this order: a file that crashes llama.cpp has then done so in the engine, not in the node.
        """
        self._supervisor.start()
        await self._supervisor.wait_ready()
        path = Path(self._prepared.options.model_path)
        self._vocab = await asyncio.to_thread(VocabModel, path)
        self._codec = ChatCodec(self._vocab.vocab, self._prepared.model.chat_template)

    async def close(self) -> None:
        """Stop the engine and free the vocabulary."""
        await self._supervisor.close()
        if self._vocab:
            self._vocab.close()
            self._vocab = None

    # -- what the API asks -----------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """See `core.Service`."""
        return (self._prepared.info,)

    def snapshot(self) -> NodeSnapshot:
        """See `core.Service`."""
        status, stats = self._supervisor.status, self._supervisor.stats
        starting = status.state == "ready" and self._codec is None
        return NodeSnapshot(
            state="starting" if starting else status.state,
            detail=status.detail or (f"loading, {status.load_fraction:.0%}" if status.state == "starting" else ""),
            model=self._prepared.info,
            slots=self._prepared.options.slots,
            slots_busy=stats.slots_busy,
            ctx_size=self._prepared.options.ctx_size,
            queued=max(0, self._supervisor.active - stats.slots_busy),
            running=stats.slots_busy,
            restarts=status.restarts,
            prefill_tps=stats.prefill_tps,
            decode_tps=stats.decode_tps,
        )

    def limits(self) -> Limits:
        """See `core.Service`."""
        return Limits(
            ctx_size=self._supervisor.status.ctx_size or self._prepared.options.ctx_size,
            n_vocab=self._prepared.info.n_vocab,
        )

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = self._ready_codec(model)
        return tuple(await asyncio.to_thread(codec.tokenize_chat, messages, extra))

    async def tokenize_text(self, model: str, text: str) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = self._ready_codec(model)
        return tuple(await asyncio.to_thread(codec.tokenize_text, text))

    def _ready_codec(self, model: str) -> ChatCodec:
        if model not in self._names:
            raise UnknownModel(f"model {model!r} is not served here; this node serves {self._prepared.info.id!r}")
        if self._codec is None or self._supervisor.status.state in ("failed", "stopped"):
            raise NotReady(self.snapshot().detail or "the model is still loading")
        return self._codec

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See `core.Service`."""
        codec = self._ready_codec(request.model)
        request = self._admit(request)
        stream = self._supervisor.submit(request)
        text = TextStream(codec.piece, request.stop)
        timeout = request.deadline_s or self._config.server.request_timeout_s or None
        try:
            async with asyncio.timeout(timeout):
                async for event in _events(stream, text, asyncio.get_running_loop().time):
                    yield event
        except TimeoutError:
            raise Cancelled(f"the request took longer than its limit of {timeout:g} s") from None
        finally:
            if not stream.finished:
                self._supervisor.cancel(stream)

    def _admit(self, request: GenerateRequest) -> GenerateRequest:
        ctx_size = self.limits().ctx_size
        if len(request.prompt) >= ctx_size:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens and a slot holds {ctx_size} with the answer; "
                f"shorten it, or start swarmcpp with a larger --ctx-size",
                param="messages",
            )
        waiting = self._supervisor.active - self._prepared.options.slots
        if waiting >= self._config.server.queue_size:
            raise QueueFull(
                f"all {self._prepared.options.slots} slots are busy and {waiting} requests wait; try again later",
                retry_after=min(MAX_RETRY_AFTER_S, 1.0 + waiting / max(1, self._prepared.options.slots)),
            )
        return replace(request, max_tokens=min(request.max_tokens, ctx_size - len(request.prompt)))


async def _events(stream: EngineStream, text: TextStream, clock: Callable[[], float]) -> AsyncGenerator[Event, None]:
    """Tokens of a stream as text events, then Done."""
    first: TokenOut | None = None
    first_s = 0.0
    count = 0
    async for out in stream:
        if first is None:
            first, first_s = out, clock()
        count += 1
        # A token that ends the generation says nothing, even where the vocabulary gives it a text.
        piece = "" if out.finish == "stop" else text.feed(out.token)
        reason: FinishReason | None = "stop" if text.stopped else out.finish
        if reason:
            piece += text.finish()
            # A stop string that only the last, incomplete text completed.
            reason = "stop" if text.stopped else reason
        yield TextEvent(piece, (out.token,))
        if reason:
            timings = Timings(queue_s=first.queue_s, prefill_s=first.prefill_s, decode_s=clock() - first_s)
            yield Done(reason, Usage(len(stream.request.prompt), count, first.cached_tokens, first.tier), timings)
            return


def open_cache(config: Config, prepared: Prepared, layout: KvLayout) -> PrefixCache | None:
    """The node's blocks for a context of this shape; None, with a line in the log, when there can be none. Blocking."""
    block_tokens = config.inference.prefix_cache_block_tokens
    identity = KvIdentity(
        fingerprint=fingerprint(prepared.model.files, config.storage.data_dir),
        block_tokens=block_tokens,
        kv_types=(layout.k_type, layout.v_type),
    )
    directory = config.storage.data_dir / "arena"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        default = min(disk_free(directory) // DISK_SHARE, prepared.hardware.memory_total // MEMORY_SHARE)
        size = config.storage.cache_bytes
        arena = Arena.open(
            directory, identity.root(), layout.token_bytes * block_tokens, size, default, prepared.info.path
        )
    except OSError as error:
        logger.warning("no cache on disk: %s", error)
        return None
    if arena is None:
        return None
    return PrefixCache(arena, identity, config.inference.prefix_cache_max_entries)


@dataclass(frozen=True, slots=True)
class Serving:
    """A node that answers, and what its ready line says."""

    prepared: Prepared
    status: EngineStatus
    url: str
    cache_bytes: int
    """Size of the arena on disk; 0: none."""


async def run(
    config: Config,
    path: Path,
    *,
    name: str | None = None,
    on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    on_ready: Callable[[Serving], None] = lambda _serving: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve `path` until `stop` is set. Raises StartupError when it cannot start, SwarmError when it cannot go on.

    The port is bound before the model loads, so a port in use is reported at once and /health answers meanwhile.
    """
    prepared = await asyncio.to_thread(prepare, config, path, name)
    supervisor = EngineSupervisor(
        prepared.options,
        on_change=on_progress,
        open_cache=lambda layout: open_cache(config, prepared, layout),
    )
    node = Node(config, prepared, supervisor)
    server = await _start_server(config, node)
    stop = stop or asyncio.Event()
    try:
        started = asyncio.create_task(node.start())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({started, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            with contextlib.suppress(asyncio.CancelledError, SwarmError):
                await started
            return
        await started
        cache = supervisor.cache
        cache_bytes = cache.n_blocks * cache.block_bytes if cache else 0
        on_ready(Serving(prepared, supervisor.status, server.url, cache_bytes))
        await stopping
    finally:
        await node.close()
        await server.close()


async def _start_server(config: Config, node: Node) -> RunningServer:
    server = config.server
    options = ServerOptions(
        api_key=server.api_key,
        cors_origins=server.cors_origins,
        max_body_bytes=server.max_body_bytes,
        write_timeout_s=server.write_timeout_s,
    )
    return await start_server(build_app(node, options), server.host, server.port)
