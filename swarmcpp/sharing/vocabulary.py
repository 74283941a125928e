"""The vocabulary of a model that only peers have: the beginning of its first file, checked chunk by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from swarmcpp.errors import PeerError, SwarmError
from swarmcpp.models.manifest import Manifest
from swarmcpp.models.vocabfile import header_bytes_needed, write_vocab_file
from swarmcpp.sharing.modelfetch import get_manifest
from swarmcpp.wire.peers import Caller, ChunkReply, GetChunk

ASK_S = 10.0
MAX_HEADER_BYTES = 256 << 20
"""Metadata of the largest vocabularies takes a tenth of this."""


async def fetch_vocabulary(holders: Sequence[Caller], fingerprint: bytes, target: Path) -> None:
    """Write a GGUF without tensors to `target`, from what `holders` of the model send.

    Raises DownloadFailed when nobody has a sound manifest, PeerError when nobody sends a sound beginning, BadModel when
    that has no vocabulary, OSError when it cannot be written.
    """
    manifest = await get_manifest(holders, fingerprint, ASK_S)
    data = bytearray()
    for index in range(len(manifest.files[0].digests)):
        data += await _chunk(holders, manifest, index)
        if header_bytes_needed(bytes(data)) is None or len(data) > MAX_HEADER_BYTES:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(write_vocab_file, bytes(data), target)


async def _chunk(holders: Sequence[Caller], manifest: Manifest, index: int) -> memoryview:
    """A chunk from the first holder that sends it."""
    digest = manifest.chunk(index).digest
    for caller in holders:
        try:
            reply, payload = await caller.ask(GetChunk(manifest.fingerprint, index), timeout_s=ASK_S)
        except SwarmError:
            continue
        if isinstance(reply, ChunkReply) and len(payload) == 1 and blake3(payload[0]).digest() == digest:
            return payload[0]
    raise PeerError(f"no peer sends the beginning of model {manifest.fingerprint.hex()[:8]}; try again later")
