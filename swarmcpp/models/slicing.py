"""Writes slices: the GGUF of a layer range [first, last) of a model, which stock llama.cpp loads as a model of its own.

A slice that has not all layers takes rows of embeddings, never tokens, so it holds one vocabulary-sized tensor at most:

- the tail (last = n_layers) has the vocabulary, the final norm, and the output head under the name of the token
  embedding, which llama.cpp uses as the head where a file has no other one;
- the others have `tokenizer.ggml.model = "no_vocab"` with one token and one row of the token embedding, so that the
  head that llama.cpp insists on is nothing.

A slice [0, n_layers) is the whole model, marked. A model without some of its middle layers, which drafts for the whole
one, is written in the same way: it has all of the vocabulary and no marks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from swarmcpp.errors import BadConfig, BadModel, StartupError
from swarmcpp.files import read_into
from swarmcpp.models.gguf_header import ARRAY, MAGIC, STRING, GgufHeader, Scalar, TensorInfo, read_header
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.modelfiles import ByteRange

ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3", "qwen3moe")
"""Those whose stages are tested to compute what the whole model does, bit for bit. What makes others wrong: layers that
depend on their number, inputs that are scaled, attention scales that llama.cpp guesses from the number of layers."""

COPY_BYTES = 1 << 20
DIGEST_BYTES = 32
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_FIRST, _LAST, _OF = "swarmcpp.slice.first", "swarmcpp.slice.last", "swarmcpp.slice.of"
_FINGERPRINT = "swarmcpp.slice.fingerprint"
_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
)
"""Keys of an architecture that may have one number for each layer, as llama.cpp reads them (get_key_or_arr)."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_UINT32 = 4


@dataclass(frozen=True, slots=True)
class Slice:
    """What a slice's file says of itself: layers [first, last) of the `n_layers` of the model with `fingerprint`."""

    first: int
    last: int
    n_layers: int
    fingerprint: bytes

    @property
    def is_tail(self) -> bool:
        """It computes logits; otherwise hidden rows for the next stage."""
        return self.last == self.n_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it has."""
        return tuple(range(self.first, self.last))


@dataclass(frozen=True, slots=True)
class _Thinned:
    """All of a model but some layers."""

    layers: tuple[int, ...]
    n_layers: int

    is_tail = True


def slice_of(header: GgufHeader) -> Slice | None:
    """What the file is a slice of, or None for a whole model. Raises BadModel when its marks are damaged."""
    marks = [header.metadata.get(key) for key in (_FIRST, _LAST, _OF, _FINGERPRINT)]
    if marks == [None] * 4:
        return None
    first, last, n_layers, fingerprint = marks
    layers = header.metadata.get(f"{header.metadata.get('general.architecture')}.block_count")
    if (
        isinstance(first, int)
        and isinstance(last, int)
        and isinstance(n_layers, int)
        and isinstance(fingerprint, str)
        and 0 <= first < last <= n_layers
        and layers == last - first
        and re.fullmatch("[0-9a-f]{64}", fingerprint)
    ):
        return Slice(first, last, n_layers, bytes.fromhex(fingerprint))
    raise BadModel(f"{header.path}: says in swarmcpp.slice.* what no slice can be; make it again with `swarmcpp slice`")


def check_sliceable(model: ModelFile, first: int, last: int) -> None:
    """Raises BadConfig for a range that is none, BadModel for a model of which no slices can be made."""
    if not 0 <= first < last <= model.n_layers:
        raise BadConfig(
            f"layers {first} to {last} of {model.path}: a slice [A, B) needs 0 <= A < B <= {model.n_layers}, "
            "the number of its layers"
        )
    if model.architecture not in ARCHITECTURES:
        raise BadModel(
            f"{model.path}: slices of architecture {model.architecture!r} are not known to compute the same; "
            f"tested are {', '.join(ARCHITECTURES)}: serve it whole"
        )


def write_slice(source: Path, first: int, last: int, target: Path, *, fingerprint: bytes) -> Path:
    """Write layers [first, last) of the model at `source` (the first file of a split one) to `target`.

    `fingerprint` is the whole model's (see models/manifest.py), 32 bytes. Memory stays within the metadata and
    COPY_BYTES; `target` appears when it is whole, and its path is returned. Raises BadConfig for a range that is none,
    BadModel for a model that is damaged, a slice already, or not of ARCHITECTURES, StartupError when `target` cannot
    be written.
    """
    if len(fingerprint) != DIGEST_BYTES:
        raise ValueError(f"a fingerprint of {len(fingerprint)} bytes, not {DIGEST_BYTES}")
    model, headers = _sliceable(source, first, last)
    return _write_layers(model, headers, Slice(first, last, model.n_layers, fingerprint), target)


def write_thinned(source: Path, skipped: range, target: Path) -> Path:
    """Write the model at `source` without the layers `skipped`, which are neither its first nor its last, to `target`.

    As `write_slice`, also in what it raises.
    """
    model, headers = _sliceable(source, 0, 1)
    layers = tuple(layer for layer in range(model.n_layers) if layer not in skipped)
    if not 0 < skipped.start < skipped.stop < model.n_layers or skipped.step != 1:
        raise BadConfig(
            f"layers {skipped.start} to {skipped.stop} of {source}: what is skipped lies between the first and the "
            f"last of its {model.n_layers} layers"
        )
    return _write_layers(model, headers, _Thinned(layers, model.n_layers), target)


def _write_layers(model: ModelFile, headers: Sequence[GgufHeader], wanted: Slice | _Thinned, target: Path) -> Path:
    parts = tuple(_parts(headers, wanted))
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and any(target.samefile(path) for path in model.files):
            raise BadConfig(f"{target}: is the model itself; give the slice another name")
        _write(scratch, headers, _metadata(headers[0], model.architecture, wanted), parts)
        scratch.replace(target)
    except OSError as error:
        size = sum(tensor.n_bytes for _, tensor in parts)
        raise StartupError(
            f"{target}: cannot write the slice ({error.strerror}); it takes {size} bytes: free some, or choose "
            "another place"
        ) from error
    finally:
        # Where it could not be made it cannot be removed either.
        with suppress(OSError):
            scratch.unlink()
    return target


def slice_ranges(source: Path, first: int, last: int) -> tuple[ByteRange, ...]:
    """What `write_slice` reads of a model's files. Their headers are enough for this. Raises BadConfig, BadModel."""
    model, headers = _sliceable(source, first, last)
    parts = _parts(headers, Slice(first, last, model.n_layers, b""))
    tensors = (ByteRange(file, tensor.offset, tensor.offset + tensor.n_bytes) for file, tensor in parts)
    return (*(ByteRange(file, 0, header.data_offset) for file, header in enumerate(headers)), *tensors)


