"""The real `engine.backend.WholeBackend`: a llama.cpp model, its context, its samplers and its KV behind slots."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from swarmcpp._native import all_finite_f16
from swarmcpp.core import MAX_ROWS, BlockFile, BlockRef, GenerateRequest, KvLayout, Rows, SamplerLike, Token
from swarmcpp.errors import SnapshotError, SwarmError
from swarmcpp.llama.context import Context, Model
from swarmcpp.llama.kvmemory import KvMemory
from swarmcpp.llama.sampler import Sampler
from swarmcpp.llama.snapshot import Part, block_of, block_part, compose, learn_layout, parse

logger = logging.getLogger(__name__)

GGML_TYPE_F16 = 1


class LlamaBackend:
    """Joins a model and a context; closes neither. `block_tokens` 0 leaves its KV where it is."""

    def __init__(self, model: Model, context: Context, block_tokens: int = 0) -> None:
        self._model = model
        self._context = context
        self._block_tokens = block_tokens
        self._outputs: dict[int, range] = {}
        """Batch rows whose logits were asked for in the last call, by slot."""
        self._layout: KvLayout | None = None
        self._file: BlockFile | None = None
        self.n_vocab = model.vocab.n_vocab
        self.n_slots = context.n_seqs
        self.n_ctx = context.n_ctx
        self.max_rows = MAX_ROWS
        self.max_outputs = context.n_outputs
        self.eog_tokens = model.vocab.eog_tokens

    def sampler(self, request: GenerateRequest) -> SamplerLike:
        """See `engine.backend.Backend`."""
        return Sampler(request.sampling, self._model.vocab, request.prompt, request.generated)

    def decode(self, rows: Sequence[Rows]) -> None:
        """See `engine.backend.WholeBackend`."""
        batch = self._context.batch
        batch.clear()
        self._outputs.clear()
        for part in rows:
            end = 1 + batch.add(part.slot, part.start, part.tokens, outputs=part.outputs)
            if part.outputs:
                self._outputs[part.slot] = range(end - part.outputs, end)
        self._context.decode()

    def sample(self, sampler: SamplerLike, slot: int, output: int = 0) -> Token:
        """See `engine.backend.Backend`."""
        if not isinstance(sampler, Sampler):
            raise SwarmError(f"a {type(sampler).__name__} is not a sampler of this backend")
        return Token(sampler.sample(self._context, self._outputs[slot][output]))

    def logits(self, slot: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A copy of the logits after the last row of `slot`, shape (n_vocab,)."""
        return self._context.logits(self._outputs[slot][-1])

    def truncate(self, slot: int, n_past: int) -> None:
        """See `engine.backend.Backend`."""
        self._context.truncate(slot, n_past)

    def length(self, slot: int) -> int:
        """See `engine.backend.Backend`."""
        return self._context.length(slot)

    # -- KV ------------------------------------------------------------------------------------------------------

    def learn(self) -> KvLayout:
        """The layout of this context's KV, from a state of one token; slot 0 must be empty and is so afterwards.

        Raises SnapshotError when the KV cannot be cut into blocks.
        """
        self.decode([Rows(0, 0, [0], outputs=0)])
        try:
            state = self._context.export(0)
            layout = learn_layout(state)
            if (layout.k_type, layout.v_type) != (GGML_TYPE_F16, GGML_TYPE_F16):
                raise SnapshotError(f"KV of ggml types {layout.k_type} and {layout.v_type}, not F16")
            try:
                self._context.kv = KvMemory(self._context.tap, layout, state)
            except SnapshotError as error:
                logger.warning("KV is exported whole to store parts of it: %s", error)
        finally:
            self.truncate(0, 0)
        self._layout = layout
        return layout

    def use_file(self, file: BlockFile) -> None:
        """Blocks are in `file` from now on."""
        self._file = file

    def _known_layout(self) -> KvLayout:
        return self._layout or self.learn()

    def _part(self, slot: int, n_tokens: int) -> Part:
        """The first `n_tokens` of a slot, maybe as views of its memory. Raises SnapshotError when it has fewer."""
        layout, held = self._known_layout(), self.length(slot)
        if n_tokens > held:
            raise SnapshotError(f"{n_tokens} tokens of slot {slot}, which has {held}")
        kv = self._context.kv
        return (kv and kv.part(slot, n_tokens)) or parse(self._context.export(slot), layout).part(n_tokens)

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        """See `engine.backend.Backend`."""
        part = self._part(source, n_tokens)
        self._context.restore(target, compose(self._known_layout(), target, [part]))

    def exchange(self, first: int, second: int) -> None:
        """See `engine.backend.StageBackend`."""
        layout, lengths = self._known_layout(), [self.length(slot) for slot in (first, second)]
        # States are copies, so that neither restore overwrites what the other one reads.
        states = [
            compose(layout, target, [self._part(source, length)]) if length else None
            for source, target, length in zip((first, second), (second, first), lengths, strict=True)
        ]
        for target, state in zip((second, first), states, strict=True):
            if state is None:
                self.truncate(target, 0)
            else:
                self._context.restore(target, state)

    def load_blocks(self, slot: int, blocks: Sequence[BlockRef]) -> int:
        """See `engine.backend.Backend`."""
        layout = self._known_layout()
        payloads = np.empty((len(blocks), layout.token_bytes * self._block_tokens), np.uint8)
        sound = 0
        for block, payload in zip(blocks, payloads, strict=True):
            view = payload.data
            if self._file is None or not self._file.read_into(block.slot, view):
                break
            # Every time: the file may have been damaged since the last use, and 2 GB/s is a fraction of a decode step.
            if blake3(view).digest() != block.digest or not (block.finite or all_finite_f16(payload)):
                break
            sound += 1
        if not sound:
            self.truncate(slot, 0)
            return 0
        part = block_part(layout, payloads[:sound], self._block_tokens)
        self._context.restore(slot, compose(layout, slot, [part]))
        return sound

    def store_blocks(self, slot: int, grants: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
        """See `engine.backend.Backend`."""
        if self._file is None or not grants:
            return []
        part = self._part(slot, (1 + max(number for number, _ in grants)) * self._block_tokens)
        written: list[tuple[int, bytes]] = []
        for number, arena_slot in grants:
            payload = block_of(part, number, self._block_tokens)
            if all_finite_f16(payload) and self._file.write(arena_slot, payload.data):
                written.append((arena_slot, blake3(payload.data).digest()))
        return written
