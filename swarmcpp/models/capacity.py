"""How much memory a model or a stage of it takes, and how many slots of which context, or how many layers, fit.

What tells layers apart reads the headers of the model's files, of which the rest may be missing. Sizes in bytes,
contexts in tokens per slot (each slot is its own stream of the KV cache).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarmcpp.core import MAX_OUTPUTS, MAX_ROWS
from swarmcpp.errors import NotEnoughMemory
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.inspect import ModelFile

F16_BYTES = 2
F32_BYTES = 4
CTX_PADDING = 256
"""llama.cpp rounds the context of a stream up to a multiple of this."""
OVERHEAD = 96 << 20
"""An engine process before its model: interpreter, libraries, threads, work buffers."""
STAGE_OVERHEAD = 68 << 20
"""The same for a stage, whose rows are counted apart; 57 to 66 MiB were measured."""
VOCAB_BYTES = 256
"""A token in llama.cpp's vocabulary: its text, its place in two maps, and a merge; 190 were measured without merges."""

_BLOCK = re.compile(r"blk\.(\d+)\.")

AUTO_SLOTS = 8
AUTO_CTX = 8192
MIN_CTX = 512
AUTO_SHARE_PERCENT = 80
"""What automatic choices may fill of the free memory; the rest is for the page cache and for other programs."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Upper bounds: weights as in the file, the whole KV cache, and all buffers of a step."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.kv + self.compute


def kv_bytes_per_token(model: ModelFile) -> int:
    """Bytes of F16 K and V for one token: over layers, kv heads x (K width + V width) x 2.

    Layers with a sliding window or a shared cache need less than this counts.
    """
    return sum(model.n_head_kv) * (model.head_dim_k + model.head_dim_v) * F16_BYTES


def estimate_memory(model: ModelFile, ctx_size: int, slots: int, n_batch: int = MAX_ROWS) -> MemoryEstimate:
    """Memory of an engine with `slots` slots of `ctx_size` tokens each that computes `n_batch` rows at a time.

    kv      = slots x padded ctx x kv_bytes_per_token
    compute = n_batch x (n_vocab + 4 n_embd + 2 n_ff) x F32   logits, residual and norms, gate and up
            + n_batch x padded ctx x F16                       attention mask
            + max(slots, MAX_OUTPUTS) x n_vocab x F32          the rows of logits that are read out
            + OVERHEAD
    The first two are alive at different moments, so their sum is above what llama.cpp's scheduler reserves
    (checked against its own figures in the tests).
    """
    padded = -(-ctx_size // CTX_PADDING) * CTX_PADDING
    step = n_batch * (model.n_vocab + 4 * model.n_embd + 2 * model.n_ff) * F32_BYTES
    mask = n_batch * padded * F16_BYTES
    logits = max(slots, MAX_OUTPUTS) * model.n_vocab * F32_BYTES
    return MemoryEstimate(
        weights=model.tensor_bytes,
        kv=slots * padded * kv_bytes_per_token(model),
        compute=step + mask + logits + OVERHEAD,
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """Bytes of tensors as in the file. `norm`: what is neither of a layer nor vocabulary-sized."""

    layers: tuple[int, ...]
    embedding: int
    head: int
    norm: int
    ff_width: int
    """Of all feed-forward rows that one row makes: of each expert that it is given to."""

    def of(self, first: int, last: int) -> int:
        """Of the slice of layers [first, last): the head only in a tail, the embedding only in a whole model."""
        own = sum(self.layers[first:last]) + self.norm
        if (first, last) == (0, len(self.layers)):
            return own + self.embedding + self.head
        return own + (self.head or self.embedding if last == len(self.layers) else 0)


def layer_bytes(model: ModelFile) -> tuple[int, ...]:
    """Bytes of the tensors of each layer. Raises BadModel when the file changed since it was inspected."""
    return _weights(model).layers


def embedding_bytes(model: ModelFile) -> int:
    """Bytes of the token embedding, which the head's node reads from disk. Raises as `layer_bytes`."""
    return _weights(model).embedding


def head_bytes(model: ModelFile) -> int:
    """Bytes that a tail has beside its layers: output head, or the embedding that is one too, and final norm."""
    weights = _weights(model)
    return (weights.head or weights.embedding) + weights.norm


def _weights(model: ModelFile) -> _Weights:
    layers = [0] * model.n_layers
    embedding = head = norm = 0
    headers = [read_header(path) for path in model.files]
    for tensor in (tensor for header in headers for tensor in header.tensors):
        block = _BLOCK.match(tensor.name)
        if block is not None and int(block[1]) < model.n_layers:
            layers[int(block[1])] += tensor.n_bytes
        elif tensor.name == "token_embd.weight":
            embedding += tensor.n_bytes
        elif tensor.name == "output.weight":
            head += tensor.n_bytes
        elif block is None:
            norm += tensor.n_bytes
    prefix = f"{model.architecture}.expert_"
    used = headers[0].metadata.get(f"{prefix}used_count")
    width = headers[0].metadata.get(f"{prefix}feed_forward_length", model.n_ff)
    experts = used * width if isinstance(used, int) and isinstance(width, int) else 0
    return _Weights(tuple(layers), embedding, head, norm, max(model.n_ff, experts))


