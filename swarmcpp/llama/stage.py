"""A stage: llama.cpp on a slice (see models/slicing.py). Rows of embeddings go in; hidden rows or logits come out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np

from swarmcpp.core import MAX_OUTPUTS, MAX_ROWS
from swarmcpp.errors import BadModel, BadRequest, DecodeFailed
from swarmcpp.llama.backend import LlamaBackend
from swarmcpp.llama.context import Batch, Context, ContextOptions, Model
from swarmcpp.llama.convert import float_converter
from swarmcpp.llama.lib import fill
from swarmcpp.llama.rows import FloatRows, decode_rows, encode_rows
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.inspect import inspect
from swarmcpp.models.slicing import slice_of
from swarmcpp.wire.codec import Buffer, RowEncoding
from swarmcpp.wire.engine import RunPart


class EmbeddingTable:
    """The token embedding of a whole model, from its file: what goes into the first stage. Thread-safe.

    With the function that llama.cpp itself looks rows up with (ggml_type_traits), so they are bit-identical to its own.
    """

    def __init__(self, path: Path) -> None:
        """`path` is the first file of a split model. Raises BadModel for a slice, whose rows are not the model's."""
        headers = [read_header(part) for part in inspect(path).files]
        if slice_of(headers[0]) is not None:
            raise BadModel(f"{path}: is a slice, which has no token embeddings; give the file of the whole model")
        found, file = next((t, h) for h in headers for t in h.tensors if t.name == "token_embd.weight")
        if len(found.shape) != 2:
            raise BadModel(f"{path}: has a token embedding that is no matrix; download it again")
        self.n_embd, self.n_vocab = found.shape
        to_float = float_converter(found.ggml_type)
        if to_float is None:
            raise BadModel(
                f"{path}: has its token embedding as {found.ggml_type.name}, which llama.cpp cannot look up; get the "
                "model in another quantisation"
            )
        self._to_float = to_float
        # Mapped, not read: of hundreds of megabytes only the rows of what is said come into memory.
        self._raw = np.memmap(file.path, np.uint8, "r", found.offset, (found.n_bytes,))
        self._row_bytes = found.n_bytes // self.n_vocab
        self._address = self._raw.ctypes.data

    def rows(self, tokens: Sequence[int]) -> FloatRows:
        """The embeddings of `tokens`, shape (n, n_embd). Raises BadRequest for an id outside the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise BadRequest(f"token {token} is not in the vocabulary; ids are 0 to {self.n_vocab - 1}")
        rows = np.empty((len(tokens), self.n_embd), np.float32)
        target = rows.ctypes.data
        for index, token in enumerate(tokens):
            self._to_float(self._address + token * self._row_bytes, target + index * rows.strides[0], self.n_embd)
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class StageRows:
    """Rows of one slot for one decode: `rows` (n, n_embd) at positions from `start`.

    `outputs`: the logits after so many of the last rows are wanted. Only a tail reads it; the others give every row.
    """

    slot: int
    start: int
    rows: FloatRows
    outputs: int


class StageContext:
    """A context on a slice, with the settings of every other context (see Context). Not thread-safe.

    Rows of ascending slots keep bit-identity with a whole model that gets the same batch.
    """

    def __init__(self, model: Model, options: ContextOptions, *, is_tail: bool) -> None:
        """Raises NotEnoughMemory. `is_tail`: the slice has the head (Slice.is_tail)."""
        self.n_embd = int(c.llama_model_n_embd(model.pointer))
        self.is_tail = is_tail
        # A tail cannot know how many rows of guesses its heads will send.
        options = replace(options, outputs=MAX_OUTPUTS if is_tail else MAX_ROWS)
        if not is_tail:
            options = replace(options, hidden=f"l_out-{c.llama_model_n_layer(model.pointer) - 1}")
        self.context = Context(model, options)
        self._batch = EmbeddingBatch(MAX_ROWS, self.n_embd)
        self._taken = np.empty((MAX_ROWS, self.n_embd), np.float32)
        self.outputs: dict[int, range] = {}
        """Batch rows whose logits were asked for in the last call, by slot. Tail only."""

    def decode(self, parts: Sequence[StageRows]) -> FloatRows:
        """Compute rows. Of a stage that is not the tail: the hidden rows, shape (rows of all parts, n_embd), in the
        order of `parts`; of the tail: none, shape (0, n_embd). Raises DecodeAborted, DecodeFailed, and ValueError for
        more than MAX_ROWS rows or another width.
        """
        self._batch.clear()
        self.outputs.clear()
        for part in parts:
            wanted = part.outputs if self.is_tail else len(part.rows)
            end = 1 + self._batch.add_rows(part.slot, part.start, part.rows, outputs=wanted)
            if part.outputs:
                self.outputs[part.slot] = range(end - part.outputs, end)
        if self.is_tail:
            self.context.decode(self._batch)
            return np.empty((0, self.n_embd), np.float32)
        self.context.decode(self._batch, self._taken)
        count = self._batch.count
        filled = self.context.tap.filled
        if filled != count * self.n_embd * self._taken.itemsize:
            raise DecodeFailed(f"llama.cpp gave {filled} bytes of hidden rows for {count} rows")
        if all(len(part.rows) == 1 for part in parts) and all(a.slot < b.slot for a, b in pairwise(parts)):
            # Those come in the order in which they went in.
            return self._taken[:count].copy()
        hidden = np.empty((count, self.n_embd), np.float32)
        hidden[ubatch_order([(part.slot, len(part.rows)) for part in parts])] = self._taken[:count]
        return hidden

    def logits(self, slot: int) -> FloatRows:
        """A copy of the logits after the last row of `slot`, shape (n_vocab,). Tail only."""
        return self.context.logits(self.outputs[slot][-1])

    def close(self) -> None:
        """Free the context."""
        self.context.close()


class LlamaStage(LlamaBackend):
    """A stage with its samplers and its KV behind slots: the real `engine.backend.StageBackend`."""

    def __init__(self, model: Model, stage: StageContext, block_tokens: int = 0) -> None:
        super().__init__(model, stage.context, block_tokens)
        self._stage = stage
        self._outputs = stage.outputs
        self.n_embd = stage.n_embd
        self.is_tail = stage.is_tail

    def compute(self, slots: Sequence[int], parts: Sequence[RunPart], rows: FloatRows) -> FloatRows:
        """See `engine.backend.StageBackend`."""
        # By slot, as a whole model has them: it is also what makes neighbours of neighbours.
        order = sorted(range(len(parts)), key=slots.__getitem__)
        ends = list(accumulate(part.count for part in parts))
        places = [range(end - part.count, end) for end, part in zip(ends, parts, strict=True)]
        batch = [
            StageRows(slots[each], parts[each].start, rows[places[each].start : places[each].stop], parts[each].outputs)
            for each in order
        ]
        hidden = self._stage.decode(batch)
        if self.is_tail or order == list(range(len(parts))):
            return hidden
        restored = np.empty_like(hidden)
        restored[[row for each in order for row in places[each]]] = hidden
        return restored

    def finite(self, slot: int) -> bool:
        """See `engine.backend.StageBackend`."""
        return all(self._context.has_finite_logits(row) for row in self._outputs[slot])

    def encode(self, rows: FloatRows, encoding: RowEncoding) -> Buffer:
        """See `rows.encode_rows`."""
        return encode_rows(rows, encoding)

    def decode_frame(self, frame: Buffer, n: int, encoding: RowEncoding) -> FloatRows:
        """See `rows.decode_rows`."""
        return decode_rows(frame, n, self.n_embd, encoding)


class EmbeddingBatch(Batch):
    """A batch of rows of F32 embeddings instead of tokens."""

    def __init__(self, capacity: int, n_embd: int) -> None:
        super().__init__(capacity)
        self._rows = np.zeros((capacity, n_embd), np.float32)
        fill(self._struct, token=None, embd=self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))

    def add_rows(self, seq: int, start: int, rows: FloatRows, *, outputs: int) -> int:
        """Append `rows` (n, n_embd) of a sequence from position `start`, the last `outputs` of them outputs.

        The index of the last is returned. Raises ValueError for what does not fit.
        """
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != self._rows.shape[1]:
            raise ValueError(f"rows of shape {rows.shape} for embeddings of width {self._rows.shape[1]}")
        begin, end = self._place(seq, start, len(rows), outputs)
        self._rows[begin:end] = rows
        return end - 1


def ubatch_order(parts: Sequence[tuple[int, int]]) -> list[int]:
    """Batch rows in the order in which llama.cpp computes them; `parts` are (sequence, rows), as in the batch.

    llama_batch_allocr::split_equal (sequential): a ubatch takes as many rows of each of some consecutive sequences
    as the shortest of them has left; what is left waits for the next. A batch within n_ubatch rows is cut by nothing
    else.
    """
    seqs = [seq for seq, count in parts for _ in range(count)]
    left: dict[int, list[int]] = {}
    for row, seq in enumerate(seqs):
        left.setdefault(seq, []).append(row)
    order: list[int] = []
    done: set[int] = set()
    while left:
        chosen: list[int] = []
        for row, seq in enumerate(seqs):
            if row not in done and seq not in chosen and (not chosen or seq == chosen[-1] + 1):
                chosen.append(seq)
        count = min(len(left[seq]) for seq in chosen)
        for seq in chosen:
            order += left[seq][:count]
            left[seq] = left[seq][count:]
        done.update(order)
        left = {seq: rows for seq, rows in left.items() if rows}
    return order
