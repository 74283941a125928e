"""What a GGUF is, and whether swarmcpp can serve it, from its header alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import gguf

from swarmcpp.errors import BadModel
from swarmcpp.models.gguf_header import GgufHeader, read_header

ENCODERS = frozenset(
    {
        "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
        "t5encoder", "gemma-embedding", "llama-embed",
    }
)  # fmt: skip
NOT_TEXT = frozenset({"clip", "wavtokenizer-dec"})
ENCODER_DECODERS = frozenset({"t5"})
DIFFUSION = frozenset({"dream", "llada", "llada-moe", "rnd1"})
RECURRENT = frozenset(
    {
        "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7",
        "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
        "qwen3next", "kimi-linear", "qwen35", "qwen35moe",
    }
)  # fmt: skip
"""Architectures as llama.cpp groups them (llm_arch_is_recurrent, _hybrid, _diffusion in its llama-arch.cpp)."""

KNOWN = frozenset(gguf.MODEL_ARCH_NAMES.values())
MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS; also bounds what a damaged block_count can make us allocate."""
MAX_TOKENS = 1 << 31
"""Positions and token ids are int32 in llama.cpp."""
MAX_WIDTH = 1 << 24
"""Far above every embedding width, head count and head width."""

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""llama.cpp's name of one file of a split GGUF; numbers start at 1."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF that swarmcpp can serve. Sizes in bytes, contexts in tokens; `files` has every file of a split."""

    path: Path
    files: tuple[Path, ...]
    name: str
    architecture: str
    n_layers: int
    n_ctx_train: int
    n_embd: int
    n_head: int
    """Query heads; the largest where layers differ."""
    n_head_kv: tuple[int, ...]
    """KV heads of each layer; 0 for a layer without attention."""
    head_dim_k: int
    head_dim_v: int
    n_ff: int
    """Width of the widest feed-forward layer; 0 where the file does not say."""
    n_vocab: int
    size_bytes: int
    tensor_bytes: int
    n_params: int
    ftype: str
    """Such as "Q8_0" or "Q4_K_M"."""
    chat_template: str | None
    has_tokenizer: bool


def inspect(path: Path) -> ModelFile:
    """The model at `path`. Raises BadModel for a file that is damaged or that swarmcpp cannot serve."""
    header = read_header(path)
    _refuse_other_kinds(header)
    headers = _split_headers(header)
    fields = _Fields(header)
    tensors = [tensor for part in headers for tensor in part.tensors]
    if not tensors:
        raise BadModel(f"{path}: has a vocabulary and no weights; get the file of the whole model")
    if not any(tensor.name == "token_embd.weight" for tensor in tensors):
        raise BadModel(f"{path}: has no tensor token_embd.weight, so it is no whole text model; download it again")
    types = Counter[str]()
    for tensor in tensors:
        types[tensor.ggml_type.name] += tensor.n_bytes
    n_layers = fields.count("block_count", MAX_LAYERS)
    n_embd = fields.count("embedding_length", MAX_WIDTH)
    n_head = max(fields.per_layer("attention.head_count", n_layers))
    if n_head == 0:
        raise BadModel(f"{path}: has no attention heads; swarmcpp serves attention models with a plain KV cache")
    return ModelFile(
        path=path,
        files=tuple(part.path for part in headers),
        name=fields.text("general.name") or path.stem,
        architecture=fields.architecture,
        n_layers=n_layers,
        n_ctx_train=fields.count("context_length", MAX_TOKENS),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=fields.per_layer("attention.head_count_kv", n_layers, default="attention.head_count"),
        head_dim_k=fields.count("attention.key_length", MAX_WIDTH, default=n_embd // n_head),
        head_dim_v=fields.count("attention.value_length", MAX_WIDTH, default=n_embd // n_head),
        n_ff=max(fields.per_layer("feed_forward_length", n_layers, default=0)),
        n_vocab=_n_vocab(fields, headers),
        size_bytes=sum(part.file_size for part in headers),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors),
        n_params=sum(tensor.n_elements for tensor in tensors),
        ftype=_ftype(header, types),
        chat_template=fields.text("tokenizer.chat_template"),
        has_tokenizer=fields.text("tokenizer.ggml.model") not in (None, "no_vocab", "none"),
    )


def _refuse_other_kinds(header: GgufHeader) -> None:
    """GGUFs that are no text decoder with a KV cache. The most telling reason comes first."""
    path, kind = header.path, header.metadata.get("general.type", "model")
    if kind == "adapter":
        raise BadModel(f"{path}: is a LoRA adapter, not a model; give the GGUF of its base model")
    architecture = header.metadata.get("general.architecture")
    if kind == "mmproj" or architecture == "clip":
        raise BadModel(f"{path}: is a multimodal projector (mmproj), not a text model; give the text model's GGUF")
    if kind == "imatrix" or architecture == "controlvector":
        raise BadModel(f"{path}: holds {kind if kind == 'imatrix' else 'a control vector'}, not a model; give a model")
    if not isinstance(architecture, str):
        raise BadModel(f"{path}: has no general.architecture; it is damaged or no language model")
    prefix = f"{path}: architecture {architecture[:64]!r}"
    if architecture in ENCODERS or header.metadata.get(f"{architecture}.attention.causal") is False:
        raise BadModel(f"{prefix} only encodes (embeddings) and cannot generate text; give a text generation model")
    if architecture in ENCODER_DECODERS:
        raise BadModel(f"{prefix} is an encoder-decoder; swarmcpp serves decoder-only models")
    if architecture in NOT_TEXT:
        raise BadModel(f"{prefix} is no text model; give a text generation model")
    if architecture in DIFFUSION:
        raise BadModel(f"{prefix} generates by diffusion; swarmcpp serves models that generate token by token")
    if architecture in RECURRENT:
        raise BadModel(f"{prefix} is recurrent or hybrid; swarmcpp serves attention models with a plain KV cache")
    if architecture not in KNOWN:
        raise BadModel(f"{prefix} is not supported; give a model that this llama.cpp knows, such as qwen2 or llama")


def _split_headers(header: GgufHeader) -> tuple[GgufHeader, ...]:
    """Headers of all files of a split, the given one first; of the file alone when it is whole."""
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return (header,)
    path = header.path
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise BadModel(
            f"{path}: is one of {count} files of a split GGUF, but is not named NAME-00001-of-{count:05d}.gguf; "
            "give the files their original names"
        )
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadModel(f"{path}: split GGUF with {len(missing)} of {count} files missing ({shown}); download them too")
    if path != parts[0]:
        raise BadModel(f"{path}: is file {match['number']} of a split GGUF; give the first, {parts[0].name}")
    headers = (header, *(read_header(part) for part in parts[1:]))
    for number, part in enumerate(headers):
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise BadModel(f"{part.path}: is not file {number + 1} of {count} of its split GGUF; download it again")
    expected = header.metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in headers)
    if expected != found:
        raise BadModel(f"{path}: split GGUF has {found} tensors, expected {expected}; download all its files again")
    return headers


