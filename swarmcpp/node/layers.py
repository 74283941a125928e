"""A node that runs layers of a model which several machines share, and answers through those of all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.config import Config
from swarmcpp.core import ModelInfo
from swarmcpp.kv.keys import block_keys
from swarmcpp.llama.stage import EmbeddingTable
from swarmcpp.node.layerhost import LayerHost, Obtain, Range, SharedModel
from swarmcpp.node.member import Swarm
from swarmcpp.node.moving import keep_placed
from swarmcpp.node.node import Node
from swarmcpp.node.placing import PlannedModel, memory_text
from swarmcpp.node.preparing import kv_identity, model_info, whole_offer
from swarmcpp.node.serving import start_api, until_stopped
from swarmcpp.peers import ModelOffer
from swarmcpp.pipeline.conductor import Conductor
from swarmcpp.pipeline.head import StageRunner
from swarmcpp.pipeline.runs import Ask, Chain, ModelFacts, PipelinePolicy, Surroundings
from swarmcpp.route.passes import micro_batches
from swarmcpp.sharing.offers import Served
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.swarm.identity import JoinToken


def make_head(config: Config, model: SharedModel, source: Path, eog_tokens: frozenset[int], swarm: Swarm) -> Conductor:
    """The head of a node that has the token embedding in the file at `source`. Blocking. Raises BadModel."""
    table = EmbeddingTable(source)
    fingerprint, n_layers, row_bytes = model.manifest.fingerprint, model.file.n_layers, 4 * model.file.n_embd
    identity, inference, pipelines = kv_identity(config, fingerprint), config.inference, swarm.pipelines

    def routes(ask: Ask) -> Chain:
        return pipelines.route(fingerprint, n_layers, row_bytes, ask)

    def keys(tokens: Sequence[int], salt: str) -> list[bytes]:
        return block_keys(identity.root(salt), tokens, identity.block_tokens)

    around = Surroundings(
        embed=table.rows,
        keys=keys if inference.prefix_cache_enabled else lambda _tokens, _salt: [],
        routes=routes,
        caller=pipelines.caller,
        pass_times=pipelines.pass_times,
        rtt=pipelines.rtt,
        encodings=pipelines.encodings,
        micro_batches=micro_batches,
        copies=swarm.copies.wanted,
    )
    policy = PipelinePolicy(
        slots=model.slots,
        queue_size=config.server.queue_size,
        prefill_chunk_tokens=inference.prefill_chunk_tokens,
        prefill_budget_s=inference.prefill_budget_ms / 1000,
        persistent=inference.persistent_pipeline_stream,
        copy_every=identity.block_tokens if inference.prefix_cache_enabled and inference.replicate_kv != "off" else 0,
    )
    facts = ModelFacts(fingerprint, n_layers, model.file.n_vocab, model.ctx_size, eog_tokens)
    return Conductor(facts, policy, around, time.monotonic)


@dataclass(frozen=True, slots=True)
class SharedServing:
    """A node that runs layers, and what its ready line says."""

    model: SharedModel
    layers: Range
    status: EngineStatus
    url: str
    token: JoinToken
    is_head: bool
    missing: str
    """Why the model cannot be asked yet, in words; empty when it can."""


async def run(
    config: Config,
    model: SharedModel,
    layers: Range,
    *,
    swarm: Swarm,
    obtain: Obtain,
    on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    on_ready: Callable[[SharedServing], None] = lambda _serving: None,
    stop: asyncio.Event,
) -> None:
    """Run layers of `model` until `stop` is set, and answer requests once a chain leads through it.

    Raises StartupError when it cannot start, SwarmError when it cannot go on.
    """
    host = LayerHost(config, model, swarm, obtain, on_progress)
    fingerprint, n_layers = model.manifest.fingerprint, model.file.n_layers
    runner = StageRunner(lambda: host.status, lambda: swarm.pipelines.missing(fingerprint, n_layers), swarm.chain_text)
    info = model_info(model.id, model.file, model.manifest.size)
    planned = PlannedModel(model.id, model.file, fingerprint, model.ctx_size, model.slots)
    shape = await asyncio.to_thread(planned.shape)
    swarm.pipelines.room = lambda missing: memory_text(shape, swarm.told(), missing)
    node = Node(config, info, runner, swarm)
    node.planned = planned
    server = await start_api(config, node, swarm)
    mover: asyncio.Task[None] | None = None

    async def acquire(first: int, last: int) -> None:
        files = await host.acquire(first, last)
        if not files.embedding or runner.conductor:
            return
        vocab = await node.read_text(files.source, model.file.chat_template)
        runner.conductor = await asyncio.to_thread(make_head, config, model, files.source, vocab.eog_tokens, swarm)
        swarm.serve(Served(runner, _offer(config, model, info), node.names))

    try:
        if not await until_stopped(asyncio.create_task(acquire(*layers)), stop):
            return
        missing = swarm.pipelines.missing(fingerprint, n_layers)
        on_ready(
            SharedServing(model, layers, host.status, server.url, swarm.token, runner.conductor is not None, missing)
        )
        if config.engine.layer_range is None:
            mover = asyncio.create_task(keep_placed(host, acquire, model, swarm), name="placement")
        await stop.wait()
    finally:
        if mover:
            mover.cancel()
            await asyncio.gather(mover, return_exceptions=True)
        if runner.conductor:
            await runner.conductor.close()
        await host.close()
        node.close()
        await server.close()


def _offer(config: Config, model: SharedModel, info: ModelInfo) -> ModelOffer:
    """What a head offers: the whole model, through stages."""
    fingerprint = model.manifest.fingerprint
    return whole_offer(
        info,
        fingerprint=fingerprint,
        root=kv_identity(config, fingerprint).root(),
        token_bytes=0,
        ctx_size=model.ctx_size,
        slots=model.slots,
        pipeline=True,
    )
