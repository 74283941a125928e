"""Names of blocks: a block's key says exactly what its KV depends on, and nothing about who computed it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """Everything but the tokens that KV depends on. Not the layer range: layers are a byte range of a block."""

    fingerprint: bytes
    """BLAKE3 of the model file."""
    block_tokens: int
    kv_types: tuple[int, int]
    """ggml types of K and V."""
    flash_attention: bool = True
    rope: str = ""
    """Rope settings that differ from the model's own; empty: none do."""
    lora: tuple[str, ...] = ()

    def root(self, cache_salt: str = "") -> bytes:
        """The key before the first block. Requests with different salts share nothing."""
        parts = (
            "swarmcpp block root 1",
            self.fingerprint.hex(),
            self.block_tokens,
            *self.kv_types,
            self.flash_attention,
            self.rope,
            *self.lora,
            "salt",
            cache_salt,
        )
        # Lengths in front: no two different lists of parts give the same bytes.
        encoded = [str(part).encode() for part in parts]
        return blake3(b"".join(len(part).to_bytes(8, "little") + part for part in encoded)).digest()

    def arena_root(self, first: int, last: int) -> bytes:
        """Whose arena it is that holds KV of layers [first, last) only, under keys of the whole model: 32 bytes."""
        return blake3(b"swarmcpp stage arena 1" + self.root() + struct.pack("<II", first, last)).digest()


def block_keys(root: bytes, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of the full blocks of `tokens`: key(i) = BLAKE3(key(i-1) + the block's token ids as little-endian int32)."""
    count = len(tokens) // block_tokens
    data = np.asarray(tokens[: count * block_tokens], dtype="<i4").tobytes()
    step = 4 * block_tokens
    keys: list[bytes] = []
    key = root
    for start in range(0, count * step, step):
        key = blake3(key + data[start : start + step]).digest()
        keys.append(key)
    return keys
