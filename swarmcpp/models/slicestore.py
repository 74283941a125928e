"""The slices that a node has made, and the parts of models that it made them from. Blocking.

data_dir/slices/NAME-FIRST-LAST-FINGERPRINT8.gguf
data_dir/parts/FINGERPRINT16/                        see modelfiles.SparseModel
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.errors import BadModel, StartupError
from swarmcpp.models.gguf_header import (
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
    MAX_TENSORS,
    MIN_TENSOR_BYTES,
    read_header,
)
from swarmcpp.models.inspect import inspect
from swarmcpp.models.manifest import Manifest, manifest_of
from swarmcpp.models.modelfiles import SparseModel, model_name
from swarmcpp.models.partial import locked
from swarmcpp.models.slicing import slice_of, write_slice
from swarmcpp.models.vocabfile import header_bytes_needed

_N_TENSORS = struct.Struct("<8xQ")
_ENTRY_BYTES = MIN_TENSOR_BYTES + MAX_TENSOR_NAME_BYTES + 8 * MAX_DIMENSIONS
"""Of one tensor in a header, at most."""


@dataclass(frozen=True, slots=True)
class SliceFiles:
    """A slice, and the model's first file with at least its headers: the vocabulary, and with `embedding` the token
    embedding too. `parts` is what was fetched of the model; None where `source` is whole."""

    slice: Path
    source: Path
    embedding: bool
    parts: SparseModel | None


class SliceStore:
    """The slices and parts below `data_dir`. Nothing is remembered in memory."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._slices = data_dir / "slices"

    def path_of(self, manifest: Manifest, first: int, last: int) -> Path:
        """Where the slice of layers [first, last) is, or would be."""
        name = f"{model_name(manifest)}-{first}-{last}-{manifest.fingerprint.hex()[:8]}.gguf"
        return self._slices / name

    def parts(self, manifest: Manifest) -> SparseModel:
        """Where the chunks of a model are, or would be."""
        return SparseModel(manifest, self._parts_of(manifest.fingerprint))

    def is_sound(self, manifest: Manifest, first: int, last: int) -> bool:
        """The slice is there, and is what it is called."""
        try:
            found = slice_of(read_header(self.path_of(manifest, first, last)))
        except BadModel:
            return False
        return found is not None and (found.first, found.last, found.fingerprint) == (first, last, manifest.fingerprint)

    def from_file(self, path: Path, first: int, last: int) -> SliceFiles:
        """The slice of the whole model at `path`, written if it is not there yet.

        Hashes the model if that was never done. Raises what `write_slice` does, and DownloadFailed while another
        process writes the same slice.
        """
        manifest = manifest_of(inspect(path).files, self._data_dir)
        target = self.path_of(manifest, first, last)
        try:
            with locked(target):
                if not self.is_sound(manifest, first, last):
                    write_slice(path, first, last, target, fingerprint=manifest.fingerprint)
        except OSError as error:
            raise StartupError(f"{target}: cannot be written ({error.strerror}); check the directory") from None
        return SliceFiles(target, path, embedding=True, parts=None)

    def _parts_of(self, fingerprint: bytes) -> Path:
        return self._data_dir / "parts" / fingerprint.hex()[:16]


def header_bytes(path: Path, ready: int) -> int:
    """How many of its first bytes the header of the GGUF at `path` takes, of which the first `ready` are there.

    At most `ready` when it is whole; otherwise more than `ready`, and the header may take more still. Raises BadModel
    when it is damaged.
    """
    try:
        header = read_header(path)
        # What was read beyond `ready` was not the header, however sound it looked.
        if header.data_offset <= ready:
            return header.data_offset
    except BadModel:
        with path.open("rb") as file:
            prefix = file.read(ready)
        needed = header_bytes_needed(prefix)
        if needed is not None:
            if needed > path.stat().st_size:
                raise
            return needed
        (n_tensors,) = _N_TENSORS.unpack_from(prefix)
        table = n_tensors * _ENTRY_BYTES
        # With so much after the metadata that every table would end in it, the fault is not that its end is missing.
        if n_tensors > MAX_TENSORS or header_bytes_needed(prefix[: max(ready - table, 0)]) is None:
            raise
    if ready >= path.stat().st_size:
        raise BadModel(f"{path}: ends in its header; get the model from elsewhere")
    return ready + 1
