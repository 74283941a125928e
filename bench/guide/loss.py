"""Loss of GGUFs on held-out documents, in nats for each token that the model learns to say, as llama.cpp computes it.

`python -m bench.guide.loss FILE.gguf ...`. The documents are those of a batch that training never saw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.guide.corpus import documents
from bench.guide.speculation import AllRows
from swarmcpp.core import MAX_ROWS
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.llama.vocab import Vocab

SEED = 481
"""Of the held-out batch: corpus.py's seed 1 and 480 batches, of which the last is held out."""
DOCUMENTS = 300
CONTEXT = 2048


def tokenized(vocab: Vocab, seed: int, count: int) -> list[tuple[list[int], list[bool]]]:
    """Tokens of documents, and whether each is learned."""
    found: list[tuple[list[int], list[bool]]] = []
    for document in documents(seed, count):
        tokens, learned = [0], [False]
        for text, wanted in document:
            ids = vocab.tokenize(text, add_special=False, parse_special=True)
            tokens += ids
            learned += [wanted] * len(ids)
        found.append((tokens[:CONTEXT], learned[:CONTEXT]))
    return found


def loss(path: Path, seed: int = SEED, count: int = DOCUMENTS) -> tuple[float, int]:
    """Mean nats a token, and the tokens that were counted."""
    total, counted = 0.0, 0
    with ExitStack() as stack:
        model = Model(path, use_extra_bufts=False)
        stack.callback(model.close)
        context = Context(model, ContextOptions(n_ctx=CONTEXT, n_seqs=1, n_threads=1, outputs=MAX_ROWS))
        stack.callback(context.close)
        batch = AllRows(MAX_ROWS)
        for tokens, learned in tokenized(model.vocab, seed, count):
            context.truncate(0, 0)
            for start in range(0, len(tokens) - 1, MAX_ROWS):
                part = tokens[start : start + MAX_ROWS]
                batch.clear()
                batch.add_all(start, part)
                context.decode(batch)
                nats, said = _score(context, start, part, tokens, learned)
                total, counted = total + nats, counted + said
    return total / counted, counted


def _score(
    context: Context, start: int, part: Sequence[int], tokens: Sequence[int], learned: Sequence[bool]
) -> tuple[float, int]:
    """Nats of the learned tokens that follow the rows of `part`, and their number."""
    total, counted = 0.0, 0
    for row in range(len(part)):
        following = start + row + 1
        if following < len(tokens) and learned[following]:
            logits = context.logits(row).astype(np.float64)
            top = logits.max()
            total += float(top + np.log(np.exp(logits - top).sum()) - logits[tokens[following]])
            counted += 1
    return total, counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Loss on held-out documents.")
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        nats, said = loss(file)
        print(f"{file.name}: {nats:.4f} nats a token over {said} tokens of {DOCUMENTS} documents")
