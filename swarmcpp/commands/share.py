"""What `serve` and `join` have in common for a model that several machines share: which layers, and what is said."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

from rich.console import Console

from swarmcpp.commands import terminal
from swarmcpp.commands.terminal import LoadingView, ask_text, join_text
from swarmcpp.config import Config
from swarmcpp.errors import NotEnoughMemory
from swarmcpp.footprint import settle
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.manifest import Manifest, manifest_of
from swarmcpp.models.slicestore import SliceFiles, SliceStore
from swarmcpp.models.slicing import check_sliceable
from swarmcpp.node import serving
from swarmcpp.node.layerhost import Obtain, Range, SharedModel, check_range, check_switches
from swarmcpp.node.layers import ModelLayers
from swarmcpp.node.member import Swarm
from swarmcpp.node.moving import movable, slowest_range
from swarmcpp.node.placing import machines_of
from swarmcpp.node.preparing import SHARED_CTX, SHARED_SLOTS, draft_bytes, usable_memory
from swarmcpp.route.costs import ModelShape
from swarmcpp.route.placement import place
from swarmcpp.route.placement_words import explain
from swarmcpp.swarm.identity import JoinToken


def shared_model(config: Config, swarm: Swarm, manifest: Manifest, file: ModelFile, name: str) -> SharedModel:
    """A model with the contexts that its stages have everywhere: those of the swarm, or as asked for here.

    Raises BadConfig for what no stage can do.
    """
    check_switches(config)
    stage = next((each.offer for each in swarm.pipelines.seen(manifest.fingerprint)), None)
    ctx_size = stage.ctx_size if stage else config.engine.ctx_size or min(file.n_ctx_train, SHARED_CTX)
    slots = stage.slots if stage else config.engine.slots or SHARED_SLOTS
    return SharedModel(stage.model if stage else name, manifest, file, ctx_size, slots)


def choose_layers(config: Config, swarm: Swarm, model: SharedModel, shape: ModelShape) -> Range:
    """The layers that this node shall run: those that were asked for, or where it is of most use. Blocking.

    Raises BadConfig, BadModel, and NotEnoughMemory when it has no room or no use for any.
    """
    wanted = config.engine.layer_range
    if wanted is not None:
        check_range(model, wanted, usable_memory(config) - draft_bytes(config))
        return wanted
    check_sliceable(model.file, 0, model.file.n_layers)
    machines = machines_of(swarm.capabilities(), shape.fingerprint)
    placement = place(shape, machines)
    found = placement.wanted(swarm.node_id)
    covered = swarm.pipelines.covered(shape.fingerprint, shape.n_layers)
    if covered and (found is None or not movable(shape, placement, machines)):
        # Others cannot move for this one, or need not: it takes over where the chain is slowest.
        found = slowest_range(shape, machines, swarm.node_id) or found
    if found is None:
        raise NotEnoughMemory(
            f"{model.id}: no layers for this machine: {' '.join(explain(placement))} "
            "`--layers A-B` or more --memory overrule that"
        )
    return found


async def from_file(
    config: Config, path: Path, name: str | None, console: Console, *, swarm: Swarm, stop: asyncio.Event
) -> None:
    """Run layers of the model at `path`, which is here as a whole, until `stop`. Raises StartupError, SwarmError."""
    data_dir = config.storage.data_dir
    file = await asyncio.to_thread(inspect, path)
    manifest = await asyncio.to_thread(manifest_of, file.files, data_dir)
    model = shared_model(config, swarm, manifest, file, name or path.stem)
    store = SliceStore(data_dir)

    async def obtain(first: int, last: int) -> SliceFiles:
        return await asyncio.to_thread(store.from_file, path, first, last)

    swarm.give(manifest, file.files)
    await run(config, model, console, swarm=swarm, obtain=obtain, stop=stop)


async def run(
    config: Config, model: SharedModel, console: Console, *, swarm: Swarm, obtain: Obtain, stop: asyncio.Event
) -> None:
    """Run layers of `model` until `stop`, telling the terminal how it goes. Raises StartupError, SwarmError."""
    shape = await asyncio.to_thread(model.planned.shape)
    layers = await asyncio.to_thread(choose_layers, config, swarm, model, shape)
    with closing(LoadingView(console, f"layers {layers[0]}-{layers[1]} of {model.id}")) as view:
        hosted = ModelLayers(config, model, shape, layers, swarm=swarm, obtain=obtain, on_progress=view.update)

        def ready(url: str) -> None:
            view.ready(ready_text(hosted, url, swarm.token, with_key=config.server.api_key is not None))
            settle()

        await serving.run(config, [hosted], swarm=swarm, on_ready=ready, stop=stop)


def ready_text(hosted: ModelLayers, url: str, token: JoinToken, *, with_key: bool) -> str:
    """What a node with layers says when they are loaded: which, what is missing, and how to ask or to go on."""
    model, status = hosted.model, hosted.host.status
    first, last = hosted.layers
    memory = terminal.size_text(status.resident_bytes)
    head = "answers requests" if hosted.conductor else "computes for the node with the first layer"
    missing = hosted.missing()
    return (
        f"ready: layers {first}-{last} of {model.file.n_layers} of {model.id} at {url}/v1\n"
        f"  {status.slots} slots of {status.ctx_size} tokens, {memory} of memory; {head}\n"
        f"{f'  cannot answer yet: {missing}' if missing else ask_text(url, model.id, with_key=with_key)}"
        f"{join_text(token)}"
    )
