"""What is decided before an engine starts: the model, this machine, its kernels, memory, and where blocks are kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.config import Config
from swarmcpp.core import KvLayout, ModelInfo
from swarmcpp.errors import BadModel, NotEnoughMemory
from swarmcpp.hardware import Hardware, disk_free, read_hardware
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.probe import ProbeReport, probe
from swarmcpp.models.capacity import choose_capacity
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.manifest import manifest_of
from swarmcpp.peers import ModelOffer
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
