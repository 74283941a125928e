"""Writes GGUFs with deterministic random weights: models of a real shape without a download, for tests and benches.

Quantised tensors are not quantised: the blocks' bytes are drawn directly, with scales that give weights a standard
deviation of 1 / sqrt(inputs), so that activations stay of order 1 and a 0.5B model is written in seconds. Tensors
are written one by one; the largest tensor is all that is ever in memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from swarmcpp.errors import BadModel
from swarmcpp.models.synthetic_vocab import Tokenizer, write_tokenizer

Quant = Literal["F32", "F16", "Q8_0", "Q4_0"]
Architecture = Literal["llama", "phi3", "qwen2", "qwen3", "qwen3moe"]

_FILE_TYPES: dict[Quant, gguf.LlamaFileType] = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
BLOCK = 32
"""Weights per block of Q8_0 and Q4_0; every row length must be a multiple."""
Q8_STD = 73.3
"""Standard deviation of a uniform integer in [-127, 127]."""
Q4_STD = 4.64
"""Root mean square of a uniform integer in [-8, 7]."""
OUTPUT_NORM = 4.0
"""Weights of the final norm: logits get this standard deviation, so that sampling has something to choose."""
BIAS_STD = 0.1
QUIET = 0.01
"""Of the usual weights, in layers that shall change next to nothing."""
EXPERTS_USED = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Hyper-parameters of a decoder, as GGUF names them. `head_dim` 0 means n_embd / n_head."""

    name: str
    architecture: Architecture
    n_layers: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int
    n_vocab: int
    tied: bool = False
    """The output head is the token embedding."""
    rope_freq_base: float = 10000.0
    rms_eps: float = 1e-6
    head_dim: int = 0
    n_expert: int = 0
    """Experts of each layer, EXPERTS_USED of them for a token; 0 for a dense model."""
    counts: bool = False
    """After each token it says the one with the next id, at the speed of any model of its shape: its layers say next to
    nothing, and its head has the rows of the embedding, each one further. Not with `tied`."""

    @property
    def n_rot(self) -> int:
        """Width of one head."""
        return self.head_dim or self.n_embd // self.n_head


QWEN25_05B = Shape("Qwen2.5-0.5B-shape", "qwen2", 24, 896, 14, 2, 4864, 32768, 151936, True, 1e6)
QWEN25_7B = Shape("Qwen2.5-7B-shape", "qwen2", 28, 3584, 28, 4, 18944, 32768, 152064, False, 1e6)
QWEN25_14B = Shape("Qwen2.5-14B-shape", "qwen2", 48, 5120, 40, 8, 13824, 32768, 152064, False, 1e6)
TINYLLAMA_11B = Shape("TinyLlama-1.1B-shape", "llama", 22, 2048, 32, 4, 5632, 2048, 32000, False, 1e4, 1e-5)
TINY = Shape("tiny", "llama", 2, 64, 4, 2, 128, 512, 512)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to write. `shape` is numpy's order: (rows, columns), or (experts, rows, columns)."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    rolled: str = ""
    """The tensor whose rows it has, each one further."""

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) >= 2


def write_model(
    path: Path,
    shape: Shape,
    *,
    quant: Quant,
    seed: int = 0,
    tokenizer: Tokenizer = "bytes",
) -> Path:
    """Write a GGUF of `shape` to `path` and return `path`. Same arguments, same bytes.

    `tokenizer` "bytes" is a byte-level BPE that encodes any text (see synthetic_vocab); "none" has no vocabulary
    and takes token ids only. Raises BadModel for a shape that cannot be written.
    """
    _check(path, shape)
    partial = path.with_name(path.name + ".part")
    try:
        _write(partial, shape, quant, seed, tokenizer)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write(path: Path, shape: Shape, quant: Quant, seed: int, tokenizer: Tokenizer) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    try:
        _write_metadata(writer, shape, quant)
        write_tokenizer(writer, shape.n_vocab, tokenizer)
        tensors = tuple(_tensors(shape))
        for tensor in tensors:
            _describe(writer, tensor, quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_data(tensor, quant, seed))
    finally:
        writer.close()


def _check(path: Path, shape: Shape) -> None:
    widths = {"n_embd": shape.n_embd, "n_ff": shape.n_ff, "n_head * head_dim": shape.n_head * shape.n_rot}
    for key, width in widths.items():
        if width <= 0 or width % BLOCK:
            raise BadModel(f"{path}: {key} = {width} of shape {shape.name!r} must be a multiple of {BLOCK}")
    if shape.counts and shape.tied:
        raise BadModel(f"{path}: a model that counts has a head of its own; let {shape.name!r} not be tied")
    if shape.n_head_kv <= 0 or shape.n_head % shape.n_head_kv:
        raise BadModel(f"{path}: n_head_kv = {shape.n_head_kv} of {shape.name!r} must divide n_head = {shape.n_head}")


def _write_metadata(writer: gguf.GGUFWriter, shape: Shape, quant: Quant) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(shape.name)
    writer.add_description("random weights, for tests and benchmarks")
    writer.add_file_type(_FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_rope_dimension_count(shape.n_rot)
    writer.add_vocab_size(shape.n_vocab)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(EXPERTS_USED)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if shape.head_dim:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)


