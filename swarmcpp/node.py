"""The node: what joins the model, its engine, the text side and the HTTP API into one running process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmcpp.api.server import RunningServer, ServerOptions, build_app, start_server
from swarmcpp.api.swarm import add_routes
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
    Started,
    TextEvent,
    Timings,
    TokenPart,
    Usage,
)
from swarmcpp.errors import BadModel, Cancelled, NotEnoughMemory, NotReady, SwarmError, UnknownModel
from swarmcpp.hardware import Hardware, disk_free, read_hardware
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.probe import ProbeReport, probe
from swarmcpp.llama.text import TextStream
from swarmcpp.llama.vocab import Vocab, VocabModel
from swarmcpp.models.capacity import choose_capacity
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.manifest import manifest_of
from swarmcpp.peers import ModelOffer
from swarmcpp.sharing.offers import Served
from swarmcpp.status import SwarmPlan, SwarmStatus
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.replica import LocalReplica
from swarmcpp.supervisor.runner import Runner
from swarmcpp.supervisor.whole import EngineSupervisor
from swarmcpp.swarm.identity import JoinToken
from swarmcpp.swarming.placing import PlannedModel, plan
from swarmcpp.swarming.swarm import Swarm
from swarmcpp.wire.engine import EngineOptions

logger = logging.getLogger(__name__)

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


def usable_memory(config: Config, hardware: Hardware) -> int:
    """Bytes that a model and its contexts may take here: what is free, within --memory."""
    limit = config.engine.memory_bytes
    return hardware.memory_available if limit is None else min(limit, hardware.memory_available)


def fits_whole(config: Config, file: ModelFile) -> bool:
    """Whether this machine can hold all of a model. Blocking."""
    try:
        choose_capacity(file, usable_memory(config, read_hardware()), config.engine.ctx_size, config.engine.slots)
    except NotEnoughMemory:
        return False
    return True


def prepare(config: Config, path: Path, name: str | None = None) -> Prepared:
    """Check the model, the machine and its kernels. Blocking. Raises BadModel and NotEnoughMemory."""
    model = inspect(path)
    if not model.has_tokenizer:
        raise BadModel(f"{path}: has no tokenizer, so it cannot read text; get a GGUF of the whole model")
    hardware = read_hardware()
    ctx_size, slots = choose_capacity(
        model, usable_memory(config, hardware), config.engine.ctx_size, config.engine.slots
    )
    report = probe(config.storage.data_dir)
    inference = config.inference
    options = EngineOptions(
        model_path=str(path.resolve()),
        ctx_size=ctx_size,
        slots=slots,
        threads=config.engine.threads or hardware.physical_cores,
        use_extra_bufts=report.chosen.use_extra_bufts,
        q8_kernel=report.chosen.q8_kernel,
        prefill_chunk_tokens=inference.prefill_chunk_tokens,
        prefill_budget_s=inference.prefill_budget_ms / 1000,
        continuous_batching=inference.continuous_batching,
        batched_prefill_forward=inference.batched_prefill_forward,
        prefix_block_tokens=inference.prefix_cache_block_tokens if inference.prefix_cache_enabled else 0,
        diag=logger.isEnabledFor(logging.DEBUG),
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
    """One served model, and those of the swarm. Satisfies `core.Service`; every method runs on its event loop."""

    def __init__(self, config: Config, info: ModelInfo, runner: Runner, swarm: Swarm | None = None) -> None:
        self._config = config
        self._info = info
        self._runner = runner
        self._swarm = swarm
        self._vocab: VocabModel | None = None
        self._codec: ChatCodec | None = None
        self._planning = asyncio.Lock()
        self.planned: PlannedModel | None = None
        """What /swarm/plan is about; None until it is loaded."""
        self.names = frozenset({info.id, info.path, Path(info.path).name})

    async def read_text(self, path: Path, chat_template: str | None) -> Vocab:
        """Load the vocabulary of the file at `path`: the model can be talked to from now on. Raises BadModel.

        The vocabulary is the node's, until it is closed.

        Once its engine has loaded: a file that crashes llama.cpp has then done so there, not in the node.
        """
        self._vocab = await asyncio.to_thread(VocabModel, path)
        self._codec = ChatCodec(self._vocab.vocab, chat_template)
        return self._vocab.vocab

    def close(self) -> None:
        """Free the vocabulary."""
        if self._vocab:
            self._vocab.close()
            self._vocab = None

    # -- what the API asks -----------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """See `core.Service`."""
        others = self._swarm.models.infos() if self._swarm else ()
        return (self._info, *(info for info in others if info.id not in self.names))

    def snapshot(self) -> NodeSnapshot:
        """See `core.Service`."""
        status, stats = self._runner.status, self._runner.stats
        starting = status.state == "ready" and self._codec is None and not self._elsewhere
        return NodeSnapshot(
            state="starting" if starting else status.state,
            detail=status.detail or (f"loading, {status.load_fraction:.0%}" if status.state == "starting" else ""),
            model=self._info,
            slots=self._runner.slots,
            slots_busy=stats.slots_busy,
            ctx_size=self._runner.ctx_size,
            queued=max(0, self._runner.ahead - stats.slots_busy),
            running=stats.slots_busy,
            restarts=status.restarts,
            prefill_tps=stats.prefill_tps,
            decode_tps=stats.decode_tps,
        )

    def swarm_status(self) -> SwarmStatus:
        """The swarm as this node sees it, for /swarm/status."""
        return self._swarm.status() if self._swarm else SwarmStatus(at=time.time())

    async def swarm_plan(self, added: Sequence[str]) -> SwarmPlan:
        """Who would hold what of this node's model, for /swarm/plan. Raises NotReady, BadRequest, BadModel."""
        if self._swarm is None:
            raise NotReady("this node is in no swarm; start it with --swarm")
        # One at a time: each takes a core for as long as a second for every machine that is added.
        async with self._planning:
            if self.planned is None:
                raise NotReady("this node serves no model yet; ask again when it does, or ask another one with --url")
            return await asyncio.to_thread(plan, self.planned, self._swarm.capabilities(), added)

    @property
    def _elsewhere(self) -> bool:
        """Whether a peer answers with this node's model."""
        return self._swarm is not None and self._swarm.models.offer(self._info.id) is not None

    def limits(self, model: str | None = None) -> Limits:
        """See `core.Service`."""
        if self._swarm and model is not None and model not in self.names and (offer := self._swarm.models.offer(model)):
            return Limits(ctx_size=offer.ctx_size, n_vocab=offer.n_vocab)
        return Limits(ctx_size=self._runner.ctx_size, n_vocab=self._info.n_vocab)

    async def tokenize_chat(
        self, model: str, messages: Sequence[ChatMessage], extra: dict[str, Any] | None = None
    ) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_chat, messages, extra))

    async def tokenize_text(self, model: str, text: str) -> tuple[int, ...]:
        """See `core.Service`."""
        codec = await self._codec_of(model)
        return tuple(await asyncio.to_thread(codec.tokenize_text, text))

    async def _codec_of(self, model: str) -> ChatCodec:
        if model not in self.names:
            if self._swarm and self._swarm.models.offer(model):
                return await self._swarm.models.codec(model)
            raise UnknownModel(f"model {model!r} is not served here; this node serves {self._info.id!r}")
        if self._codec is None:
            # A node that only computes layers has no vocabulary: those who answer with the model are asked.
            if self._swarm and self._elsewhere:
                return await self._swarm.models.codec(self._info.id)
            raise NotReady(self.snapshot().detail or "the model is still loading")
        if not self._runner.usable and not self._elsewhere:
            raise NotReady(self.snapshot().detail)
        return self._codec

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See `core.Service`."""
        codec = await self._codec_of(request.model)
        text = TextStream(codec.piece, request.stop)
        clock = asyncio.get_running_loop().time
        timeout = request.deadline_s or self._config.server.request_timeout_s or None
        try:
            async with asyncio.timeout(timeout), aclosing(self._routed(request, timeout)) as parts:
                async for event in _events(parts, text, len(request.prompt), clock):
                    yield event
        except TimeoutError:
            raise Cancelled(f"the request took longer than its limit of {timeout:g} s") from None

    async def _routed(
        self, request: GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[tuple[str, TokenPart], None]:
        """Tokens with the route that they came by, from one replica after another until one has finished."""
        if self._swarm is None:
            async with aclosing(self._runner.tokens(self._runner.admit(request))) as parts:
                async for part in parts:
                    yield "local", part
            return
        local = self._runner if request.model in self.names else None
        async with aclosing(self._swarm.requests.tokens(request, local, timeout)) as routed:
            async for each in routed:
                yield each


async def _events(
    parts: AsyncGenerator[tuple[str, TokenPart], None], text: TextStream, prompt_tokens: int, clock: Callable[[], float]
) -> AsyncGenerator[Event, None]:
    """Tokens of a request as text events, then Done."""
    first: TokenPart | None = None
    first_s = 0.0
    count = 0
    async for route, part in parts:
        if first is None:
            first, first_s = part, clock()
            yield Started(route, part.queue_s, part.fetch_s, part.prefill_s)
        pieces: list[str] = []
        reason: FinishReason | None = None
        for number, token in enumerate(part.tokens, 1):
            count += 1
            finish = part.finish if number == len(part.tokens) else None
            # A token that ends the generation says nothing, even where the vocabulary gives it a text.
            pieces.append("" if finish == "stop" else text.feed(token))
            reason = "stop" if text.stopped else finish
            if reason:
                break
        if reason or part.finish:
            pieces.append(text.finish())
            # A stop string that only the last, incomplete text completed.
            reason = "stop" if text.stopped else reason or part.finish
        yield TextEvent("".join(pieces), part.tokens)
        if reason:
            timings = Timings(queue_s=first.queue_s, prefill_s=first.prefill_s, decode_s=clock() - first_s)
            yield Done(reason, Usage(prompt_tokens, count, first.cached_tokens, first.tier), timings)
            return


def open_cache(config: Config, prepared: Prepared, layout: KvLayout) -> PrefixCache | None:
    """The node's blocks for a context of this shape; None, with a line in the log, when there can be none. Blocking."""
    identity = KvIdentity(
        fingerprint=manifest_of(prepared.model.files, config.storage.data_dir).fingerprint,
        block_tokens=config.inference.prefix_cache_block_tokens,
        kv_types=(layout.k_type, layout.v_type),
    )
    return open_arena(config, identity, identity.root(), layout, prepared.hardware, prepared.info.path)


