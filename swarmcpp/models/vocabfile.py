"""The vocabulary of a model that is somewhere else: from the first bytes of its file, a GGUF without tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from swarmcpp.errors import BadModel
from swarmcpp.models.gguf_header import ARRAY, MAGIC, STRING, Parser, read_header

MAX_METADATA_BYTES = 256 << 20
"""Far above every real model (6 MB with 150,000 tokens and their merges)."""

_START = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of pairs."""
_ARRAY = struct.Struct("<IIQ")
"""Type of the value, type of its elements, their number."""
_INT8, _UINT8, _INT32, _FLOAT32 = 1, 0, 5, 6
_NAME = Path("the model's first bytes")

_TOKENS = "tokenizer.ggml.tokens"
_ARRAYS = {
    _TOKENS: (STRING,),
    "tokenizer.ggml.merges": (STRING,),
    "tokenizer.ggml.scores": (_FLOAT32,),
    "tokenizer.ggml.token_type": (_INT32,),
    "tokenizer.ggml.precompiled_charsmap": (_INT8, _UINT8),
}
"""Element types that llama.cpp takes for granted: it ends the process, or reads past the end, on others."""
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


class _Short(Exception):
    """The bytes end inside the metadata, which has at least `needed`."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _Prefix(Parser):
    """Reads the metadata in a file's first bytes. Raises _Short where these end."""

    def _ends(self, fault: str, needed: int) -> NoReturn:
        if needed > MAX_METADATA_BYTES:
            self._fail(f"claims {needed} bytes of metadata or more, the limit is {MAX_METADATA_BYTES}; it is damaged")
        raise _Short(needed)


def header_bytes_needed(prefix: bytes) -> int | None:
    """None when `prefix`, the first bytes of a GGUF, has all of its metadata; else at least how many bytes that takes.

    Raises BadModel for what is no GGUF.
    """
    try:
        _parsed(prefix)
    except _Short as short:
        return short.needed
    return None


def write_vocab_file(prefix: bytes, target: Path) -> None:
    """Write a GGUF with the metadata of `prefix` and no tensors to `target`, which appears when it is whole.

    `prefix` is at least so many of the first bytes of a model's first file as header_bytes_needed wants. llama.cpp
    loads the result vocab-only. Raises BadModel when the metadata is damaged, or holds no vocabulary that llama.cpp
    can read; OSError when `target` cannot be written.
    """
    try:
        parsed = _parsed(prefix)
    except _Short as short:
        raise BadModel(f"{_NAME}: end after {len(prefix)} bytes, its metadata after {short.needed} or more") from None
    _check_vocabulary(prefix, parsed.pairs)
    # With a split.count llama.cpp would look for the other files.
    kept = [prefix[at] for key, at in parsed.pairs.items() if not key.startswith("split.")]
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as file:
            file.write(_START.pack(MAGIC, parsed.version, 0, len(kept)))
            file.writelines(kept)
        # The whole check of a header, before llama.cpp sees it.
        read_header(scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _parsed(prefix: bytes) -> Parser:
    """A parser that has read all pairs. Raises _Short when `prefix` ends before them, BadModel when this is no GGUF."""
    if len(prefix) < _START.size and MAGIC.startswith(prefix[: len(MAGIC)]):
        raise _Short(_START.size)
    parser = _Prefix(_NAME, prefix)
    parser.metadata()
    return parser


def _check_vocabulary(data: bytes, pairs: Mapping[str, slice]) -> None:
    """Only arrays that llama.cpp can read."""
    arrays = {key: _array(data, key, pairs[key]) for key in _ARRAYS if key in pairs}
    if _TOKENS not in arrays:
        raise BadModel(f"{_NAME}: has no {_TOKENS}, so no text can be made into tokens; get a model with a tokenizer")
    n_tokens = arrays[_TOKENS][1]
    for key, (element, length) in arrays.items():
        if element not in _ARRAYS[key] or (key in _PER_TOKEN and length != n_tokens):
            raise BadModel(
                f"{_NAME}: {key} is not the array that {n_tokens} tokens need; the model is damaged: get it elsewhere"
            )


def _array(data: bytes, key: str, at: slice) -> tuple[int, int]:
    """Type of the elements and length of the array in a pair; (-1, -1) of another value."""
    value = data[at][8 + len(key.encode()) :]
    kind, element, length = _ARRAY.unpack(value[: _ARRAY.size].ljust(_ARRAY.size, b"\0"))
    return (element, length) if kind == ARRAY else (-1, -1)