def embedding_range(source: Path) -> ByteRange:
    """Where a model's token embedding is. Its headers are enough for this. Raises BadModel."""
    headers = [read_header(path) for path in inspect(source).files]
    found = ((file, t) for file, header in enumerate(headers) for t in header.tensors if t.name == _EMBEDDING)
    file, tensor = next(found)
    return ByteRange(file, tensor.offset, tensor.offset + tensor.n_bytes)


def _sliceable(source: Path, first: int, last: int) -> tuple[ModelFile, list[GgufHeader]]:
    """The model at `source` with the headers of all its files, if layers [first, last) of it can be a slice."""
    model = inspect(source)
    headers = [read_header(path) for path in model.files]
    found = slice_of(headers[0])
    if found is not None:
        raise BadModel(
            f"{source}: is a slice itself (layers {found.first} to {found.last} of {found.n_layers}); "
            "give the file of the whole model"
        )
    check_sliceable(model, first, last)
    if headers[0].metadata.get(f"{model.architecture}.nextn_predict_layers"):
        raise BadModel(f"{source}: has layers that predict further tokens, which no slice can hold; serve it whole")
    return model, headers


def _parts(headers: Sequence[GgufHeader], wanted: Slice | _Thinned) -> Iterator[tuple[int, TensorInfo]]:
    """The tensors of the slice as it has them, each with the number of its file, in the order of the source."""
    names = {tensor.name for header in headers for tensor in header.tensors}
    head = _HEAD if _HEAD in names else _EMBEDDING
    missing = set(wanted.layers)
    if any(len(t.shape) != 2 for header in headers for t in header.tensors if t.name in (_EMBEDDING, _HEAD)):
        raise BadModel(f"{headers[0].path}: has a token embedding that is no matrix; download it again")
    for file, header in enumerate(headers):
        for tensor in header.tensors:
            if block := _BLOCK.fullmatch(tensor.name):
                missing.discard(int(block[1]))
            if kept := _kept(tensor, wanted, head):
                yield file, kept
    if missing:
        raise BadModel(f"{headers[0].path}: has no tensors of layer {min(missing)}; download it again")


