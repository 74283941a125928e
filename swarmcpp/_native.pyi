import numpy as np
import numpy.typing as npt

def abort_callback_address() -> int:
    """Address of a ggml_abort_callback whose user data points at two uint64: abort step, current step."""

def all_finite_f16(bytes: npt.NDArray[np.uint8]) -> bool:
    """Whether every IEEE half in a byte array (little-endian, shape (n,)) is finite."""
