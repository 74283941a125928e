"""A bounded reader of GGUF v2/v3 headers.

`gguf.GGUFReader` builds a numpy view for every element of every array: many seconds on a vocabulary of 150,000
tokens. It also trusts the counts it reads, which makes a damaged file a traceback or a huge allocation. This
reader skips large arrays by their length fields alone, never allocates more than the file could hold, and turns
every fault into one `errors.BadModel` line: path, what is wrong, where, what to do.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from swarmcpp.errors import BadModel

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
"""What the format says when general.alignment is absent."""

MAX_KEY_BYTES = 65535
"""The format's own limit on a key."""
MAX_TENSOR_NAME_BYTES = 63
"""ggml's GGML_MAX_NAME less its terminator; llama.cpp refuses longer names."""
MAX_DIMENSIONS = 4
"""ggml's GGML_MAX_DIMS."""
KEPT_SCALARS = 512
"""Arrays of scalars up to this length are kept: llama.cpp allows 512 layers, so per-layer arrays fit
and the scores of a vocabulary do not."""
KEPT_STRINGS = 64
"""String arrays up to this length are kept (languages, tags); vocabularies and merges are skipped."""
MAX_STRING_BYTES = 1 << 24
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 24
"""Far above every real model (templates of 100 KB, 30,000 tensors of an unmerged MoE, 500,000 merges), and low
enough that a hostile file costs seconds at most."""
MIN_PAIR_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
"""Least bytes of a key-value pair and of a tensor's entry: they bound the counts that a file can claim."""