class _Fields:
    """Typed access to the metadata. Keys without a known namespace are those of the architecture."""

    def __init__(self, header: GgufHeader) -> None:
        self._path = header.path
        self._metadata = header.metadata
        self.architecture = str(header.metadata["general.architecture"])

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        return value if isinstance(value, str) and value else None

    def count(self, key: str, limit: int, *, default: int | None = None) -> int:
        """A whole number in [1, limit]."""
        full = f"{self.architecture}.{key}"
        value = self._metadata.get(full, default)
        if value is None:
            self._missing(full)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self._bad(full, f"between 1 and {limit}")
        return value

    def per_layer(self, key: str, n_layers: int, *, default: str | int | None = None) -> tuple[int, ...]:
        """One number for each layer: the file has one for all, or an array. A `default` key is read instead."""
        full = f"{self.architecture}.{key}"
        value = self._metadata.get(full)
        if value is None and isinstance(default, str):
            return self.per_layer(default, n_layers)
        if value is None:
            value = default
        if value is None:
            self._missing(full)
        values = value if isinstance(value, tuple) else (value,) * n_layers
        counts = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_WIDTH]
        if len(counts) != n_layers or len(values) != n_layers:
            self._bad(full, f"a number or {n_layers} numbers, each between 0 and {MAX_WIDTH}")
        return tuple(counts)

    def _missing(self, key: str) -> NoReturn:
        raise BadModel(f"{self._path}: has no {key}, which the model needs; convert or download it again")

    def _bad(self, key: str, wanted: str) -> NoReturn:
        shown = repr(self._metadata.get(key))[:64]
        raise BadModel(f"{self._path}: has {key} = {shown}, must be {wanted}; the file is damaged: download it again")


def _n_vocab(fields: _Fields, headers: tuple[GgufHeader, ...]) -> int:
    """Size of the vocabulary: of the token list, else as stated, else rows of the token embedding."""
    listed = headers[0].array_length("tokenizer.ggml.tokens")
    if listed:
        return listed
    embedding = next(t for part in headers for t in part.tensors if t.name == "token_embd.weight")
    return fields.count("vocab_size", MAX_TOKENS, default=embedding.shape[-1])


def _ftype(header: GgufHeader, types: Counter[str]) -> str:
    """The quantisation's name as the file states it, else the type that most of the weights' bytes have."""
    value = header.metadata.get("general.file_type")
    try:
        stated = gguf.LlamaFileType(value)
    except ValueError:
        return types.most_common(1)[0][0]
    return str(stated.name).removeprefix("MOSTLY_").removeprefix("ALL_")
