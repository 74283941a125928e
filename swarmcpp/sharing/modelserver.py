"""The other side of a model's transfer: gives the manifest and the chunks of local files to peers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from swarmcpp.errors import BadModel, BadRequest, NotReady
from swarmcpp.files import read_at
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.modelfiles import SparseModel
from swarmcpp.wire.peers import ChunkReply, GetChunk, GetManifest, ManifestReply


@dataclass(frozen=True, slots=True)
class _Offer:
    manifest: Manifest
    encoded: bytes
    read: Callable[[int], bytes]
    """A chunk. Blocking; raises NotReady, BadRequest, and IndexError outside the model's chunks."""


class ModelServer:
    """The models that this node gives to peers. Used on the event loop's thread; files are read in others."""

    def __init__(self) -> None:
        self._offers: dict[bytes, _Offer] = {}

    def offer(self, manifest: Manifest, files: Sequence[Path]) -> None:
        """Give `files`, whose manifest this is, from now on. Raises BadModel when they cannot be read."""
        try:
            changed = tuple(path.stat().st_mtime_ns for path in files)
        except OSError as error:
            raise BadModel(f"{error.filename}: cannot read it: {error.strerror}") from error
        self._add(manifest, partial(_read_whole, manifest, tuple(files), changed))

    def offer_parts(self, parts: SparseModel) -> None:
        """Give the chunks that `parts` has, now or later. A model that is offered whole stays so."""
        if parts.manifest.fingerprint not in self._offers:
            self._add(parts.manifest, partial(_read_part, parts))

    def _add(self, manifest: Manifest, read: Callable[[int], bytes]) -> None:
        self._offers[manifest.fingerprint] = _Offer(manifest, manifest.to_bytes(), read)

    async def answer(self, message: GetManifest | GetChunk) -> tuple[ManifestReply | ChunkReply, list[bytes]]:
        """The reply with its payload.

        Raises BadRequest for a model or chunk that is not here, NotReady when the file is not what it was.
        """
        offer = self._offers.get(message.fingerprint)
        if offer is None:
            shown = message.fingerprint.hex()[:8]
            raise BadRequest(f"model {shown} is not held here; ask a node that offers it", param="fingerprint")
        if isinstance(message, GetManifest):
            return ManifestReply(), [offer.encoded]
        try:
            return ChunkReply(), [await asyncio.to_thread(offer.read, message.index)]
        except IndexError:
            raise BadRequest(
                f"chunk {message.index} of a model with {offer.manifest.n_chunks}; ask for one of these", param="index"
            ) from None


def _read_whole(manifest: Manifest, files: Sequence[Path], changed_ns: Sequence[int], index: int) -> bytes:
    """A time of change costs less than hashing every chunk."""
    chunk = manifest.chunk(index)
    path = files[chunk.file]
    data = b""
    with suppress(OSError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_mtime_ns == changed_ns[chunk.file]:
            data = read_at(file.fileno(), chunk.size, chunk.offset)
    if len(data) != chunk.size:
        raise NotReady(f"{path.name} changed since it was offered; ask another node")
    return data


def _read_part(parts: SparseModel, index: int) -> bytes:
    data = parts.read(index)
    if data is None:
        shown = parts.manifest.fingerprint.hex()[:8]
        raise BadRequest(f"chunk {index} of model {shown} is not held here; ask another node", param="index")
    return data