STRING, ARRAY = 8, 9
_SCALARS: dict[int, tuple[str, str, int]] = {
    0: ("uint8", "B", 1),
    1: ("int8", "b", 1),
    2: ("uint16", "H", 2),
    3: ("int16", "h", 2),
    4: ("uint32", "I", 4),
    5: ("int32", "i", 4),
    6: ("float32", "f", 4),
    7: ("bool", "?", 1),
    10: ("uint64", "Q", 8),
    11: ("int64", "q", 8),
    12: ("float64", "d", 8),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_DAMAGED = "the file is damaged: download it again"

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """A metadata array that was skipped: the kind of its elements ("string", "float32", ...) and their number."""

    kind: str
    length: int


Value = Scalar | tuple[Scalar, ...] | ArrayInfo


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry. `shape` is ggml's ne order (fastest dimension first); `offset` is absolute in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Product of `shape`; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All of a GGUF but its tensor data. Offsets and sizes in bytes."""

    path: Path
    version: int
    metadata: dict[str, Value]
    pairs: dict[str, slice]
    """Where in the file each key of the metadata is with its value."""
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int
    alignment: int

    def array_length(self, key: str) -> int | None:
        """Elements of the array at `key`, kept or skipped; None when it is absent or no array."""
        value = self.metadata.get(key)
        if isinstance(value, ArrayInfo):
            return value.length
        return len(value) if isinstance(value, tuple) else None


def read_header(path: Path) -> GgufHeader:
    """The checked header of the GGUF at `path`.

    Raises BadModel for everything that is wrong with the file. The mapping is read only here, so a file that
    another process truncates in these milliseconds is the one thing that is not caught.
    """
    with _mapped(path) as data:
        return Parser(path, data).header()


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, read-only. Only regular files: opening a FIFO would block for ever."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadModel(f"{path}: is a directory, not a GGUF file; give the path of the .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise BadModel(f"{path}: is not a regular file; give the path of a .gguf file")
        if status.st_size == 0:
            raise BadModel(f"{path}: is empty (0 bytes), not a GGUF file; download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except FileNotFoundError:
        raise BadModel(f"{path}: no such file; check the path, or see the known names with `swarmcpp models`") from None
    except PermissionError:
        raise BadModel(f"{path}: no permission to read it; change its mode or run as its owner") from None
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the path, or a file that became empty between stat and mmap.
        raise BadModel(f"{path}: cannot be read ({error}); check the path and the disk") from None


class Parser:
    """One pass over a header. `_at` is the position of the next unread byte."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self.version = 0
        self.n_tensors = 0
        self.pairs: dict[str, slice] = {}
        """See `GgufHeader.pairs`."""

    def header(self) -> GgufHeader:
        metadata = self.metadata()
        self._bound(self.n_tensors, MIN_TENSOR_BYTES, "tensors", MAX_TENSORS)
        alignment = self._alignment(metadata)
        entries = self._tensor_entries(self.n_tensors)
        data_offset = _align(self._at, alignment)
        tensors = self._place(entries, data_offset, alignment)
        return GgufHeader(self._path, self.version, metadata, self.pairs, tensors, data_offset, self._size, alignment)

    def metadata(self) -> dict[str, Value]:
        """All that comes before the tensors. To be called once. Raises BadModel."""
        self.version = self._preamble()
        self.n_tensors = self._u64("the tensor count")
        n_pairs = self._u64("the metadata count")
        self._bound(n_pairs, MIN_PAIR_BYTES, "metadata pairs", MAX_PAIRS)
        metadata: dict[str, Value] = {}
        for index in range(n_pairs):
            start = self._at
            key = self._string(f"key {index} of {n_pairs}", MAX_KEY_BYTES)
            if key in metadata:
                self._fail(f"has the metadata key {_shown(key)} twice; {_DAMAGED}", at=start)
            metadata[key] = self._value(_shown(key), self._u32(f"the type of {_shown(key)}"))
            self.pairs[key] = slice(start, self._at)
        return metadata

    def _preamble(self) -> int:
        if self._data[:4] != MAGIC:
            start = bytes(self._data[:4])
            raise BadModel(
                f"{self._path}: is not a GGUF file (starts with {start!r} instead of {MAGIC!r}); "
                "give a .gguf file, or convert the model with llama.cpp's convert_hf_to_gguf.py"
            )
        self._at = 4
        version = self._u32("the version")
        if version & 0xFFFF == 0 and version:
            self._fail("is a big-endian GGUF; get the little-endian file", at=4)
        if version not in SUPPORTED_VERSIONS:
            self._fail(f"has GGUF version {version}, supported are 2 and 3; convert the model again", at=4)
        return version

    def _value(self, key: str, kind: int) -> Value:
        """The next value; `key` is its name as errors show it."""
        if kind == STRING:
            return self._string(f"the value of {key}")
        if kind != ARRAY:
            return self._scalars(key, kind, 1)[0]
        element = self._u32(f"the element type of {key}")
        length = self._u64(f"the length of {key}")
        if element == STRING:
            return self._strings(key, length)
        if element == ARRAY:
            self._fail(f"has nested arrays in {key}, which llama.cpp does not read; {_DAMAGED}", at=self._at)
        name, _, size = self._scalar_kind(key, element)
        self._bound(length, size, f"elements of {key}")
        if length <= KEPT_SCALARS:
            return self._scalars(key, element, length)
        self._at += length * size
        return ArrayInfo(name, length)

    def _scalar_kind(self, key: str, kind: int) -> tuple[str, str, int]:
        if kind not in _SCALARS:
            self._fail(f"has a value of unknown type {kind} at key {key}; {_DAMAGED}", at=self._at)
        return _SCALARS[kind]

    def _scalars(self, key: str, kind: int, length: int) -> tuple[Scalar, ...]:
        _, code, size = self._scalar_kind(key, kind)
        start = self._take(length * size, f"the value of {key}")
        return struct.unpack_from(f"<{length}{code}", self._data, start)

    def _strings(self, key: str, length: int) -> tuple[str, ...] | ArrayInfo:
        self._bound(length, 8, f"strings of {key}", MAX_STRINGS)
        if length <= KEPT_STRINGS:
            return tuple(self._string(f"string {index} of {key}") for index in range(length))
        self._skip_strings(key, length)
        return ArrayInfo("string", length)

    def _skip_strings(self, key: str, length: int) -> None:
        # The one hot loop: 300,000 turns for a large vocabulary and its merges. unpack_from fails by itself
        # once the position has left the file, so a bound per turn is not needed.
        data, at, length_at = self._data, self._at, _U64.unpack_from
        try:
            for _ in range(length):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            at = max(at + 8, self._size + 1)
        if at > self._size:
            self._ends(f"ends inside the strings of {key}; {_DAMAGED}", at)
        self._at = at

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value <= 0 or value & (value - 1):
            self._fail(f"has general.alignment = {value!r}, which is no power of two; {_DAMAGED}", at=self._at)
        return value

    def _tensor_entries(self, n_tensors: int) -> list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
        entries = []
        seen: set[str] = set()
        for index in range(n_tensors):
            start = self._at
            name = self._string(f"the name of tensor {index} of {n_tensors}", MAX_TENSOR_NAME_BYTES)
            if name in seen:
                self._fail(f"has the tensor {name!r} twice; {_DAMAGED}", at=start)
            seen.add(name)
            n_dims = self._u32(f"the dimensions of {name!r}")
            if n_dims > MAX_DIMENSIONS:
                self._fail(f"has {n_dims} dimensions for tensor {name!r}, at most 4 exist; {_DAMAGED}", at=start)
            at = self._take(8 * n_dims, f"the shape of {name!r}")
            shape = struct.unpack_from(f"<{n_dims}Q", self._data, at)
            if 0 in shape:
                self._fail(f"has tensor {name!r} with an empty dimension {shape}; {_DAMAGED}", at=start)
            kind = self._ggml_type(name, self._u32(f"the type of {name!r}"))
            entries.append((name, shape, kind, self._u64(f"the offset of {name!r}")))
        return entries

    def _ggml_type(self, name: str, value: int) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(value)
        except ValueError:
            self._fail(
                f"has tensor {name!r} of unknown ggml type {value}; update swarmcpp, or get the model in another "
                "quantisation such as Q8_0 or Q4_K_M",
                at=self._at - 4,
            )

    def _place(
        self,
        entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
        data_offset: int,
        alignment: int,
    ) -> tuple[TensorInfo, ...]:
        """Sizes and absolute offsets. llama.cpp wants tensors back to back in order, so anything else is damage."""
        tensors = []
        expected = 0
        for name, shape, kind, offset in entries:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            info = TensorInfo(name, shape, kind, data_offset + offset, 0)
            if (shape[0] if shape else 1) % block:
                self._fail(f"has tensor {name!r} {shape} whose rows are no multiple of {block}; {_DAMAGED}")
            if offset != expected:
                self._fail(f"has tensor {name!r} at data offset {offset}, expected {expected}; {_DAMAGED}")
            n_bytes = info.n_elements // block * block_bytes
            end = data_offset + offset + n_bytes
            if end > self._size:
                self._fail(
                    f"is truncated: tensor {name!r} ends at byte {end}, the file has {self._size}; "
                    "the download is incomplete: download it again"
                )
            tensors.append(TensorInfo(name, shape, kind, data_offset + offset, n_bytes))
            expected = _align(offset + n_bytes, alignment)
        return tuple(tensors)

    def _string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        start = self._at
        length = self._u64(f"the length of {what}")
        if length > limit:
            self._fail(f"has {length} bytes in {what}, the limit is {limit}; {_DAMAGED}", at=start)
        at = self._take(length, what)
        try:
            return self._data[at : at + length].decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"has invalid UTF-8 in {what}; {_DAMAGED}", at=at)

    def _u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._data, self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._data, self._take(8, what))[0]
        return value

    def _take(self, n_bytes: int, what: str) -> int:
        """Start of the next `n_bytes`, which are then read."""
        start = self._at
        if n_bytes > self._size - start:
            self._ends(
                f"is truncated: it ends inside {what} (needs {n_bytes} bytes at byte {start}, the file has "
                f"{self._size}); the download is incomplete: download it again",
                start + n_bytes,
            )
        self._at = start + n_bytes
        return start

    def _bound(self, count: int, least_bytes: int, what: str, limit: int | None = None) -> None:
        left = self._size - self._at
        if limit is not None and count > limit:
            self._fail(f"claims {count} {what}, the limit is {limit}; {_DAMAGED}", at=self._at)
        if count * least_bytes > left:
            fault = f"claims {count} {what}, more than the {left} bytes left can hold; {_DAMAGED}"
            self._ends(fault, self._at + count * least_bytes)

    def _ends(self, fault: str, needed: int) -> NoReturn:
        """What is read now takes the first `needed` bytes, or more, and there are fewer."""
        self._fail(fault, at=self._at)

    def _fail(self, fault: str, *, at: int | None = None) -> NoReturn:
        where = "" if at is None else f" (at byte {at})"
        raise BadModel(f"{self._path}: {fault}{where}")


def _shown(key: str) -> str:
    """A key from the file, bounded and escaped for an error's one line."""
    return repr(key[:80])


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
