"""The other side of a model's transfer: gives the manifest and the chunks of local files to peers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.errors import BadModel, BadRequest, NotReady
from swarmcpp.models.manifest import FileChunk, Manifest
from swarmcpp.peerwire import ChunkReply, GetChunk, GetManifest, ManifestReply


@dataclass(frozen=True, slots=True)
class _Offer:
    files: tuple[Path, ...]
    changed_ns: tuple[int, ...]
    manifest: Manifest
    encoded: bytes


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
        self._offers[manifest.fingerprint] = _Offer(tuple(files), changed, manifest, manifest.to_bytes())

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
            chunk = offer.manifest.chunk(message.index)
        except IndexError:
            raise BadRequest(
                f"chunk {message.index} of a model with {offer.manifest.n_chunks}; ask for one of these", param="index"
            ) from None
        data = await asyncio.to_thread(_read, offer, chunk)
        if data is None:
            raise NotReady(f"{offer.files[chunk.file].name} changed since it was offered; ask another node")
        return ChunkReply(), [data]


def _read(offer: _Offer, chunk: FileChunk) -> bytes | None:
    """The chunk, or None when its file has gone or changed: a time of change costs less than hashing every chunk."""
    try:
        with offer.files[chunk.file].open("rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns != offer.changed_ns[chunk.file]:
                return None
            file.seek(chunk.offset)
            data = file.read(chunk.size)
    except OSError:
        return None
    return data if len(data) == chunk.size else None
