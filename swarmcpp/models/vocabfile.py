"""The vocabulary of a model that is somewhere else: from the first bytes of its file, a GGUF without tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.errors import BadModel
from swarmcpp.models.gguf_header import (
    ARRAY,
    MAGIC,
    MAX_KEY_BYTES,
    MAX_PAIRS,
    MAX_STRING_BYTES,
    MAX_STRINGS,
    STRING,
    SUPPORTED_VERSIONS,
    read_header,
)

MAX_METADATA_BYTES = 256 << 20
"""Far above every real model (6 MB with 150,000 tokens and their merges)."""

_START = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of pairs."""
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_INT8, _UINT8, _INT32, _FLOAT32 = 1, 0, 5, 6
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Of one scalar by its GGUF type."""

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


@dataclass(frozen=True, slots=True)
class _Pair:
    """A key with its value at bytes [start, end); `element` and `length` of an array, else -1."""

    key: str
    start: int
    end: int
    element: int = -1
    length: int = -1


def header_bytes_needed(prefix: bytes) -> int | None:
    """None when `prefix`, the first bytes of a GGUF, has all of its metadata; else at least how many bytes that takes.

    Raises BadModel for what is no GGUF.
    """
    try:
        _metadata(prefix, "the model's first bytes")
    except _Short as short:
        return short.needed
    return None


def write_vocab_file(header: bytes | Path, target: Path) -> None:
    """Write a GGUF with the metadata of `header` and no tensors to `target`, which appears when it is whole.

    `header` is a model's first file, or at least so many of its first bytes as header_bytes_needed wants. llama.cpp
    loads the result vocab-only. Raises BadModel when the metadata is damaged, or holds no vocabulary that llama.cpp
    can read; OSError when `target` cannot be written.
    """
    name = str(header) if isinstance(header, Path) else "the model's first bytes"
    data = _beginning(header) if isinstance(header, Path) else header
    try:
        pairs = _metadata(data, name)
    except _Short as short:
        raise BadModel(f"{name}: end after {len(data)} bytes, its metadata after {short.needed} or more") from None
    _check_vocabulary(pairs, name)
    # With a split.count llama.cpp would look for the other files.
    kept = [pair for pair in pairs if not pair.key.startswith("split.")]
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as file:
            file.write(_START.pack(MAGIC, _U32.unpack_from(data, 4)[0], 0, len(kept)))
            for pair in kept:
                file.write(memoryview(data)[pair.start : pair.end])
        # The whole check of a header, before llama.cpp sees it.
        read_header(scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _beginning(path: Path) -> bytes:
    """So much of a file as has its metadata."""
    needed: int | None = _START.size
    data = b""
    try:
        with path.open("rb") as file:
            while needed is not None and needed > len(data):
                # Twice as much each time: the metadata is walked anew.
                more = file.read(max(needed, 2 * len(data), 1 << 20) - len(data))
                if not more:
                    break
                data += more
                needed = header_bytes_needed(data)
    except OSError as error:
        raise BadModel(f"{path}: cannot be read ({error.strerror}); check the path and the disk") from None
    return data


def _metadata(data: bytes, name: str) -> list[_Pair]:
    """All pairs. Raises _Short when `data` ends before them, BadModel when this is no GGUF."""
    if len(data) >= _START.size or not MAGIC.startswith(data[: len(MAGIC)]):
        magic, version, _, count = _START.unpack(data[: _START.size].ljust(_START.size, b"\0"))
        if magic != MAGIC or version not in SUPPORTED_VERSIONS:
            raise BadModel(f"{name}: is no GGUF of version 2 or 3; get the model from elsewhere")
        if count > MAX_PAIRS:
            raise BadModel(f"{name}: claims {count} metadata pairs, the limit is {MAX_PAIRS}; the model is damaged")
        try:
            return list(_Walker(data).pairs(count))
        except ValueError as error:
            raise BadModel(f"{name}: {error}; the model is damaged: get it from elsewhere") from None
    raise _Short(_START.size)


class _Walker:
    """One pass over the pairs. Raises _Short at the end of the data, ValueError on what no GGUF has."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = _START.size

    def pairs(self, count: int) -> Iterator[_Pair]:
        for _ in range(count):
            start = self._at
            key = self._string(MAX_KEY_BYTES).decode()
            kind = self._number(_U32)
            if kind == ARRAY:
                element, length = self._number(_U32), self._number(_U64)
                self._skip_array(element, length)
                yield _Pair(key, start, self._at, element, length)
                continue
            if kind == STRING:
                self._string(MAX_STRING_BYTES)
            else:
                self._take(_width(kind))
            yield _Pair(key, start, self._at)

    def _skip_array(self, element: int, length: int) -> None:
        if element != STRING:
            self._take(_width(element) * length)
            return
        if length > MAX_STRINGS:
            raise ValueError(f"an array claims {length} strings, the limit is {MAX_STRINGS}")
        # The one hot loop, 300,000 turns for a large vocabulary: no call in it, and no bound but at its end, as
        # unpack_from fails once the position has left the data.
        data, at, length_at = self._data, self._at, _U64.unpack_from
        try:
            for _ in range(length):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            at = max(at + 8, len(data) + 1)
        self._take(at - self._at)

    def _string(self, limit: int) -> bytes:
        length = self._number(_U64)
        if length > limit:
            raise ValueError(f"a string claims {length} bytes, the limit is {limit}")
        start = self._take(length)
        return self._data[start : start + length]

    def _number(self, kind: struct.Struct) -> int:
        value: int = kind.unpack_from(self._data, self._take(kind.size))[0]
        return value

    def _take(self, n_bytes: int) -> int:
        """Start of the next `n_bytes`, which are then passed."""
        start, end = self._at, self._at + n_bytes
        if end > MAX_METADATA_BYTES:
            raise ValueError(f"its metadata claims {end} bytes or more, the limit is {MAX_METADATA_BYTES}")
        if end > len(self._data):
            raise _Short(end)
        self._at = end
        return start


def _width(kind: int) -> int:
    if kind not in _BYTES:
        raise ValueError(f"a value has the unknown type {kind}")
    return _BYTES[kind]


def _check_vocabulary(pairs: list[_Pair], name: str) -> None:
    """Only arrays that llama.cpp can read."""
    found = {pair.key: pair for pair in pairs}
    if _TOKENS not in found:
        raise BadModel(f"{name}: has no {_TOKENS}, so no text can be made into tokens; get a model with a tokenizer")
    n_tokens = found[_TOKENS].length
    for key, elements in _ARRAYS.items():
        pair = found.get(key)
        if pair is None:
            continue
        if pair.element not in elements or (key in _PER_TOKEN and pair.length != n_tokens):
            raise BadModel(
                f"{name}: {key} is not the array that {n_tokens} tokens need; the model is damaged: get it elsewhere"
            )
