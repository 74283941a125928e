"""How much memory a model takes, and how many slots of which context fit. Pure functions.

Sizes in bytes, contexts in tokens per slot (each slot is its own stream of the KV cache).
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmcpp.errors import NotEnoughMemory
from swarmcpp.models.inspect import ModelFile

F16_BYTES = 2
F32_BYTES = 4
CTX_PADDING = 256
"""llama.cpp rounds the context of a stream up to a multiple of this."""
DEFAULT_BATCH = 512
"""llama.cpp's default rows per ubatch."""
OVERHEAD = 96 << 20
"""An engine process before its model: interpreter, libraries, threads, work buffers."""

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


def estimate_memory(model: ModelFile, ctx_size: int, slots: int, n_batch: int = DEFAULT_BATCH) -> MemoryEstimate:
    """Memory of an engine with `slots` slots of `ctx_size` tokens each that computes `n_batch` rows at a time.

    kv      = slots x padded ctx x kv_bytes_per_token
    compute = n_batch x (n_vocab + 4 n_embd + 2 n_ff) x F32   logits, residual and norms, gate and up
            + n_batch x padded ctx x F16                       attention mask
            + slots x n_vocab x F32                            the rows of logits that are read out
            + OVERHEAD
    The first two are alive at different moments, so their sum is above what llama.cpp's scheduler reserves
    (checked against its own figures in the tests).
    """
    padded = -(-ctx_size // CTX_PADDING) * CTX_PADDING
    step = n_batch * (model.n_vocab + 4 * model.n_embd + 2 * model.n_ff) * F32_BYTES
    mask = n_batch * padded * F16_BYTES
    logits = slots * model.n_vocab * F32_BYTES
    return MemoryEstimate(
        weights=model.tensor_bytes,
        kv=slots * padded * kv_bytes_per_token(model),
        compute=step + mask + logits + OVERHEAD,
    )


def choose_capacity(
    model: ModelFile, free_bytes: int, ctx_size: int = 0, slots: int = 0, n_batch: int = DEFAULT_BATCH
) -> tuple[int, int]:
    """(ctx_size, slots) that fit into `free_bytes`; 0 means choose, any other value is kept.

    Starts from 8 slots of min(n_ctx_train, 8192) tokens, halves the slots down to 1 and then the context down to
    512, until the estimate is at most 80% of what is free. When both values are given they may fill all of it.
    Raises NotEnoughMemory, with what is needed, what is free and a remedy.
    """
    ctx, count = ctx_size or min(model.n_ctx_train, AUTO_CTX), slots or AUTO_SLOTS
    share = 100 if ctx_size and slots else AUTO_SHARE_PERCENT
    while estimate_memory(model, ctx, count, n_batch).total * 100 > free_bytes * share:
        if not slots and count > 1:
            count //= 2
        elif not ctx_size and ctx > MIN_CTX:
            ctx = max(ctx // 2, MIN_CTX)
        else:
            raise _not_enough(model, free_bytes, ctx, count, n_batch, share)
    return ctx, count


def _not_enough(
    model: ModelFile, free_bytes: int, ctx_size: int, slots: int, n_batch: int, share: int
) -> NotEnoughMemory:
    need = estimate_memory(model, ctx_size, slots, n_batch)
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
