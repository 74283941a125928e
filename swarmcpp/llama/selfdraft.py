"""A model's own draft: itself without a band of its middle layers (SWIFT: Xia et al. 2024, "On-the-fly self-speculative
decoding"), chosen once by how often it says what the whole model says."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import numpy as np

from swarmcpp.errors import BadConfig, StartupError
from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.models.slicing import write_thinned

logger = logging.getLogger(__name__)

OUTER: Final = 2
"""Layers of each side that are kept: without those nearly nothing is guessed."""

CANDIDATES: Final = 4
SAMPLE: Final = 96
"""Tokens of the model's own text by which bands are compared."""

OPENING: Final = "The town lies by the river. In the morning the market opens, and people come to buy bread and fish."


def bands(n_layers: int, ratio: float) -> list[range]:
    """The bands of `ratio` of all layers that are compared, evenly over the middle. Raises BadConfig."""
    count, room = round(ratio * n_layers), n_layers - 2 * OUTER
    if not 0 < count <= room:
        raise BadConfig(
            f"swift_skip_ratio = {ratio:g} skips {count} of {n_layers} layers, where 1 to {max(room, 0)} can be; "
            "choose another ratio, or turn swift_self_speculative off"
        )
    firsts = {OUTER + round(step * (room - count) / (CANDIDATES - 1)) for step in range(CANDIDATES)}
    return [range(first, first + count) for first in sorted(firsts)]


def self_draft(
    source: Path, target: Model, ratio: float, directory: Path, threads: int, *, use_extra_bufts: bool
) -> Path:
    """The file of the draft for the model at `source`, made in `directory` the first time.

    Raises BadConfig, BadModel (no layers of it can be left out), StartupError.
    """
    compared, about = bands(target.n_layers, ratio), source.stat()
    file = directory / f"{source.stem[:80]}-{about.st_size:x}-{about.st_mtime_ns:x}-{len(compared[0])}.gguf"
    if file.is_file():
        return file
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"{directory}: cannot be made ({error.strerror}); choose another --data-dir") from error
    logger.info("choosing %d of %d layers that a draft of %s skips", len(compared[0]), target.n_layers, source.name)
    options = ContextOptions(n_ctx=2 * SAMPLE, n_seqs=1, n_threads=threads, outputs=SAMPLE)
    with ExitStack() as stack:
        context = Context(target, options)
        stack.callback(context.close)
        text = _told(context, target.vocab.tokenize(OPENING, add_special=True, parse_special=False)[:SAMPLE])
        best = 0.0
        for band in compared:
            path = write_thinned(source, band, file.with_suffix(f".{band.start}.part"))
            stack.callback(_forget, path)
            agreement = _agreement(path, text, options, use_extra_bufts=use_extra_bufts)
            logger.info("without layers %d to %d it agrees on %.0f%%", band.start, band.stop, 100 * agreement)
            if agreement >= best:
                best, chosen = agreement, path
        chosen.replace(file)
    return file


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _told(context: Context, opening: list[int]) -> list[int]:
    """An opening and what the model says after it, greedily."""
    text = list(opening)
    rows = opening
    for _ in range(SAMPLE - 1):
        context.batch.clear()
        last = context.batch.add(0, len(text) - len(rows), rows, outputs=1)
        context.decode()
        rows = [int(np.argmax(context.logits(last)))]
        text += rows
    return text


def _agreement(path: Path, text: list[int], options: ContextOptions, *, use_extra_bufts: bool) -> float:
    """The share of the last tokens of `text` that the model at `path` would have said."""
    with ExitStack() as stack:
        model = Model(path, use_extra_bufts=use_extra_bufts)
        stack.callback(model.close)
        context = Context(model, options)
        stack.callback(context.close)
        end = context.batch.add(0, 0, text[:-1], outputs=SAMPLE - 1)
        context.decode()
        rows = range(end - SAMPLE + 2, end + 1)
        said = [int(np.argmax(context.logits(row))) for row in rows]
    return sum(a == b for a, b in zip(said, text[-len(said) :], strict=True)) / len(said)
