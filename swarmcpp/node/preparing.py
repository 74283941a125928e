"""What follows from the settings before an engine starts: how it runs, what is told of its model, and its blocks."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from swarmcpp.config import Config
from swarmcpp.core import KvLayout, ModelInfo
from swarmcpp.errors import BadModel, NotEnoughMemory
from swarmcpp.hardware import disk_free, read_hardware
from swarmcpp.kv.arena import Arena
from swarmcpp.kv.cache import PrefixCache
from swarmcpp.kv.keys import KvIdentity
from swarmcpp.llama.backend import GGML_TYPE_F16
from swarmcpp.llama.probe import probe
from swarmcpp.llama.selfdraft import bands
from swarmcpp.llama.vocab import Vocab, VocabModel, check_draft
from swarmcpp.models.capacity import choose_capacity, estimate_memory, layer_bytes
from swarmcpp.models.catalogue import load_catalogue
from swarmcpp.models.download import resolve_model
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.slicing import check_sliceable
from swarmcpp.peers import ModelOffer
from swarmcpp.wire.engine import EngineOptions

logger = logging.getLogger(__name__)

DISK_SHARE = 10
"""A new arena takes at most one part in so many of the free disk,"""

MEMORY_SHARE = 4
"""and of the machine's memory: blocks are quick as long as the page cache can hold them."""


SHARED_CTX: Final = 4096
SHARED_SLOTS: Final = 4
"""What a model that is too large for one machine gets when nothing else is said: the rest is for weights."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is decided before the engine of a whole model starts."""

    model: ModelFile
    info: ModelInfo
    options: EngineOptions


def usable_memory(config: Config) -> int:
    """Bytes that a model and its contexts may take here: what is free, within --memory."""
    limit, free = config.engine.memory_bytes, read_hardware().memory_available
    return free if limit is None else min(limit, free)


def fits_whole(config: Config, file: ModelFile) -> bool:
    """Whether this machine can hold all of a model. Blocking."""
    try:
        choose_capacity(file, usable_memory(config), config.engine.ctx_size, config.engine.slots)
    except NotEnoughMemory:
        return False
    return True


def prepare(config: Config, path: Path, name: str | None = None) -> Prepared:
    """Check the model, the machine and its kernels. Blocking. Raises BadModel and NotEnoughMemory."""
    model = inspect(path)
    if not model.has_tokenizer:
        raise BadModel(f"{path}: has no tokenizer, so it cannot read text; get a GGUF of the whole model")
    draft, thinned, engine = draft_model(config), thinned_model(config, model), config.engine
    drafts = [each for each in (draft, thinned) if each]
    ctx_size, slots = choose_capacity(model, usable_memory(config), engine.ctx_size, engine.slots, drafts=drafts)
    options = msgspec.structs.replace(
        engine_options(config, path, ctx_size, slots),
        skip_ratio=config.inference.swift_skip_ratio if thinned else 0.0,
        skip_dir=str(config.storage.data_dir / "skips"),
    )
    return Prepared(model, model_info(name or path.stem, model, model.size_bytes), options)


def draft_model(config: Config) -> ModelFile | None:
    """The model that guesses ahead, if one is to; its vocabulary is compared when both are loaded. Raises BadModel."""
    wanted = config.inference.draft_model_path
    if not wanted or not config.inference.speculative_gamma:
        return None
    storage = config.storage
    found = resolve_model(wanted, storage.models_dir, load_catalogue(storage.catalogue_file))
    if not isinstance(found, Path):
        raise BadModel(
            f"draft_model_path = {wanted!r} is not on this machine yet; get it with `swarmcpp pull {wanted}`"
        )
    return inspect(found)


def stage_draft(config: Config) -> ModelFile | None:
    """The draft model of heads on this node; None where stages verify no guesses. Raises BadModel."""
    return draft_model(config) if config.inference.speculative_distributed else None


def draft_bytes(config: Config) -> int:
    """Memory of the draft model beside a stage; 0 without one. Blocking. Raises BadModel."""
    draft, engine = stage_draft(config), config.engine
    if draft is None:
        return 0
    return estimate_memory(draft, engine.ctx_size or SHARED_CTX, engine.slots or SHARED_SLOTS).total