def _kept(tensor: TensorInfo, wanted: Slice | _Thinned, head: str) -> TensorInfo | None:
    """A tensor of the model as the slice has it; None when it has not. `head`: the name of the output head."""
    if block := _BLOCK.fullmatch(tensor.name):
        number = int(block[1])
        if number not in wanted.layers:
            return None
        return replace(tensor, name=f"blk.{wanted.layers.index(number)}.{block[2]}")
    if isinstance(wanted, _Thinned) or len(wanted.layers) == wanted.n_layers:
        return tensor
    if wanted.is_tail:
        if tensor.name == head:
            return replace(tensor, name=_EMBEDDING)
        return tensor if tensor.name != _EMBEDDING else None
    if tensor.name == _EMBEDDING:
        return replace(tensor, shape=(tensor.shape[0], 1), n_bytes=tensor.n_bytes // tensor.shape[-1])
    return tensor if not tensor.name.startswith("output.") else None


def _metadata(header: GgufHeader, architecture: str, wanted: Slice | _Thinned) -> list[bytes]:
    """The slice's key-value pairs, encoded: the source's bytes, but for what tells layers and vocabulary."""
    has_vocab = wanted.is_tail
    changed: dict[str, bytes] = {f"{architecture}.block_count": _u32(len(wanted.layers))}
    for key in (f"{architecture}.{name}" for name in _PER_LAYER):
        value = header.metadata.get(key)
        if isinstance(value, tuple):
            changed[key] = _numbers(header.path, key, value, wanted)
    if not has_vocab:
        changed["tokenizer.ggml.model"] = _string_value("no_vocab")
        changed[f"{architecture}.vocab_size"] = _u32(1)
    # With a split.count llama.cpp would look for the other files.
    dropped = ("split.",) if has_vocab else ("split.", "tokenizer.")
    with header.path.open("rb") as file:
        data = file.read(header.data_offset)
    pairs = [data[at] for key, at in header.pairs.items() if not (key in changed or key.startswith(dropped))]
    if isinstance(wanted, Slice):
        changed |= {_FIRST: _u32(wanted.first), _LAST: _u32(wanted.last), _OF: _u32(wanted.n_layers)}
        changed[_FINGERPRINT] = _string_value(wanted.fingerprint.hex())
    return pairs + [_string(key) + value for key, value in changed.items()]


def _u32(value: int) -> bytes:
    return struct.pack("<II", _UINT32, value)


def _numbers(path: Path, key: str, values: tuple[Scalar, ...], wanted: Slice | _Thinned) -> bytes:
    """The numbers of the slice's layers as an array of uint32."""
    if len(values) != wanted.n_layers or not all(isinstance(v, int) and 0 <= v < 1 << 32 for v in values):
        raise BadModel(f"{path}: has no whole number for each of {wanted.n_layers} layers in {key}; download it again")
    kept = [values[layer] for layer in wanted.layers]
    return struct.pack(f"<IIQ{len(kept)}I", ARRAY, _UINT32, len(kept), *kept)


def _string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _string_value(text: str) -> bytes:
    return _U32.pack(STRING) + _string(text)


def _write(
    path: Path, headers: Sequence[GgufHeader], pairs: Sequence[bytes], parts: Sequence[tuple[int, TensorInfo]]
) -> None:
    """Raises OSError for `path`, BadModel when a source has changed since its header was read."""
    alignment = headers[0].alignment
    with path.open("wb") as out:
        out.write(struct.pack("<4sIQQ", MAGIC, headers[0].version, len(parts), len(pairs)))
        out.writelines(pairs)
        offset = 0
        for _, tensor in parts:
            entry = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            out.write(_string(tensor.name) + entry + struct.pack("<IQ", tensor.ggml_type, offset))
            offset += -(-tensor.n_bytes // alignment) * alignment
        with ExitStack() as stack:
            sources = [stack.enter_context(header.path.open("rb")) for header in headers]
            buffer = memoryview(bytearray(COPY_BYTES))
            for file, tensor in parts:
                out.write(bytes(-out.tell() % alignment))
                fd = sources[file].fileno()
                for done in range(0, tensor.n_bytes, COPY_BYTES):
                    chunk = buffer[: min(COPY_BYTES, tensor.n_bytes - done)]
                    if read_into(fd, chunk, tensor.offset + done) != len(chunk):
                        raise BadModel(f"{headers[file].path}: became shorter while it was read; try again")
                    out.write(chunk)
            out.write(bytes(-out.tell() % alignment))
        out.flush()
        # A name must not outlive a crash that its bytes did not.
        os.fsync(out.fileno())