def stage_memory(
    model: ModelFile, first: int, last: int, ctx_size: int, slots: int, n_batch: int = MAX_ROWS
) -> MemoryEstimate:
    """Memory of an engine with layers [first, last) of `model` as a stage, `slots` slots of `ctx_size` tokens each.

    weights = layers, final norm; in a tail the output head
    kv      = slots x padded ctx x KV bytes per token of the layers
    compute = n_batch x (4 n_embd + 3 n_ff) x F32 + n_batch x padded ctx x F16    llama.cpp's compute buffer
            + n_batch x 4 n_embd x F32                                             rows that come in and go out
            + n_vocab x (max(slots, MAX_OUTPUTS) x F32 + VOCAB_BYTES)              in a tail: logits, and the vocabulary
            + STAGE_OVERHEAD
    The compute buffer is what llama.cpp reserves when a context's outputs are bounded (see llama/context.py). With
    experts, n_ff is that of all experts that one row is given to.

    Raises BadModel when the file changed since it was inspected.
    """
    weights = _weights(model)
    padded = -(-ctx_size // CTX_PADDING) * CTX_PADDING
    n_vocab = model.n_vocab if last == model.n_layers else 0
    kv_width = sum(model.n_head_kv[first:last]) * (model.head_dim_k + model.head_dim_v)
    # llama.cpp computes no more rows at a time than its context holds.
    n_rows = min(n_batch, slots * padded)
    rows = n_rows * (8 * model.n_embd + 3 * weights.ff_width) * F32_BYTES
    mask = n_rows * padded * F16_BYTES
    return MemoryEstimate(
        weights=weights.of(first, last),
        kv=slots * padded * kv_width * F16_BYTES,
        compute=rows + mask + n_vocab * (max(slots, MAX_OUTPUTS) * F32_BYTES + VOCAB_BYTES) + STAGE_OVERHEAD,
    )


def choose_capacity(
    model: ModelFile,
    free_bytes: int,
    ctx_size: int = 0,
    slots: int = 0,
    n_batch: int = MAX_ROWS,
    drafts: Sequence[ModelFile] = (),
) -> tuple[int, int]:
    """(ctx_size, slots) that fit into `free_bytes`; 0 means choose, any other value is kept. `drafts` are further
    models with contexts of the same size.

    Starts from 8 slots of min(n_ctx_train, 8192) tokens, halves the slots down to 1 and then the context down to
    512, until the estimate is at most 80% of what is free. When both values are given they may fill all of it.
    Raises NotEnoughMemory, with what is needed, what is free and a remedy.
    """
    ctx, count = ctx_size or min(model.n_ctx_train, AUTO_CTX), slots or AUTO_SLOTS
    share = 100 if ctx_size and slots else AUTO_SHARE_PERCENT
    while (need := _sum((model, *drafts), ctx, count, n_batch)).total * 100 > free_bytes * share:
        if not slots and count > 1:
            count //= 2
        elif not ctx_size and ctx > MIN_CTX:
            ctx = max(ctx // 2, MIN_CTX)
        else:
            raise _not_enough(model, free_bytes, ctx, count, need, share)
    return ctx, count


def _sum(models: Iterable[ModelFile], ctx_size: int, slots: int, n_batch: int) -> MemoryEstimate:
    needs = [estimate_memory(model, ctx_size, slots, n_batch) for model in models]
    parts = [(need.weights, need.kv, need.compute) for need in needs]
    return MemoryEstimate(*map(sum, zip(*parts, strict=True)))


def _not_enough(
    model: ModelFile, free_bytes: int, ctx_size: int, slots: int, need: MemoryEstimate, share: int
) -> NotEnoughMemory:
    usable = "" if share == 100 else f" ({share}% of it usable)"
    smallest = ctx_size <= MIN_CTX and slots == 1
    wanted = f"1 slot of {ctx_size} tokens needs" if slots == 1 else f"{slots} slots of {ctx_size} tokens need"
    remedy = "" if smallest else "choose a smaller --ctx-size or fewer --slots, "
    return NotEnoughMemory(
        f"{model.path}: {wanted} {gigabytes(need.total)} "
        f"(weights {gigabytes(need.weights)}, KV cache {gigabytes(need.kv)}, buffers {gigabytes(need.compute)}), "
        f"free is {gigabytes(free_bytes)}{usable}; {remedy}free memory, or take a smaller model or quantisation"
    )


def gigabytes(n_bytes: int) -> str:
    """Bytes as people read them: "1.25 GB", "310 MB" (powers of ten, as disks and downloads are sold)."""
    if n_bytes >= 10**9:
        return f"{n_bytes / 10**9:.2f} GB"
    return f"{-(-n_bytes // 10**6)} MB"
