"""The corpus: documents of stories and conversations, made from a seed, and their tokens.

`python -m bench.guide.corpus OUT`. Needs the package `tokenizers` besides numpy; nothing of swarmcpp.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.guide.dialogs import Turn, conversation
from bench.guide.stories import story

END, USER_TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, USER_TURN, TURN_END)
"""Ids 0, 1 and 2. END begins every document and ends a story; TURN_END ends an answer."""

VOCAB = 3072
STORIES_SHARE = 0.22
"""Of the documents; the rest are conversations."""

PRE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text is cut before the merges: Qwen2's pattern, which llama.cpp knows as the pre-tokenizer `qwen2`. Digits stand
alone, which sums need."""

TOKENIZER_DOCUMENTS = 40_000
BATCH = 2_000
"""Documents of one seed."""

Piece = tuple[str, bool]
"""Text of a document, and whether the model learns to say it."""


def pieces(turns: Sequence[Turn]) -> list[Piece]:
    """A conversation as the chat template writes it; only answers are learned."""
    written: list[Piece] = []
    for turn in turns:
        written.append((f"{USER_TURN}{turn.role}\n", False))
        written.append((f"{turn.text}{TURN_END}", turn.role == "assistant"))
        written.append(("\n", False))
    return written


def document(rng: random.Random) -> list[Piece]:
    """One document without the END that begins it."""
    if rng.random() < STORIES_SHARE:
        return [(story(rng) + END, True)]
    return pieces(conversation(rng))


def documents(seed: int, count: int) -> Iterator[list[Piece]]:
    """`count` documents, always the same for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield document(rng)


def train_tokenizer(seed: int) -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ("".join(text for text, _ in doc) for doc in documents(seed, TOKENIZER_DOCUMENTS))
    made.train_from_iterator(texts, trainer)
    return made


def _encoded(seed: int, tokenizer: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (uint16), whether each is learned (bool), and where documents begin, of `count` documents."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    tokens: list[int] = []
    learned: list[bool] = []
    starts: list[int] = []
    for doc in documents(seed, count):
        starts.append(len(tokens))
        tokens.append(0)
        learned.append(False)
        for text, wanted in doc:
            ids = encoder.encode(text).ids
            tokens += ids
            learned += [wanted] * len(ids)
    return np.array(tokens, np.uint16), np.array(learned, bool), np.array(starts, np.int64)


def write(out: Path, seed: int, batches: int, workers: int) -> dict[str, int]:
    """Write tokens.npy, learned.npy and starts.npy of `batches` x BATCH documents into `out`, and tokenizer.json unless
    it is there.

    The last batch is held out: its documents' indices are the largest BATCH of `starts`. The counts are returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(seed).save(str(tokenizer))
    # Seeds of batches begin after that of the tokenizer.
    seeds = range(seed + 1, seed + 1 + batches)
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(partial(_encoded, tokenizer=tokenizer, count=BATCH), seeds, chunksize=1))
    tokens, learned = (np.concatenate([each[part] for each in found]) for part in (0, 1))
    offsets = np.cumsum([0, *(len(each[0]) for each in found[:-1])])
    starts = np.concatenate([each[2] + offset for each, offset in zip(found, offsets, strict=True)])
    for name, array in (("tokens", tokens), ("learned", learned), ("starts", starts)):
        np.save(out / f"{name}.npy", array)
    counts = {"documents": len(starts), "tokens": len(tokens), "learned": int(learned.sum())}
    (out / "counts.json").write_text(json.dumps(counts))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the corpus of swarmcpp-guide as tokens.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batches", type=int, default=600, help=f"of {BATCH} documents")
    parser.add_argument("--workers", type=int, default=16)
    chosen = parser.parse_args()
    print(write(chosen.out, chosen.seed, chosen.batches, chosen.workers))
