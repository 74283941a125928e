"""Damaged blocks against everything that stands between an arena and llama.cpp.

`python tests/kv/fuzz_blocks.py 1000000` prints how many of so many damaged blocks, entries, headers and states were
accepted; 0 is the only good answer.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from blake3 import blake3

from swarmcpp.core import BlockRef, KvLayout
from swarmcpp.errors import SnapshotError
from swarmcpp.kv.arena import DIGEST_BYTES, PAGE, Arena, ArenaFile, StoredBlock, read_header
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.snapshot import Bytes, block_part, compose, parse

LAYOUT = KvLayout(magic=0x6B76, n_stream=2, k_type=1, v_type=1, k_rows=(4, 8), v_rows=(8, 4))
BLOCK_TOKENS = 4
BLOCK_BYTES = LAYOUT.token_bytes * BLOCK_TOKENS
N_BLOCKS = 3
HEADER_BYTES = 56 + DIGEST_BYTES
ENTRY_BYTES = 120
TICK = range(96, 104)


class Sink:
    """Where llama.cpp would be: it counts the states that reach it."""

    n_seqs = 2
    n_outputs = 2
    n_ctx = 64

    def __init__(self) -> None:
        self.restored = 0

    def restore(self, seq: int, blob: Bytes) -> None:
        self.restored += 1

    def truncate(self, seq: int, n_past: int) -> None:
        """Nothing to forget."""


def halves(rng: random.Random) -> bytes:
    """A payload of finite halves."""
    raw = bytearray(rng.randbytes(BLOCK_BYTES))
    raw[1::2] = bytes(byte & 0xBF for byte in raw[1::2])
    return bytes(raw)


def changed(rng: random.Random, data: bytes, first: int = 0, stop: int | None = None) -> bytes:
    """`data` with one to four bytes in a range changed."""
    out = bytearray(data)
    for at in rng.sample(range(first, len(data) if stop is None else stop), rng.randint(1, 4)):
        out[at] ^= rng.randint(1, 255)
    return bytes(out)


class Fuzzer:
    """An arena of three sound blocks, a state composed of them, and a method for each way to damage them.

    A method damages something, hands it on, repairs it, and says whether it was accepted.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        arena = Arena.open(directory, bytes(range(32)), BLOCK_BYTES, None, PAGE * (2 + N_BLOCKS))
        assert arena is not None
        self.arena = arena
        assert arena.geometry.n_blocks == N_BLOCKS
        self.payloads = [halves(self.rng) for _ in range(N_BLOCKS)]
        self.refs = []
        for slot, payload in enumerate(self.payloads):
            digest = blake3(payload).digest()
            arena.write(slot, payload)
            arena.enter(StoredBlock(slot, self.rng.randbytes(32), bytes(32), digest, slot))
            self.refs.append(BlockRef(slot, digest))
        self.blocks = list(arena.entries())
        self.fd = os.open(arena.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self.head = self._read(HEADER_BYTES, 0)
        self.table = self._read(N_BLOCKS * ENTRY_BYTES, PAGE)
        self.file = ArenaFile(arena.path, arena.geometry)
        self.sink = Sink()
        model: Any = SimpleNamespace(vocab=SimpleNamespace(eog_tokens=frozenset(), n_vocab=0))
        context: Any = self.sink
        self.backend = LlamaBackend(model, context, BLOCK_TOKENS)
        self.backend._layout = LAYOUT
        self.backend.use_file(self.file)
        rows = np.frombuffer(b"".join(self.payloads), np.uint8).reshape(N_BLOCKS, BLOCK_BYTES)
        self.state = compose(LAYOUT, 0, [block_part(LAYOUT, rows, BLOCK_TOKENS)]).tobytes()
        self.state_header = self._header_offsets()
        self.ways: tuple[Callable[[], bool], ...] = (
            *(self.payload,) * 6,
            *(self.digest,) * 4,
            self.other_slot,
            self.not_finite,
            self.cut,
            *(self.entry,) * 3,
            self.header,
            *(self.state_field,) * 3,
            self.state_length,
        )

    def _read(self, size: int, offset: int) -> bytes:
        os.lseek(self.fd, offset, os.SEEK_SET)
        return os.read(self.fd, size)

    def _write(self, data: bytes, offset: int) -> None:
        os.lseek(self.fd, offset, os.SEEK_SET)
        os.write(self.fd, data)

    @staticmethod
    def _header_offsets() -> list[int]:
        """Offsets in the state of all that must be as it is: neither rows nor sequence ids."""
        n_tokens = N_BLOCKS * BLOCK_TOKENS
        offsets = [*range(4), *range(8, 16)]
        at = 16
        for _ in range(n_tokens):
            offsets += range(at, at + 8)
            at += 12
        offsets += range(at, at + 8)
        at += 8
        for row in (*LAYOUT.k_rows, *LAYOUT.v_rows):
            offsets += range(at, at + 12)
            at += 12 + n_tokens * row
        return [*offsets, *range(at, at + 4)]

    def sound(self) -> bool:
        """Whether everything is accepted that is not damaged: without this, refusing all would pass."""
        before = self.sink.restored
        loaded = self.backend.load_blocks(0, self.refs)
        parse(np.frombuffer(self.state, np.uint8), LAYOUT)
        header = read_header(self.arena.path)
        whole = loaded == N_BLOCKS and self.sink.restored == before + 1 and header is not None
        return whole and list(self.arena.entries()) == self.blocks

    def _loads(self, ref: BlockRef) -> bool:
        before = self.sink.restored
        loaded = self.backend.load_blocks(0, [ref])
        return loaded > 0 or self.sink.restored > before

    def payload(self) -> bool:
        """Bytes of a payload changed."""
        ref = self.rng.choice(self.refs)
        at, data = self.arena.geometry.offset(ref.slot), self.payloads[ref.slot]
        self._write(changed(self.rng, data), at)
        accepted = self._loads(BlockRef(ref.slot, ref.digest, self.rng.random() < 0.5))
        self._write(data, at)
        return accepted

    def digest(self) -> bool:
        """Bytes of a digest changed, or some missing."""
        ref = self.rng.choice(self.refs)
        short = ref.digest[: self.rng.randrange(DIGEST_BYTES)]
        wrong = changed(self.rng, ref.digest) if self.rng.random() < 0.9 else short
        return self._loads(BlockRef(ref.slot, wrong, self.rng.random() < 0.5))

    def other_slot(self) -> bool:
        """Another place: another block's, or none."""
        ref = self.rng.choice(self.refs)
        slot = ref.slot + self.rng.choice((-(2**40), -7, -2, -1, 1, 2, 7, 2**31, 2**63))
        return self._loads(BlockRef(slot, ref.digest, finite=True))

    def not_finite(self) -> bool:
        """An infinite value or a NaN under a right digest."""
        ref = self.rng.choice(self.refs)
        at, data = self.arena.geometry.offset(ref.slot), bytearray(self.payloads[ref.slot])
        high = self.rng.randrange(1, BLOCK_BYTES, 2)
        data[high] = self.rng.choice((0x7C, 0xFC, 0x7E, 0xFF))
        self._write(data, at)
        accepted = self._loads(BlockRef(ref.slot, blake3(data).digest()))
        self._write(self.payloads[ref.slot], at)
        return accepted

    def cut(self) -> bool:
        """The file ends in the middle of the last payload."""
        ref = self.refs[-1]
        at, size = self.arena.geometry.offset(ref.slot), self.arena.geometry.file_bytes
        os.truncate(self.fd, at + self.rng.randrange(BLOCK_BYTES))
        if self.rng.random() < 0.5:
            os.truncate(self.fd, size)
        accepted = self._loads(BlockRef(ref.slot, ref.digest, finite=True))
        os.truncate(self.fd, size)
        self._write(self.payloads[ref.slot], at)
        return accepted

    def entry(self) -> bool:
        """Bytes of an entry changed, but for its tick, which nothing covers; or an entry in another place."""
        slot = self.rng.randrange(N_BLOCKS)
        at = slot * ENTRY_BYTES
        entry = self.table[at : at + ENTRY_BYTES]
        if self.rng.random() < 0.1:
            other = (slot + self.rng.randint(1, N_BLOCKS - 1)) % N_BLOCKS
            wrong = self.table[other * ENTRY_BYTES : (other + 1) * ENTRY_BYTES]
        elif self.rng.random() < 0.8:
            wrong = changed(self.rng, entry, stop=TICK.start)
        else:
            wrong = changed(self.rng, entry, first=TICK.stop)
        self._write(wrong, PAGE + at)
        accepted = any(block.slot == slot for block in self.arena.entries())
        self._write(entry, PAGE + at)
        return accepted

    def header(self) -> bool:
        """Bytes of the header changed: its version, geometry, identity or digest."""
        self._write(changed(self.rng, self.head), 0)
        accepted = read_header(self.arena.path) is not None
        self._write(self.head, 0)
        return accepted

    def _parses(self, state: bytes) -> bool:
        try:
            parse(np.frombuffer(state, np.uint8), LAYOUT)
        except SnapshotError:
            return False
        return True

    def state_field(self) -> bool:
        """A byte of a state changed that is neither a value nor a sequence id."""
        state = bytearray(self.state)
        state[self.rng.choice(self.state_header)] ^= self.rng.randint(1, 255)
        return self._parses(bytes(state))

    def state_length(self) -> bool:
        """A state that ends too early or too late."""
        if self.rng.random() < 0.5:
            return self._parses(self.state[: self.rng.randrange(len(self.state))])
        return self._parses(self.state + self.rng.randbytes(self.rng.randint(1, 40)))

    def close(self) -> None:
        """Release the file."""
        os.close(self.fd)
        self.file.close()
        self.arena.close()


def fuzz(n: int, seed: int) -> int:
    """Damage something `n` times; how often the damaged thing was accepted."""
    accepted = 0
    with tempfile.TemporaryDirectory() as directory, closing(Fuzzer(Path(directory), seed)) as fuzzer:
        assert fuzzer.sound(), "what is not damaged is refused"
        for _ in range(n):
            accepted += fuzzer.rng.choice(fuzzer.ways)()
        assert fuzzer.sound(), "what is not damaged any more is refused"
    return accepted


def main() -> int:
    """Fuzz as often as the first argument says, with the second as seed; exit code 1 when anything was accepted."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    begun = time.perf_counter()
    accepted = fuzz(count, seed)
    seconds = time.perf_counter() - begun
    sys.stdout.write(f"{count} damaged, {accepted} accepted, {seconds:.1f} s (seed {seed})\n")
    return 1 if accepted else 0


if __name__ == "__main__":
    sys.exit(main())
