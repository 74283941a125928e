"""Owners of a llama.cpp model, its context and its batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt

from swarmcpp._native import GraphTap, all_finite_f32
from swarmcpp.core import MAX_ROWS
from swarmcpp.errors import DecodeAborted, DecodeFailed, NotEnoughMemory
from swarmcpp.llama import lib
from swarmcpp.llama.kvmemory import KvMemory
from swarmcpp.llama.snapshot import Bytes
from swarmcpp.llama.vocab import Vocab

Floats = npt.NDArray[np.float32]

_TAP_FUNCTIONS = ("ggml_get_name", "ggml_op_desc", "ggml_nbytes", "ggml_backend_tensor_get")


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """`n_ctx` is per sequence; callbacks and their data are addresses (0: none).

    `outputs`: rows of a batch that may be outputs; 0: one of each sequence.
    `hidden`: the tensor whose rows `Context.decode` takes; nothing behind it is computed.
    """

    n_ctx: int
    n_seqs: int
    n_threads: int
    abort_callback: int = 0
    abort_data: int = 0
    outputs: int = 0
    hidden: str = ""


class Model:
    """A loaded model. Close after every context on it."""

    def __init__(self, path: Path, *, use_extra_bufts: bool, progress: Callable[[float], None] | None = None) -> None:
        self.pointer: Any = lib.load_model(path, use_extra_bufts=use_extra_bufts, vocab_only=False, progress=progress)
        self.vocab = Vocab(self.pointer)

    @property
    def n_layers(self) -> int:
        """Its layers."""
        return int(c.llama_model_n_layer(self.pointer))

    def close(self) -> None:
        """Free the weights."""
        if self.pointer:
            c.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """A llama.cpp context with one KV stream per sequence, and the batch that feeds it.

    Not thread-safe. Streams (`kv_unified = false`) keep a sequence's logits bit-identical whatever runs beside it.
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self.tap = GraphTap(options.hidden, {name: lib.tensor_function(name) for name in _TAP_FUNCTIONS})
        self.n_outputs = max(options.outputs, options.n_seqs)
        params = lib.fill(
            c.llama_context_default_params(),
            n_ctx=options.n_ctx * options.n_seqs,
            n_seq_max=options.n_seqs,
            n_batch=MAX_ROWS,
            n_ubatch=MAX_ROWS,
            # Without this bound the output buffer is n_batch x n_vocab floats.
            n_outputs_max=self.n_outputs,
            n_threads=options.n_threads,
            n_threads_batch=options.n_threads,
            kv_unified=False,
            # Not AUTO: the choice would depend on the device, and the KV layout with it.
            flash_attn_type=c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            offload_kqv=False,
            op_offload=False,
            # A window that forgets cannot be rolled back or continued from an earlier token.
            swa_full=True,
            no_perf=True,
            abort_callback=c.ggml_abort_callback(options.abort_callback),
            abort_callback_data=ctypes.c_void_p(options.abort_data),
            cb_eval=c.ggml_backend_sched_eval_callback(GraphTap.callback_address),
            cb_eval_user_data=ctypes.c_void_p(self.tap.address),
        )
        lib.recent_errors()
        pointer = c.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise NotEnoughMemory(
                f"llama.cpp cannot create a context of {options.n_seqs} slots x {options.n_ctx} tokens: "
                f"{lib.recent_errors() or 'no reason given'}; try a smaller --ctx-size or fewer --slots"
            )
        self.pointer: Any = pointer
        self.n_seqs = options.n_seqs
        self._n_vocab = model.vocab.n_vocab
        self.n_ctx: int = c.llama_n_ctx_seq(pointer)
        self._memory = c.llama_get_memory(pointer)
        self.kv: KvMemory | None = None
        """Where its KV is, once somebody has found out (see LlamaBackend.learn)."""
        self.batch = Batch(MAX_ROWS)

    def decode(self, batch: Batch | None = None, hidden: Floats | None = None) -> None:
        """Compute the rows of `batch`, without it of `self.batch`. Raises DecodeAborted, DecodeFailed.

        `hidden`, shape (capacity, n_embd), gets the rows of the tensor of that name in the order of `ubatch_order`;
        `tap.filled` are the bytes of it that did.
        """
        batch = batch or self.batch
        self.tap.arm(hidden)
        code = c.llama_decode(self.pointer, batch.struct)
        if code == 0:
            if self.kv:
                self.kv.check_decode(*batch.positions, self.tap.cells())
            return
        if code == 2:
            raise DecodeAborted("the step was aborted")
        reason = lib.recent_errors() or "no reason given"
        raise DecodeFailed(f"llama_decode returned {code} on {batch.count} rows: {reason}")

    def logits(self, row: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A copy of the logits of batch row `row` of the last decode, shape (n_vocab,)."""
        pointer = c.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,)).copy()

    def has_finite_logits(self, row: int) -> bool:
        """Whether all logits of batch row `row` of the last decode are finite. Raises DecodeFailed when it has none."""
        return all_finite_f32(self.logits_address(row), self._n_vocab)

    def logits_address(self, row: int) -> int:
        """Where the logits (n_vocab floats) of batch row `row` of the last decode are. Raises DecodeFailed."""
        pointer = c.llama_get_logits_ith(self.pointer, row)
        if not pointer:
            raise DecodeFailed(f"row {row} of the last decode has no logits")
        return ctypes.addressof(pointer.contents)

    def export(self, seq: int) -> Bytes:
        """llama.cpp's state of a sequence (see llama/snapshot.py), a copy. Raises DecodeFailed."""
        blob = np.empty(c.llama_state_seq_get_size(self.pointer, seq), np.uint8)
        if c.llama_state_seq_get_data(self.pointer, _address(blob), len(blob), seq) != len(blob):
            raise DecodeFailed(f"llama.cpp cannot export sequence {seq}: {lib.recent_errors() or 'no reason given'}")
        return blob

    def restore(self, seq: int, blob: Bytes) -> None:
        """Replace a sequence by a state that snapshot.compose made for this context. Raises DecodeFailed."""
        if c.llama_state_seq_set_data(self.pointer, _address(blob), len(blob), seq) != len(blob):
            raise DecodeFailed(
                f"llama.cpp refuses a state for sequence {seq}: {lib.recent_errors() or 'no reason given'}"
            )
        if self.kv:
            self.kv.check_restored(seq, blob)

    def truncate(self, seq: int, n_past: int) -> None:
        """Forget positions from `n_past` of a sequence; 0 empties it."""
        if not c.llama_memory_seq_rm(self._memory, seq, n_past, -1):
            c.llama_memory_seq_rm(self._memory, seq, -1, -1)
            raise DecodeFailed(f"llama.cpp cannot truncate sequence {seq} to {n_past} tokens")
        if self.kv and not n_past:
            self.kv.check_emptied(seq)

    def length(self, seq: int) -> int:
        """Tokens that llama.cpp holds of a sequence."""
        return int(c.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def close(self) -> None:
        """Free the KV memory and buffers."""
        if self.pointer:
            self.kv = None
            c.llama_free(self.pointer)
            self.pointer = None


def _address(blob: Bytes) -> Any:
    return blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class Batch:
    """The rows of one llama_decode: token, position, sequence, and whether its logits are wanted.

    Arrays of length `capacity` that llama.cpp reads in place; int32 tokens, positions and sequence ids.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._seqs = np.zeros(capacity, np.int32)
        self._n_seqs = np.ones(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        seq_base = self._seqs.ctypes.data
        self._seq_pointers = np.arange(seq_base, seq_base + 4 * capacity, 4, dtype=np.uint64)
        self._struct = lib.fill(
            c.llama_batch(),
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(c.llama_token)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(c.llama_pos)),
            n_seq_id=self._n_seqs.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=ctypes.cast(self._seq_pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(c.llama_seq_id))),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def struct(self) -> Any:
        """The llama_batch; valid until the batch changes."""
        self._struct.n_tokens = self.count
        return self._struct

    @property
    def positions(self) -> tuple[list[int], list[int]]:
        """Sequences of the rows, and positions in these."""
        return self._seqs[: self.count].tolist(), self._positions[: self.count].tolist()

    def clear(self) -> None:
        """Forget all rows."""
        self.count = 0

    def add(self, seq: int, start: int, tokens: Sequence[int], *, outputs: int) -> int:
        """Append `tokens` of a sequence from position `start`, with logits for the last `outputs` of them; the index of
        its last row is returned."""
        begin, end = self._place(seq, start, len(tokens), outputs)
        self._tokens[begin:end] = tokens
        return end - 1

    def _place(self, seq: int, start: int, count: int, outputs: int) -> tuple[int, int]:
        """Append `count` rows of a sequence from position `start`, the last `outputs` of them outputs; their range."""
        begin, end = self.count, self.count + count
        if end > self.capacity:
            raise ValueError(f"{end} rows do not fit into a batch of {self.capacity}")
        self._positions[begin:end] = np.arange(start, start + count)
        self._seqs[begin:end] = seq
        self._outputs[begin:end] = 0
        self._outputs[end - outputs : end] = 1
        self.count = end
        return begin, end
