"""The stages that a node runs of one model: loaded, drained and unloaded by ranges of layers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from swarmcpp.config import Config
from swarmcpp.core import TILE_ROWS, GenerateRequest, KvLayout, Limits, SamplingParams
from swarmcpp.errors import BadConfig, NotEnoughMemory
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.models.capacity import gigabytes, stage_memory
from swarmcpp.models.inspect import ModelFile
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.slicestore import SliceFiles
from swarmcpp.models.slicing import check_sliceable
from swarmcpp.node import preparing
from swarmcpp.node.member import Swarm
from swarmcpp.node.placing import PlannedModel
from swarmcpp.pipeline.calls import StageBounds
from swarmcpp.pipeline.chains import OwnStage
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.route.passes import PassTimes
from swarmcpp.supervisor.process import EngineStatus
from swarmcpp.supervisor.stage import StageSupervisor
from swarmcpp.wire.peers import SEQUENCE_BYTES, PassPart

MEASURED_STREAMS: Final = 64
"""Most sequences that decode side by side when a new stage is measured."""

MEASURE_S: Final = 2.0
"""After so long no larger pass is tried: a large stage is offered all the same."""

Range = tuple[int, int]
Obtain = Callable[[int, int], Awaitable[SliceFiles]]
"""The slice of a range, made or fetched. Raises StartupError."""


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A model whose layers several machines share, and how: every stage has the same contexts."""

    id: str
    manifest: Manifest
    file: ModelFile
    """Inspected: the model's own file, or its header only."""
    ctx_size: int
    slots: int

    @property
    def planned(self) -> PlannedModel:
        """As plans for it see it."""
        return PlannedModel(self.id, self.file, self.manifest.fingerprint, self.ctx_size, self.slots)


def check_switches(config: Config) -> None:
    """Raises BadConfig for a switch that says what heads and stages, which others use too, cannot do."""
    for name in ("continuous_batching", "batched_prefill_forward"):
        if not getattr(config.inference, name):
            raise BadConfig(
                f"inference.{name} = false: nodes that run layers compute what comes together side by side; leave it "
                "at true, or serve a model that fits into this machine"
            )


def check_range(model: SharedModel, wanted: Range, memory: int) -> None:
    """Raises BadConfig and BadModel for layers that are none or no slice, NotEnoughMemory when they do not fit."""
    check_sliceable(model.file, *wanted)
    need = stage_memory(model.file, *wanted, model.ctx_size, model.slots).total
    if need > memory:
        raise NotEnoughMemory(
            f"{model.file.path}: layers {wanted[0]}-{wanted[1]} with {model.slots} slots of {model.ctx_size} tokens "
            f"need {gigabytes(need)}, and {gigabytes(memory)} may be used; take fewer --layers, a smaller --ctx-size "
            "or fewer --slots"
        )


class LayerHost:
    """The stages of one model on this node. Used on the event loop's thread."""

    def __init__(
        self,
        config: Config,
        model: SharedModel,
        swarm: Swarm,
        obtain: Obtain,
        on_progress: Callable[[EngineStatus], None] = lambda _status: None,
    ) -> None:
        self._config = config
        self._model = model
        self._swarm = swarm
        self._obtain = obtain
        self._on_progress = on_progress
        self.stages: dict[Range, OwnStage] = {}

    @property
    def status(self) -> EngineStatus:
        """Of the stage that is best off: others may be loading beside it."""
        states = [stage.supervisor.status for stage in self.stages.values()]
        return next((each for each in states if each.state == "ready"), states[0] if states else EngineStatus())

    async def acquire(self, first: int, last: int) -> SliceFiles:
        """Load [first, last), and run it for the swarm. Raises StartupError, EngineFailed; then nothing of it stays."""
        files = await self._obtain(first, last)
        model = self._model
        options = await asyncio.to_thread(
            preparing.engine_options, self._config, files.slice, model.ctx_size, model.slots, stage=True
        )
        ref = StageRef(self._swarm.node_id, model.manifest.fingerprint, first, last, model.file.n_layers)
        times = PassTimes(time.monotonic)

        def open_cache(layout: KvLayout) -> PrefixCache | None:
            label = f"{model.id} {first}-{last}"
            return preparing.open_cache(self._config, model.manifest.fingerprint, layout, label, (first, last))

        def stored(keys: Sequence[bytes]) -> None:
            self._swarm.copies.stored(stage, keys)

        supervisor = StageSupervisor(
            options, on_change=self._on_progress, on_pass=times.add, on_stored=stored, open_cache=open_cache
        )
        stage = self.stages[first, last] = OwnStage(ref, model.id, supervisor, times)
        try:
            supervisor.start()
            await supervisor.wait_ready()
            await measure(supervisor, model.file.n_embd)
        except BaseException:
            del self.stages[first, last]
            await supervisor.close()
            raise
        limits = Limits(ctx_size=supervisor.status.ctx_size, n_vocab=model.file.n_vocab)
        self._swarm.pipelines.host(stage, StageBounds(limits, model.file.n_embd))
        if files.parts is not None:
            self._swarm.give_parts(files.parts)
        return files

    async def release(self, first: int, last: int) -> None:
        """Unload [first, last); what runs there is lost to its heads, which find another chain."""
        stage = self.stages.pop((first, last))
        self._swarm.pipelines.drop(stage.ref)
        self._swarm.copies.drop(stage.ref)
        await stage.supervisor.close()

    @property
    def idle(self) -> bool:
        """Whether no head has a sequence on a stage that drains."""
        return all(stage.supervisor.free == stage.supervisor.slots for stage in self.stages.values() if stage.draining)

    async def close(self) -> None:
        """Unload all."""
        for first, last in list(self.stages):
            await self.release(first, last)


async def measure(stage: StageSupervisor, n_embd: int) -> None:
    """Let a stage that nobody uses yet compute some passes: heads choose it, and cut their streams into micro-batches,
    by how long those take. They have the shape that passes have later, one row of each of some neighbours with the
    token after it, and a tile of a prompt; the first one reads the weights, and says nothing.

    Raises SwarmError.
    """
    request = GenerateRequest("measure", "", (0,), 1, SamplingParams(temperature=0.0))
    streams = min(stage.slots, MEASURED_STREAMS)
    names = [os.urandom(SEQUENCE_BYTES) for _ in range(streams)]
    for name in names:
        await stage.open(name, 1, (), request, 1)
        await stage.resume(name, 1, 0)

    async def decode(count: int) -> None:
        parts = tuple(PassPart(name, 1, 0, 1, outputs=1) for name in names[:count])
        await stage.run(parts, "f32", bytes(4 * n_embd * count), "f32")

    await decode(1)
    until = time.monotonic() + MEASURE_S
    for count in (1, *(1 << power for power in range(streams.bit_length()))):
        await decode(count)
        if time.monotonic() > until:
            break
    tile = PassPart(names[0], 1, 0, TILE_ROWS, outputs=1)
    await stage.run((tile,), "f32", bytes(4 * n_embd * TILE_ROWS), "f32")
    for name in names:
        await stage.close_sequence(name)
