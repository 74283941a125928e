"""A model's vocabulary: text to tokens, tokens to bytes."""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import llama_cpp.llama_cpp as c

from swarmcpp.errors import BadModel
from swarmcpp.llama import lib


class Vocab:
    """The vocabulary of a model. Read-only and thread-safe; valid as long as the model it came from."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = c.llama_model_get_vocab(model)
        self.n_vocab: int = c.llama_vocab_n_tokens(self._vocab)
        self._pieces: dict[int, bytes] = {}

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of `text`. Raises UnicodeEncodeError on lone surrogates."""
        data = text.encode()
        # A token is at least one byte, plus BOS and EOS; SPM may add a leading space.
        capacity = len(data) + 3
        while True:
            buffer = (c.llama_token * capacity)()
            count = c.llama_tokenize(self._vocab, data, len(data), buffer, capacity, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            capacity = -count

    def piece(self, token: int) -> bytes:
        """Bytes that `token` adds to visible text; empty for control tokens and unknown ids."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._to_bytes(token, special=False)
        return known

    def special_text(self, token: int) -> str:
        """The text of a token including control tokens ("<|im_end|>"); empty for a missing token (-1)."""
        return self._to_bytes(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _to_bytes(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:
            return b""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = c.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return bytes(buffer.raw[:count])
            size = -count

    @cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Every token that ends a generation. Computed once: a scan of the vocabulary takes tens of milliseconds."""
        return frozenset(token for token in range(self.n_vocab) if c.llama_vocab_is_eog(self._vocab, token))

    @property
    def bos(self) -> int:
        """The begin-of-sequence token, -1 when there is none."""
        return int(c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """The end-of-sequence token, -1 when there is none."""
        return int(c.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with BOS."""
        return bool(c.llama_vocab_get_add_bos(self._vocab))


PADDING: Final = 128
"""Ids by which vocabularies of one family may differ: converters fill them up to round numbers."""


def difference(one: Vocab, other: Vocab) -> str:
    """What two vocabularies differ in, in words; empty when every token means the same in both."""
    if abs(one.n_vocab - other.n_vocab) > PADDING:
        return f"it has {other.n_vocab} tokens instead of {one.n_vocab}"
    for token in range(min(one.n_vocab, other.n_vocab)):
        if one.special_text(token) != other.special_text(token):
            return f"token {token} is {other.special_text(token)!r} instead of {one.special_text(token)!r}"
    return "" if one.eog_tokens == other.eog_tokens else "its answers end with other tokens"


def check_draft(target: Path, one: Vocab, draft: Path, other: Vocab) -> None:
    """Raises BadModel for a draft whose guesses would mean something else to its target."""
    if what := difference(one, other):
        raise BadModel(
            f"{draft}: cannot guess for {target}, since {what}; draft_model_path needs a smaller model of the same "
            "family"
        )


class VocabModel:
    """A model loaded without its weights, for a process that only reads and writes text. Close it once."""

    def __init__(self, path: Path) -> None:
        self._model: Any = lib.load_model(path, use_extra_bufts=False, vocab_only=True)
        self.vocab = Vocab(self._model)

    def close(self) -> None:
        """Free the model; its Vocab must not be used afterwards."""
        if self._model:
            c.llama_model_free(self._model)
            self._model = None
