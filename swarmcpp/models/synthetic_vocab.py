"""The vocabulary of synthetic models: a byte-level BPE that stock llama.cpp loads and that encodes any text.

Ids: 0-255 the bytes, then the control tokens at fixed ids, then merged tokens, then filler words. Fillers are never
produced by tokenizing, but a model with random weights generates them, so each is a readable word.
"""

from __future__ import annotations

from typing import Literal

import gguf

from swarmcpp.errors import BadModel

Tokenizer = Literal["bytes", "none"]

ENDOFTEXT, IM_START, IM_END = 256, 257, 258
"""Ids of the control tokens; generation ends with IM_END."""
CONTROL_TOKENS = {ENDOFTEXT: "<|endoftext|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}

MERGES = (
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("e", "n"),
    ("o", "r"),
    ("Ġ", "o"),
    ("n", "d"),
    ("i", "s"),
    ("e", "s"),
    ("in", "g"),
    ("l", "l"),
    ("Ġa", "nd"),
)
"""Symbols are GPT-2's printable stand-ins for bytes: Ġ is a space."""

MIN_VOCAB = 256 + len(CONTROL_TOKENS) + len(MERGES)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML."""


def write_tokenizer(writer: gguf.GGUFWriter, n_vocab: int, tokenizer: Tokenizer) -> None:
    """Add the tokenizer's metadata. Raises BadModel when `n_vocab` is too small for the byte vocabulary."""
    if tokenizer == "none":
        writer.add_tokenizer_model("no_vocab")
        return
    if n_vocab < MIN_VOCAB:
        raise BadModel(f"n_vocab = {n_vocab} is too small for a byte vocabulary; use at least {MIN_VOCAB}")
    tokens = vocabulary(n_vocab)
    types = [gguf.TokenType.NORMAL] * n_vocab
    for token in CONTROL_TOKENS:
        types[token] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(ENDOFTEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_pad_token_id(ENDOFTEXT)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def vocabulary(n_vocab: int) -> list[str]:
    """`n_vocab` distinct token texts, in id order."""
    tokens = byte_symbols()
    tokens += [CONTROL_TOKENS[token] for token in sorted(CONTROL_TOKENS)]
    tokens += [left + right for left, right in MERGES]
    tokens += [f"Ġw{index}" for index in range(n_vocab - len(tokens))]
    return tokens


def byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte 0-255: itself where it prints, else the next one from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    symbols: list[str] = []
    moved = 0
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(256 + moved))
            moved += 1
    return symbols