def open_arena(
    config: Config, identity: KvIdentity, root: bytes, layout: KvLayout, hardware: Hardware, label: str
) -> PrefixCache | None:
    """Blocks of `identity` in the arena of `root`; None, with a line in the log, when there can be none. Blocking."""
    directory = config.storage.data_dir / "arena"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        default = min(disk_free(directory) // DISK_SHARE, hardware.memory_total // MEMORY_SHARE)
        size = config.storage.cache_bytes
        arena = Arena.open(directory, root, layout.token_bytes * identity.block_tokens, size, default, label)
    except OSError as error:
        logger.warning("no cache on disk: %s", error)
        return None
    return PrefixCache(arena, identity, config.inference.prefix_cache_max_entries) if arena else None


@dataclass(frozen=True, slots=True)
class Serving:
    """A node that answers, and what its ready line says."""

    prepared: Prepared
    status: EngineStatus
    url: str
    cache_bytes: int
    """Size of the arena on disk; 0: none."""
    token: JoinToken | None = None
    """What another machine needs to join; None: the node is in no swarm."""


async def run(
    config: Config,
    path: Path,
    *,
    name: str | None = None,
    swarm: Swarm | None = None,
    on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    on_ready: Callable[[Serving], None] = lambda _serving: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve `path` until `stop` is set. Raises StartupError when it cannot start, SwarmError when it cannot go on.

    The port is bound before the model loads, so a port in use is reported at once and /health answers meanwhile. A
    `swarm` has been started; the caller closes it.
    """
    prepared = await asyncio.to_thread(prepare, config, path, name)
    loop = asyncio.get_running_loop()

    def open_for(layout: KvLayout) -> PrefixCache | None:
        cache = open_cache(config, prepared, layout)
        if swarm and cache:
            loop.call_soon_threadsafe(swarm.blocks.use, cache, layout.token_bytes)
        return cache

    supervisor = EngineSupervisor(prepared.options, on_change=on_progress, open_cache=open_for)
    replica = LocalReplica(config, prepared.options, supervisor)
    node = Node(config, prepared.info, replica, swarm)

    async def start() -> None:
        supervisor.start()
        await supervisor.wait_ready()
        await node.read_text(Path(prepared.options.model_path), prepared.model.chat_template)

    server = await start_api(config, node)
    stop = stop or asyncio.Event()
    try:
        if not await until_stopped(asyncio.create_task(start()), stop):
            return
        cache = supervisor.cache
        cache_bytes = cache.n_blocks * cache.block_bytes if cache else 0
        on_ready(Serving(prepared, supervisor.status, server.url, cache_bytes, swarm.token if swarm else None))
        if swarm:
            await _offer(swarm, node, replica, prepared, config)
        await stop.wait()
    finally:
        await supervisor.close()
        node.close()
        await server.close()


async def until_stopped(starting: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Whether `starting` has ended before `stop` was set, which cancels it. Raises what it raises."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            return True
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, SwarmError):
            await starting
        return False
    finally:
        stopping.cancel()


async def _offer(swarm: Swarm, node: Node, replica: LocalReplica, prepared: Prepared, config: Config) -> None:
    """Tell the swarm what this node serves now."""
    manifest = await asyncio.to_thread(manifest_of, prepared.model.files, config.storage.data_dir)
    offer = whole_offer(
        prepared.info,
        fingerprint=manifest.fingerprint,
        root=swarm.blocks.root,
        token_bytes=swarm.blocks.token_bytes,
        ctx_size=replica.ctx_size,
        slots=replica.slots,
    )
    swarm.give(manifest, prepared.model.files)
    swarm.serve(Served(replica, offer, node.names, replica))
    node.planned = PlannedModel(prepared.info.id, prepared.model, manifest.fingerprint, replica.ctx_size, replica.slots)


def whole_offer(
    info: ModelInfo,
    *,
    fingerprint: bytes,
    root: bytes,
    token_bytes: int,
    ctx_size: int,
    slots: int,
    pipeline: bool = False,
) -> ModelOffer:
    """What the swarm is told of a model that this node answers for as a whole. The arguments: see `ModelOffer`."""
    return ModelOffer(
        id=info.id,
        fingerprint=fingerprint,
        root=root,
        architecture=info.architecture,
        description=info.description,
        size_bytes=info.size_bytes,
        n_params=info.n_params,
        n_vocab=info.n_vocab,
        n_ctx_train=info.n_ctx_train,
        n_layers=info.n_layers,
        first=0,
        last=info.n_layers,
        token_bytes=token_bytes,
        ctx_size=ctx_size,
        slots=slots,
        created=info.created,
        pipeline=pipeline,
    )


async def start_api(config: Config, node: Node) -> RunningServer:
    """The API of `node`. Raises PortInUse."""
    server = config.server
    options = ServerOptions(
        api_key=server.api_key,
        cors_origins=server.cors_origins,
        max_body_bytes=server.max_body_bytes,
        write_timeout_s=server.write_timeout_s,
    )
    app = build_app(node, options)
    add_routes(app, node)
    return await start_server(app, server.host, server.port)
