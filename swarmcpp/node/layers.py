"""A node that runs layers of a model which several machines share, and answers through those of all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from swarmcpp.config import Config
from swarmcpp.engine.drafting import lookups
from swarmcpp.kv.keys import block_keys
from swarmcpp.llama.stage import EmbeddingTable
from swarmcpp.node.hosted import Hosted
from swarmcpp.node.layerhost import LayerHost, Obtain, Range, SharedModel
from swarmcpp.node.member import Swarm
from swarmcpp.node.moving import keep_placed
from swarmcpp.node.placing import memory_text
from swarmcpp.node.preparing import check_draft_of, kv_identity, model_info
from swarmcpp.pipeline.chains import Room
from swarmcpp.pipeline.conductor import Conductor
from swarmcpp.pipeline.head import StageRunner
from swarmcpp.pipeline.runs import Ask, Chain, ModelFacts, PipelinePolicy, Surroundings
from swarmcpp.route.costs import ModelShape
from swarmcpp.route.passes import micro_batches
from swarmcpp.supervisor.process import EngineStatus


def make_head(
    config: Config, model: SharedModel, source: Path, eog_tokens: frozenset[int], swarm: Swarm, room: Room
) -> Conductor:
    """The head of a node that has the token embedding in the file at `source`. Blocking. Raises BadModel."""
    table = EmbeddingTable(source)
    fingerprint, n_layers, row_bytes = model.manifest.fingerprint, model.file.n_layers, 4 * model.file.n_embd
    identity, inference, pipelines = kv_identity(config, fingerprint), config.inference, swarm.pipelines

    def routes(ask: Ask) -> Chain:
        return pipelines.route(fingerprint, n_layers, row_bytes, ask, room)

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
        guess=partial(pipelines.guess, fingerprint),
    )
    guesses = inference.speculative_distributed and inference.speculative_gamma > 0
    policy = PipelinePolicy(
        slots=model.slots,
        queue_size=config.server.queue_size,
        prefill_chunk_tokens=inference.prefill_chunk_tokens,
        prefill_budget_s=inference.prefill_budget_ms / 1000,
        persistent=inference.persistent_pipeline_stream,
        copy_every=identity.block_tokens if inference.prefix_cache_enabled and inference.replicate_kv != "off" else 0,
        drafters=lookups(ngram=inference.ngram_lookup_enabled) if guesses else (),
        gamma=inference.speculative_gamma,
        draft=guesses and bool(inference.draft_model_path),
        ahead=inference.decentralized_spec_decoding,
    )
    facts = ModelFacts(fingerprint, n_layers, model.file.n_vocab, model.ctx_size, eog_tokens)
    return Conductor(facts, policy, around, time.monotonic)


class ModelLayers(Hosted):
    """Layers of a model, and as soon as the token embedding is here the head of its pipelines."""

    def __init__(
        self,
        config: Config,
        model: SharedModel,
        shape: ModelShape,
        layers: Range,
        *,
        swarm: Swarm,
        obtain: Obtain,
        on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    ) -> None:
        self._config = config
        self._shape = shape
        self._swarm = swarm
        self._mover: asyncio.Task[None] | None = None
        self.model = model
        self.layers = layers
        self.host = LayerHost(config, model, swarm, obtain, on_progress)
        self.conductor: Conductor | None = None
        runner = StageRunner(lambda: self.host.status, self.missing, swarm.chain_text, lambda: self.conductor)
        super().__init__(model_info(model.id, model.file, model.manifest.size), runner, model.planned)

    def missing(self) -> str:
        """Why the model cannot be asked yet, in words; empty when it can."""
        return self._swarm.pipelines.missing(self._shape.fingerprint, self._shape.n_layers, self._room)

    def _room(self, missing: Sequence[Range]) -> str:
        return memory_text(self._shape, self._swarm.told(), missing)

    async def open(self) -> None:
        """See `Hosted`."""
        await self._acquire(*self.layers)
        if self._config.engine.layer_range is None:
            moving = keep_placed(self.host, self._acquire, self._shape, self._swarm)
            self._mover = asyncio.create_task(moving, name="placement")

    async def close(self) -> None:
        """See `Hosted`."""
        if self._mover:
            self._mover.cancel()
            await asyncio.gather(self._mover, return_exceptions=True)
        if self.conductor:
            await self.conductor.close()
        await self.host.close()
        await super().close()

    async def _acquire(self, first: int, last: int) -> None:
        config, model, swarm = self._config, self.model, self._swarm
        files = await self.host.acquire(first, last)
        if not files.embedding or self.conductor:
            return
        vocab = await self.read_text(files.source, model.file.chat_template)
        await asyncio.to_thread(check_draft_of, config, files.source, vocab)
        self.conductor = await asyncio.to_thread(
            make_head, config, model, files.source, vocab.eog_tokens, swarm, self._room
        )
        root = kv_identity(config, self._shape.fingerprint).root()
        self.offer(swarm, self._shape.fingerprint, root=root, pipeline=True)
