"""The real `core.Backend`: a llama.cpp model, its context and its samplers behind slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swarmcpp.core import GenerateRequest, Rows, SamplerLike
from swarmcpp.errors import SwarmError
from swarmcpp.llama.context import N_UBATCH, Context, Model
from swarmcpp.llama.sampler import Sampler


class LlamaBackend:
    """Joins a model and a context; closes neither."""

    def __init__(self, model: Model, context: Context) -> None:
        self._model = model
        self._context = context
        self._output_rows: dict[int, int] = {}
        self.n_slots = context.n_seqs
        self.n_ctx = context.n_ctx
        self.max_rows = N_UBATCH
        self.eog_tokens = model.vocab.eog_tokens

    def sampler(self, request: GenerateRequest) -> SamplerLike:
        """See `core.Backend`."""
        return Sampler(request.sampling, self._model.vocab, request.prompt, request.generated)

    def decode(self, rows: Sequence[Rows]) -> None:
        """See `core.Backend`."""
        batch = self._context.batch
        batch.clear()
        self._output_rows.clear()
        for part in rows:
            last = batch.add(part.slot, part.start, part.tokens, output_last=part.output)
            if part.output:
                self._output_rows[part.slot] = last
        self._context.decode()

    def sample(self, sampler: SamplerLike, slot: int) -> int:
        """See `core.Backend`."""
        if not isinstance(sampler, Sampler):
            raise SwarmError(f"a {type(sampler).__name__} is not a sampler of this backend")
        return sampler.sample(self._context, self._output_rows[slot])

    def logits(self, slot: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A copy of the logits after the last row of `slot`, shape (n_vocab,)."""
        return self._context.logits(self._output_rows[slot])

    def truncate(self, slot: int, n_past: int) -> None:
        """See `core.Backend`."""
        self._context.truncate(slot, n_past)

    def length(self, slot: int) -> int:
        """See `core.Backend`."""
        return self._context.length(slot)
