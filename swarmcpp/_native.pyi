from typing import ClassVar

import numpy as np
import numpy.typing as npt

def abort_callback_address() -> int:
    """Address of a ggml_abort_callback whose user data points at two uint64: abort step, current step."""

def all_finite_f16(bytes: npt.NDArray[np.uint8]) -> bool:
    """Whether every IEEE half in a byte array (little-endian, shape (n,)) is finite."""

def all_finite_f32(address: int, count: int) -> bool:
    """Whether all of `count` floats (32 bits) at an address are finite. The address must be that of as many."""

def largest_f32(address: int, count: int, banned: list[int]) -> int:
    """The first index of the largest of `count` floats (32 bits) at an address, those in `banned` not counted; -1 when
    a NaN is among them. The address must be that of as many, which nobody else uses meanwhile. Raises ValueError for a
    banned index outside."""

def q8_problem() -> str:
    """Why this machine or this build cannot have the kernel for Q8_0 matrices; empty when it can."""

def attention_problem() -> str:
    """Why this machine or this build cannot have the kernel for attention; empty when it can."""

def register_kernels(addresses: dict[str, int], *, q8: bool, attention: bool) -> str:
    """Let ggml multiply Q8_0 matrices (native/q8_matmul.h) and compute attention of fewer than 64 rows
    (native/attention.h) with kernels of this module, for the rest of this process.

    `addresses` are those of ggml's functions, by name (see native/ggml_backend.cpp). Empty when that is so now;
    otherwise why not, and nothing has changed: the CPU or the build lacks something, or ggml is another version.
    """

def q8_product(matrix: npt.NDArray[np.uint8], rows: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    """What the kernel alone makes of `rows` (n, k) and a Q8_0 matrix (m, k / 32 * 34) in `out` (n, m); for tests of it.

    Raises ValueError for shapes that do not fit, RuntimeError where `q8_problem` has something to say.
    """

def attend(
    queries: npt.NDArray[np.float32],
    keys: npt.NDArray[np.uint16],
    values: npt.NDArray[np.uint16],
    mask: npt.NDArray[np.uint16],
    scale: float,
    lanes: int,
    apart: bool,
    out: npt.NDArray[np.float32],
) -> None:
    """What the kernel alone makes of `queries` (streams, heads, rows, dk), `keys` and `values` (streams, kv heads,
    positions, dk or dv) and `mask` (streams, rows, positions), which are the bits of halves, in `out` (streams, rows,
    heads, dv); for tests of it. `lanes` items at a time, 8 or a multiple of 16; `apart`: as threads that share a row.

    Raises ValueError for shapes that do not fit, RuntimeError where `attention_problem` has something to say.
    """

class GraphTap:
    """What is taken out of the graphs of one context while it computes: one tensor's F32 rows, behind which nothing is
    computed, and the cells of the KV that are written. Not thread-safe."""

    callback_address: ClassVar[int]
    """Address of a ggml_backend_sched_eval_callback."""

    def __init__(self, tensor: str, addresses: dict[str, int]) -> None:
        """Name of the tensor, empty for none; addresses of ggml_get_name, ggml_op_desc, ggml_nbytes and
        ggml_backend_tensor_get. Raises ValueError when one of these is missing."""

    def arm(self, target: npt.NDArray[np.float32] | None) -> None:
        """Before each decode: take its rows into `target`, shape (capacity, n_embd), C-contiguous.

        The rows of each ubatch go behind those of the one before.
        """

    @property
    def filled(self) -> int:
        """Bytes taken since `arm`; 0 when the rows did not fit."""

    def cells(self) -> list[int]:
        """Cells, of those of all streams, that rows were written to since `arm`."""

    def places(self) -> list[tuple[str, int, int, int, int]]:
        """Of each "k" and "v" and layer that was written to so far: address, bytes of a row, rows of all streams."""

    @property
    def address(self) -> int:
        """User data of the callback; valid as long as this object."""