def check_draft_of(config: Config, target: Path, vocab: Vocab) -> None:
    """Compare the vocabulary of a head's draft model with its target's. Blocking. Raises BadModel."""
    draft = stage_draft(config)
    if draft:
        with closing(VocabModel(draft.path)) as loaded:
            check_draft(target, vocab, draft.path, loaded.vocab)


def thinned_model(config: Config, model: ModelFile) -> ModelFile | None:
    """What the model is without the layers that it skips to guess ahead, as far as memory goes; None if it shall not.

    Raises BadConfig, BadModel.
    """
    inference = config.inference
    if not inference.swift_self_speculative or not inference.speculative_gamma:
        return None
    check_sliceable(model, 0, model.n_layers)
    left = model.n_layers - len(bands(model.n_layers, inference.swift_skip_ratio)[0])
    layers = sum(layer_bytes(model))
    # Of the vocabulary's tensors nothing is left out.
    weights = model.tensor_bytes - layers + layers * left // model.n_layers
    return replace(model, n_layers=left, n_head_kv=model.n_head_kv[:left], tensor_bytes=weights)


def engine_options(config: Config, path: Path, ctx_size: int, slots: int, *, stage: bool = False) -> EngineOptions:
    """How an engine runs the model at `path`, or as a `stage` the slice. Blocking: kernels are tried the first time."""
    inference, kernels = config.inference, probe(config.storage.data_dir).chosen
    draft = stage_draft(config) if stage else draft_model(config)
    return EngineOptions(
        model_path=str(path.resolve()),
        ctx_size=ctx_size,
        slots=slots,
        threads=config.engine.threads or read_hardware().physical_cores,
        use_extra_bufts=kernels.use_extra_bufts,
        q8_kernel=kernels.q8_kernel,
        attention_kernel=kernels.attention_kernel,
        prefill_chunk_tokens=inference.prefill_chunk_tokens,
        prefill_budget_s=inference.prefill_budget_ms / 1000,
        continuous_batching=inference.continuous_batching,
        batched_prefill_forward=inference.batched_prefill_forward,
        prefix_block_tokens=inference.prefix_cache_block_tokens if inference.prefix_cache_enabled else 0,
        gamma=0 if stage else inference.speculative_gamma,
        ngram=inference.ngram_lookup_enabled,
        draft_path=str(draft.path.resolve()) if draft else "",
        diag=logger.isEnabledFor(logging.DEBUG),
        stage=stage,
        poll_s=inference.stage_poll_ms / 1000 if stage else 0.0,
    )


def model_info(name: str, file: ModelFile, size_bytes: int) -> ModelInfo:
    """What is shown of a model; `size_bytes` is the whole one's, of which `file` may be the header only."""
    return ModelInfo(
        id=name,
        path=str(file.path),
        architecture=file.architecture,
        description=f"{file.name} {file.ftype}",
        n_params=file.n_params,
        size_bytes=size_bytes,
        n_vocab=file.n_vocab,
        n_ctx_train=file.n_ctx_train,
        n_layers=file.n_layers,
        created=int(file.path.stat().st_mtime),
    )


def kv_identity(config: Config, fingerprint: bytes) -> KvIdentity:
    """What the keys of a model's blocks depend on; the same at the head and on all stages."""
    block_tokens = config.inference.prefix_cache_block_tokens
    return KvIdentity(fingerprint, block_tokens, (GGML_TYPE_F16, GGML_TYPE_F16))


def open_cache(
    config: Config, fingerprint: bytes, layout: KvLayout, label: str, layers: tuple[int, int] | None = None
) -> PrefixCache | None:
    """This node's blocks of a model, or of its `layers`, for contexts of this shape; None, with a line in the log, when
    there can be none. Blocking."""
    identity = kv_identity(config, fingerprint)
    root = identity.arena_root(*layers) if layers else identity.root()
    directory = config.storage.data_dir / "arena"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        default = min(disk_free(directory) // DISK_SHARE, read_hardware().memory_total // MEMORY_SHARE)
        size = config.storage.cache_bytes
        arena = Arena.open(directory, root, layout.token_bytes * identity.block_tokens, size, default, label)
    except OSError as error:
        logger.warning("no cache on disk: %s", error)
        return None
    return PrefixCache(arena, identity, config.inference.prefix_cache_max_entries) if arena else None


def whole_offer(
    info: ModelInfo, fingerprint: bytes, root: bytes, token_bytes: int, ctx_size: int, slots: int, *, pipeline: bool
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