def _tensors(shape: Shape) -> Iterator[_Tensor]:
    """Every tensor of the model, in the order that converters write them."""
    embd = shape.n_embd
    yield _Tensor("token_embd.weight", (shape.n_vocab, embd), std=1 / math.sqrt(embd))
    yield _Tensor("output_norm.weight", (embd,), mean=OUTPUT_NORM, std=0.05 * OUTPUT_NORM)
    if shape.counts:
        yield _Tensor("output.weight", (shape.n_vocab, embd), std=1 / math.sqrt(embd), rolled="token_embd.weight")
    elif not shape.tied:
        yield _Tensor("output.weight", (shape.n_vocab, embd), std=1 / math.sqrt(embd))
    for layer in range(shape.n_layers):
        yield from _layer(f"blk.{layer}.", shape)


def _layer(prefix: str, shape: Shape) -> Iterator[_Tensor]:
    embd, ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.n_rot, shape.n_head_kv * shape.n_rot
    matrices: dict[str, tuple[int, ...]] = {"attn_output": (embd, n_q)}
    if shape.architecture == "phi3":
        matrices |= {"attn_qkv": (n_q + 2 * n_kv, embd), "ffn_up": (2 * ff, embd), "ffn_down": (embd, ff)}
    else:
        matrices |= {"attn_q": (n_q, embd), "attn_k": (n_kv, embd), "attn_v": (n_kv, embd)}
        experts, suffix = ((shape.n_expert,), "_exps") if shape.n_expert else ((), "")
        matrices |= {f"ffn_{name}{suffix}": (*experts, ff, embd) for name in ("gate", "up")}
        matrices[f"ffn_down{suffix}"] = (*experts, embd, ff)
    if shape.n_expert:
        matrices["ffn_gate_inp"] = (shape.n_expert, embd)
    norms = {"attn_norm": embd, "ffn_norm": embd}
    if shape.architecture in ("qwen3", "qwen3moe"):
        norms |= {"attn_q_norm": shape.n_rot, "attn_k_norm": shape.n_rot}
    for name, width in norms.items():
        yield _Tensor(f"{prefix}{name}.weight", (width,), mean=1.0, std=0.05)
    for name, sizes in matrices.items():
        quiet = QUIET if shape.counts and name in ("attn_output", "ffn_down") else 1.0
        yield _Tensor(f"{prefix}{name}.weight", sizes, std=quiet / math.sqrt(sizes[-1]))
        if shape.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
            yield _Tensor(f"{prefix}{name}.bias", sizes[:1], std=BIAS_STD)


def _describe(writer: gguf.GGUFWriter, tensor: _Tensor, quant: Quant) -> None:
    """Announce `tensor`; its data follows later, in the same order."""
    kind = GGMLQuantizationType[quant] if tensor.is_matrix else GGMLQuantizationType.F32
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(tensor.shape) // block * block_bytes
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes)
        return
    byte_shape = (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
    writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), n_bytes, raw_dtype=kind)


def _data(tensor: _Tensor, quant: Quant, seed: int) -> npt.NDArray[Any]:
    """The tensor's bytes or floats. Each tensor has its own generator, so none depends on those before it."""
    if tensor.rolled:
        same = _data(replace(tensor, name=tensor.rolled, rolled=""), quant, seed)
        return np.roll(same.reshape(tensor.shape[0], -1), 1, axis=0)
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if tensor.is_matrix and quant == "Q8_0":
        return _q8_0(tensor, rng)
    if tensor.is_matrix and quant == "Q4_0":
        return _q4_0(tensor, rng)
    values = rng.standard_normal(tensor.shape, dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    return values.astype(np.float16) if tensor.is_matrix and quant == "F16" else values


def _scales(n_blocks: int, scale: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """[n_blocks, 2] bytes of F16 scales around `scale`, of either sign as quantisers write them.

    The signs also cancel the mean of Q4_0's lopsided range.
    """
    spread = rng.uniform(0.75, 1.25, n_blocks)
    signs = rng.choice(np.array([-1.0, 1.0]), n_blocks)
    scales: npt.NDArray[np.uint8] = (scale * spread * signs).astype("<f2").view(np.uint8).reshape(n_blocks, 2)
    return scales


def _q8_0(tensor: _Tensor, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of 34 bytes: F16 scale, 32 int8."""
    n_blocks = math.prod(tensor.shape) // BLOCK
    blocks = np.empty((n_blocks, 34), np.uint8)
    blocks[:, :2] = _scales(n_blocks, tensor.std / Q8_STD, rng)
    quants = rng.integers(0, 256, (n_blocks, BLOCK), dtype=np.uint8)
    # No quantiser writes -128, and kernels that negate int8 would overflow on it.
    quants[quants == 0x80] = 0x81
    blocks[:, 2:] = quants
    return blocks


def _q4_0(tensor: _Tensor, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of 18 bytes: F16 scale, 32 nibbles that stand for -8..7."""
    n_blocks = math.prod(tensor.shape) // BLOCK
    blocks = np.empty((n_blocks, 18), np.uint8)
    blocks[:, :2] = _scales(n_blocks, tensor.std / Q4_STD, rng)
    blocks[:, 2:] = rng.integers(0, 256, (n_blocks, 16), dtype=np.uint8)
    return blocks
