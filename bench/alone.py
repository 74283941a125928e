"""A model that answers nobody: what it says of a text that is computed token by token, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swarmcpp.llama.context import Context, ContextOptions, Model


class Alone:
    """A model in this process, with one sequence of up to `n_ctx` tokens and the plain kernels."""

    def __init__(self, path: Path, n_ctx: int) -> None:
        self._model = Model(path, use_extra_bufts=False)
        self._context = Context(self._model, ContextOptions(n_ctx=n_ctx, n_seqs=1, n_threads=2))
        self._held: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return self._model.vocab.tokenize(text, add_special=True, parse_special=False)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What may follow `tokens`: [n_vocab]. Of a text that only grew, only what is new is computed."""
        pairs = enumerate(zip(self._held, tokens, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(self._held), len(tokens)))
        same = min(same, len(tokens) - 1)
        self._context.truncate(0, same)
        for at in range(same, len(tokens)):
            self._context.batch.clear()
            row = self._context.batch.add(0, at, [tokens[at]], outputs=1)
            self._context.decode()
        self._held = list(tokens)
        return self._context.logits(row)

    def best(self, tokens: Sequence[int]) -> int:
        """The likeliest token after `tokens`."""
        return int(self.logits(tokens).argmax())
